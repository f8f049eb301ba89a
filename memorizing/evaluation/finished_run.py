"""A finished run: its experiment and the parameters of a checkpoint.

Evaluation, inspection and generation begin with it. `memorizing.config.runs` opens one from its workdir.
"""

from __future__ import annotations

import dataclasses

import jax
from etils import epath
from jax.sharding import Mesh

from memorizing.array_typing import Tree
from memorizing.batch import Vocabulary, text_of
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.runtime import sharding
from memorizing.runtime.workdir import VOCABULARY, read_record
from memorizing.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run and the weights of one of its checkpoints.

    Attributes:
      workdir: the run's folder.
      experiment: what was run, with the bindings that were given on opening it.
      params, buffers: host arrays in the structure of `experiment.model`.
      step: of the checkpoint.
      weights: digest of the checkpoint's checksums of parameters and buffers, hexadecimal.
      config_text: the resolved configuration as gin text.
    """

    workdir: epath.Path
    experiment: Experiment
    params: Tree
    buffers: Tree
    step: int
    weights: str
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
            trained = read_record(record)
            if trained["digest"] != vocabulary.digest:
                raise UserError(
                    f"--workdir={self.workdir} was trained with the vocabulary {trained['name']} "
                    f"({trained['digest'][:12]}), but its data now has {vocabulary.name} ({vocabulary.digest[:12]}): "
                    "name the token cache that it was trained on, --gin.CachedCorpus.path=..."
                )
        return vocabulary

    def check_data(self) -> None:
        """Checks that the data is what the model reads.

        Raises:
          UserError: it has another vocabulary, or more ids than the model knows.
        """
        num_ids, known = self.experiment.data.vocab_size, self.experiment.model.vocab_size
        if num_ids > known:
            raise UserError(
                f"--workdir={self.workdir}: its model knows {known} token ids, but its data now has {num_ids}"
            )
        _ = self.vocabulary

    def variables_on(self, mesh: Mesh) -> tuple[Tree, Tree]:
        """Parameters and buffers on the devices of a mesh, sharded as in training."""
        # They do not depend on the number of rows, but it has to fit the mesh.
        length = self.experiment.batch.segment_length
        boxed = language_model.abstract_variables(self.experiment.model, mesh.shape["data"], length)
        shardings = sharding.variable_shardings(mesh, boxed, self.experiment.mesh.parameter_rules)
        params = jax.device_put(self.params, shardings["params"])
        return params, jax.device_put(self.buffers, shardings["buffers"])
