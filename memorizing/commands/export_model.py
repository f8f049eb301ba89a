"""The command `export`: the parameters of a run, in Hugging Face's format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from etils import epath

from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.config.runs import open_run
from memorizing.errors import UserError
from memorizing.models.stack.arrays import unstack
from memorizing.runtime.workdir import CONFIG, read_config, resolve
from memorizing.training.checkpoint import paths, read_arrays
from memorizing.training.pretrained.export import DTYPE_NAMES, export
from memorizing.training.pretrained.run_folder import Origin, read_origin
from memorizing.training.transfer import merge_lora

# Runs that began with each other, one after the other.
_MOST_RUNS = 100

DESCRIPTION = """\
Writes a run that began with an imported model as a folder which transformers, vLLM and others load: config.json, tokenizer.json, model.safetensors.

  memorizing export --workdir=runs/tuned --to=models/tuned

What other libraries do not know, the parameters of a memory, stands beside the others as memorizing.NAME; they leave it out, and so the model is the one without its memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where to, a new folder")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPE_NAMES.values()), help="of the numbers (default: that of the model imported)"
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: an export takes a run as it is")
    given = options.workdir or experiment_flags.DEFAULT_WORKDIR
    origin = _origin(resolve(given))
    kinds = {name: kind for kind, name in DTYPE_NAMES.items()}
    params = _single_layers(given, options.step)
    written = export(origin, params, options.to, kinds.get(options.dtype))
    own = f", and {len(written.own)} of the memory" if written.own else ""
    print(
        f"written to {written.folder}: {written.num_tensors} tensors of {origin.source}{own}, "
        f"{written.num_bytes / 1e6:,.1f} MB"
    )
    return 0


def _single_layers(workdir: str, step: int | None) -> dict[str, np.ndarray]:
    """The parameters of a run, of single layers by path; low-rank changes become part of what they change."""
    arrays = read_arrays(resolve(workdir), step, only=("params/",))
    if not any("/lora_" in path for path in arrays):
        return arrays
    finished = open_run(workdir, step)
    config, params = merge_lora(finished.experiment.model, finished.params)
    merged = {path: np.asarray(leaf) for path, leaf in paths({"params": params}).items()}
    return unstack(merged, config.stack.stacked_layers)


def _origin(workdir: epath.Path) -> Origin:
    """Where a run's model was imported from: the run itself, or the one that it started from, and so on.

    Raises:
      UserError: it was not, or one of these runs is not there.
    """
    folder = workdir
    for _ in range(_MOST_RUNS):
        if not (folder / CONFIG).exists():
            raise UserError(f"--workdir={workdir}: there is no run in {folder}")
        origin = read_origin(folder)
        if origin is not None:
            return origin
        experiment, _ = load_experiment([], [], base=read_config(folder))
        if not experiment.loop.start_from:
            break
        folder = resolve(experiment.loop.start_from)
    raise UserError(
        f"--workdir={workdir} did not begin with an imported model: only such a run has a format to export to"
    )
