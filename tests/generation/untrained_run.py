"""The folder of a run on bytes, with random weights and without training: what it writes differs by prompt."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from test_generate import CONFIG, write_cache

from memorizing.config.loading import load_experiment
from memorizing.runtime.workdir import VOCABULARY, write_config, write_record
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.state import TrainState, init_variables


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes token cache and run into a folder; returns the run's."""
    write_cache(folder / "cache")
    (folder / "run.gin").write_text(CONFIG.format(cache=folder / "cache"))
    experiment, config_text = load_experiment([str(folder / "run.gin")], [])
    length = experiment.batch.segment_length
    shapes = jax.eval_shape(lambda: init_variables(experiment.model, 1, length, jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2 + (leaf.ndim == 1), leaf.dtype), shapes
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        buffers=variables["buffers"],
        opt_state={},
        rng=jax.random.key_data(jax.random.key(0)),
        context={},
    )
    workdir = epath.Path(folder / "run")
    workdir.mkdir()
    checkpointer = Checkpointer(workdir, save_context=False, stacked_layers=experiment.model.stack.stacked_layers)
    checkpointer.save(state, rows={})
    checkpointer.wait()
    checkpointer.close()
    vocabulary = experiment.data.vocabulary
    write_record(workdir / VOCABULARY, {"name": vocabulary.name, "digest": vocabulary.digest})
    write_config(workdir, config_text)
    return folder / "run"
