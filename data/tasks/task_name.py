"""Names of seqio Tasks: the corpus and the vocabulary, such as `github_bytes` and `github_spm2048`."""

from __future__ import annotations

import dataclasses
import re

from memorizing.data.errors import DataError

_PATTERN = re.compile(r"(?P<corpus>[a-z0-9]+)_(?:bytes|spm(?P<pieces>[1-9][0-9]*))")


@dataclasses.dataclass(frozen=True)
class TaskName:
    """A parsed name.

    Attributes:
      corpus: name of the corpus.
      num_pieces: size of the SentencePiece vocabulary, or None for bytes.
    """

    corpus: str
    num_pieces: int | None

    def __str__(self) -> str:
        return f"{self.corpus}_{self.vocabulary}"

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary, as `Vocabulary.name`."""
        return "bytes" if self.num_pieces is None else f"spm{self.num_pieces}"


def parse(name: str) -> TaskName:
    """Reads a Task's name.

    Raises:
      DataError: it is not a corpus and a vocabulary.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise DataError(f"task={name!r}: give CORPUS_bytes or CORPUS_spmSIZE, such as github_bytes or github_spm2048")
    return TaskName(match["corpus"], int(match["pieces"]) if match["pieces"] else None)
