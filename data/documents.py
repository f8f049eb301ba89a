"""What every reader of a corpus yields, and how it reports what it left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

# Stands between the files that are joined to a document. Nothing else does: no names, no marks.
SEPARATOR = "\n"


class Document(NamedTuple):
    """One whole document.

    Attributes:
      key: names the document in its corpus; unique and stable.
      text: all of it.
      metadata: what the corpus says about it; no model sees it. Where the corpus has official splits, "split" is
        "train", "validation" or "test".
    """

    key: str
    text: str
    metadata: Mapping[str, Any]


class CorpusReader(Protocol):
    """A corpus in its raw form. Readers are frozen dataclasses: plain Python that can be pickled, no TensorFlow.

    A reader counts what it leaves out, by reason, in a plain Counter, so that the counts of many processes add up. It
    counts what is damaged under a reason that names it, see `damaged`, and continues with the rest.
    """

    def shards(self) -> Sequence[str]:
        """Names of the parts that can be read independently: an archive, a repository.

        Their order depends on nothing but the corpus.

        Raises:
          DataError: the source is missing or not what the reader expects.
        """
        ...

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields the documents of a shard as they are read, in an order that depends on nothing but the corpus.

        Args:
          shard: one of `shards()`.
          skipped: counts what was left out, by reason.

        Raises:
          DataError: what every document needs is missing or damaged.
        """
        ...


_DAMAGED = "damaged: "


def damaged(name: str, why: str) -> str:
    """The reason under which a reader counts what it cannot read.

    Args:
      name: of the archive, or of its member as "ARCHIVE: MEMBER".
      why: what is wrong with it.
    """
    return f"{_DAMAGED}{name}: {why}"


def all_damage(skipped: Mapping[str, int]) -> list[str]:
    """Everything that was damaged, as "NAME: WHY"."""
    return sorted(reason.removeprefix(_DAMAGED) for reason in skipped if reason.startswith(_DAMAGED))


def reasons(skipped: Mapping[str, int]) -> dict[str, int]:
    """How much was left out by reason, sorted by reason; everything damaged counts under one reason, "damaged"."""
    counts: Counter[str] = Counter()
    for reason, count in skipped.items():
        counts["damaged" if reason.startswith(_DAMAGED) else reason] += count
    return dict(sorted(counts.items()))


def read_all(reader: CorpusReader, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Yields the documents of all shards of a corpus.

    Args:
      reader: the corpus.
      skipped: counts what was left out, by reason.
    """
    skipped = Counter() if skipped is None else skipped
    for shard in reader.shards():
        yield from reader.documents(shard, skipped)
