"""An imported model as a run's folder: configuration, a checkpoint at step 0, tokenizer, and where it came from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from memorizing.array_typing import Tree
from memorizing.batch import Vocabulary
from memorizing.errors import UserError
from memorizing.runtime.json_lines import replace_text
from memorizing.runtime.workdir import EXPERIMENT, VOCABULARY, read_record, resolve, write_config, write_record
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.experiment import Experiment
from memorizing.training.pretrained.source import Source
from memorizing.training.state import TrainState

# Of a checkpoint's files: no more is in memory beside the model.
FILE_BYTES = 1 << 24
# Where the model came from: what `export` goes by.
ORIGIN = "pretrained.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an imported model came from.

    Attributes:
      folder: of the imported run.
      source: what was imported.
      config: its settings, as a config.json has them.
      dtype: in which its numbers were stored, in the words of safetensors.
      tokenizer_files: names of the files of its tokenizer in the folder.
    """

    folder: epath.Path
    source: str
    config: Mapping[str, Any]
    dtype: str
    tokenizer_files: tuple[str, ...]


def new_folder(path: str) -> epath.Path:
    """The folder of a run to be made, which is not there yet. Raises UserError if it is."""
    workdir = resolve(path)
    if workdir.exists():
        raise UserError(f"--workdir={path} is there already: choose another one for the run, or remove it")
    return workdir


@contextlib.contextmanager
def being_made(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder, and removes it if the block fails.

    Raises:
      UserError: it cannot be made.
    """
    try:
        workdir.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be made ({error.strerror or error})") from error
    try:
        yield
    except BaseException:
        workdir.rmtree()
        raise


def write_tokenizer(workdir: epath.Path, source: Source) -> None:
    """Puts the files of the tokenizer into the folder."""
    for name, text in source.tokenizer_files.items():
        replace_text(workdir / name, text)


def write_run(
    workdir: epath.Path,
    experiment: Experiment,
    config_text: str,
    source: Source,
    params: Tree,
    buffers: Tree,
    vocabulary: Vocabulary | None,
) -> None:
    """Writes everything but the tokenizer; the configuration comes last: without it a folder holds no run.

    Args:
      workdir: the folder.
      experiment: the run.
      config_text: its resolved configuration.
      source: the model.
      params, buffers: the parameters of `experiment.model`, on their devices.
      vocabulary: of the tokenizer, None where there is none.
    """
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        # A run that starts from here makes its own.
        opt_state={},
        rng=jax.random.key_data(jax.random.key(experiment.loop.seed)),
        context={},
    )
    stacked_layers = experiment.model.stack.stacked_layers
    checkpointer = Checkpointer(workdir, save_context=False, stacked_layers=stacked_layers)
    checkpointer.save(state, rows={}, file_bytes=FILE_BYTES)
    checkpointer.wait()
    checkpointer.close()
    if vocabulary is not None:
        described = {"name": vocabulary.name, "size": vocabulary.size, "digest": vocabulary.digest}
        write_record(workdir / VOCABULARY, described)
    # No training goes on in this folder: its experiment is another one.
    write_record(workdir / EXPERIMENT, {"imported": source.name})
    write_record(
        workdir / ORIGIN,
        {
            "source": source.name,
            "config": source.config,
            "dtype": source.dtype,
            "tokenizer_files": sorted(source.tokenizer_files),
        },
    )
    write_config(workdir, config_text)


def read_origin(folder: epath.Path) -> Origin | None:
    """Where the model of a run was imported from; None if it was not.

    Raises:
      UserError: the record is damaged.
    """
    path = folder / ORIGIN
    if not path.exists():
        return None
    record = read_record(path)
    return Origin(folder, record["source"], record["config"], record["dtype"], tuple(record["tokenizer_files"]))
