"""memorizing: language models that remember. Importing the package loads nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memorizing.generation.text_model import TextModel

__version__ = "0.1.0"


def load(workdir: str, step: int | None = None, bindings: Sequence[str] = ()) -> TextModel:
    """Opens a finished run as a model that scores texts and writes on: see `memorizing.generation.text_model`.

    Args:
      workdir: folder that `memorizing train` has written.
      step: of the checkpoint; None for the newest.
      bindings: gin bindings over the run's own configuration, such as `KNNAttention.memory_size=65536`.

    Raises:
      memorizing.errors.UserError: there is no run or no checkpoint, or it is not a model of text.
    """
    from memorizing.config.runs import open_run
    from memorizing.generation.text_model import TextModel

    return TextModel(open_run(workdir, step, bindings))
