"""Names of Tasks: the corpus and the vocabulary, such as `github_bytes`, `github_spm2048` and `text_hf49152`."""

from __future__ import annotations

import dataclasses
import re

from memorizing.data.corpora.catalogue import STANDARD_LIBRARY
from memorizing.data.errors import DataError

SENTENCEPIECE = "spm"
# A Hugging Face `tokenizer.json`.
TOKENIZER = "hf"

_PATTERN = re.compile(r"(?:(?P<corpus>[a-z0-9]+)_)?(?:bytes|(?P<kind>spm|hf)(?P<pieces>[1-9][0-9]*))")


@dataclasses.dataclass(frozen=True)
class TaskName:
    """A parsed name.

    Attributes:
      corpus: name of the corpus.
      num_pieces: size of the vocabulary, or None for bytes.
      kind: of the vocabulary, `SENTENCEPIECE` or `TOKENIZER`.
    """

    corpus: str
    num_pieces: int | None
    kind: str = SENTENCEPIECE

    def __str__(self) -> str:
        return f"{self.corpus}_{self.vocabulary}"

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary, as `Vocabulary.name`."""
        return "bytes" if self.num_pieces is None else f"{self.kind}{self.num_pieces}"


def parse(name: str, source: str | None = None) -> TaskName:
    """Reads a Task's name.

    Args:
      name: a corpus and a vocabulary; or a vocabulary alone.
      source: of the corpus; None for the standard library. It says which corpus a name without one is of: the standard
        library is read as `github`, anything else as `text`.

    Raises:
      DataError: it is no such name.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise DataError(
            f"task={name!r}: give CORPUS_bytes, CORPUS_spmSIZE or CORPUS_hfSIZE, such as github_bytes or github_spm2048"
        )
    corpus = match["corpus"] or ("github" if source in (None, STANDARD_LIBRARY) else "text")
    return TaskName(corpus, int(match["pieces"]) if match["pieces"] else None, match["kind"] or SENTENCEPIECE)
