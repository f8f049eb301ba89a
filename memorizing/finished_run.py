"""A finished run, opened from its workdir: its experiment, and the parameters of a checkpoint. What evaluation, inspection and generation begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from memorizing import sharding
from memorizing.array_typing import Tree
from memorizing.batch import Vocabulary, text_of
from memorizing.checkpoint import read_arrays
from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.experiment import Experiment
from memorizing.train_state import init_params
from memorizing.transfer import fit
from memorizing.workdir import CONFIG, VOCABULARY, read_record, resolve


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run and the weights of one of its checkpoints.

    Attributes:
      workdir: the run's folder.
      experiment: what was run, with the bindings that were given on opening it.
      params: float32 host arrays in the structure of `experiment.model`.
      step: of the checkpoint.
      config_text: the resolved configuration as gin text.
    """

    workdir: epath.Path
    experiment: Experiment
    params: Tree
    step: int
    config_text: str

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Text to ids and back, or None where the data is not text.

        Raises:
          UserError: the data has another vocabulary than the run was trained with.
        """
        text = text_of(self.experiment.data)
        if text is None:
            return None
        vocabulary = text.vocabulary
        record = self.workdir / VOCABULARY
        if record.exists():
            trained = read_record(record, "name", "digest")
            if trained["digest"] != vocabulary.digest:
                raise UserError(
                    f"--workdir={self.workdir} was trained with the vocabulary {trained['name']} ({trained['digest'][:12]}), but its data now has "
                    f"{vocabulary.name} ({vocabulary.digest[:12]}): name the token cache that it was trained on, --gin.CachedCorpus.path=..."
                )
        return vocabulary

    def check_data(self) -> None:
        """Raises UserError where the data is not what the model reads: another vocabulary, or more ids than it knows."""
        num_ids, known = self.experiment.data.vocab_size, self.experiment.model.vocab_size
        if num_ids > known:
            raise UserError(
                f"--workdir={self.workdir}: its model knows {known} token ids, but its data now has {num_ids}"
            )
        _ = self.vocabulary

    def params_on(self, mesh: Mesh) -> Tree:
        """The parameters on the devices of a mesh, sharded as in training."""
        boxed = _boxed_params(self.experiment, mesh.shape["data"])
        return jax.device_put(
            self.params, sharding.parameter_shardings(mesh, boxed, self.experiment.mesh.parameter_rules)
        )


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
            f"--workdir={workdir} holds no run: there is no {config}; train one with memorizing train --workdir={workdir}"
        )
    experiment, text = load_experiment([], bindings, base=config.read_text())
    saved = read_arrays(folder, step, only=("params/", "step"))
    wanted = {"params": nn.unbox(_boxed_params(experiment, 1))}
    params = fit(wanted, saved, f"--workdir={workdir}")["params"]
    return FinishedRun(folder, experiment, params, int(saved["step"]), text)


def _boxed_params(experiment: Experiment, num_rows: int) -> Tree:
    """Shapes and logical axes of the parameters, which do not depend on the rows; these only have to fit the mesh that is set."""
    length = experiment.batch.segment_length
    return jax.eval_shape(lambda: init_params(experiment.model, num_rows, length, jax.random.key(0)))
