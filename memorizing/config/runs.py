"""Opens a finished run from its workdir: the configuration that it was trained with, and a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath
from flax import linen as nn

from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.models import language_model
from memorizing.runtime.weight_files.folder import TOKENIZER
from memorizing.runtime.workdir import CONFIG, read_config, resolve
from memorizing.training.checkpoint import read_arrays, weights_digest
from memorizing.training.transfer import fit

# Where an imported run names its tokenizer.
_VOCABULARY_FILE = "CachedCorpus.vocabulary_file"


def open_run(workdir: str, step: int | None = None, bindings: Sequence[str] = ()) -> FinishedRun:
    """Opens a run; nothing in its folder changes.

    Args:
      workdir: folder that `train` has written.
      step: of the checkpoint; None for the newest.
      bindings: gin bindings `NAME=VALUE` over the run's own configuration.

    Raises:
      UserError: there is no run, no such checkpoint, or its parameters do not fit the configuration.
    """
    folder = resolve(workdir)
    config = folder / CONFIG
    if not config.exists():
        raise UserError(
            f"--workdir={workdir} holds no run: there is no {config}; "
            f"train one with memorizing train --workdir={workdir}"
        )
    experiment, text = load_experiment([], bindings, base=_with_own_tokenizer(read_config(folder), folder))
    saved = read_arrays(folder, step, only=("params/", "buffers/", "step"))
    wanted = nn.unbox(language_model.abstract_variables(experiment.model, 1, experiment.batch.segment_length))
    variables = fit(wanted, saved, experiment.model.stack.stacked_layers, f"--workdir={workdir}")
    found = int(saved["step"])
    return FinishedRun(
        workdir=folder,
        experiment=experiment,
        params=variables["params"],
        buffers=variables["buffers"],
        step=found,
        weights=weights_digest(folder, found),
        config_text=text,
    )


def _with_own_tokenizer(config: str, folder: epath.Path) -> str:
    """A run's configuration whose tokenizer is that of its folder, where it has one: folders are moved and copied."""
    tokenizer = folder / TOKENIZER
    if _VOCABULARY_FILE not in config or not tokenizer.exists():
        return config
    return f"{config}\n{_VOCABULARY_FILE} = {str(tokenizer)!r}\n"
