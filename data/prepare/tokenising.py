"""The second reading of a corpus: its documents become tokens, in the parts of a token cache.

The parts are written by any number of processes. The corpora with a seqio Task are tokenised by it, for which each
process starts TensorFlow once; others, and where there is no seqio, by the vocabulary itself, which gives the same
tokens. A part is done when its index is there.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from memorizing.data.documents import CorpusReader
from memorizing.data.errors import DataError
from memorizing.data.prepare.survey import ShardDigest, Survey
from memorizing.data.tasks import splits, tensorflow_start
from memorizing.data.tasks.task_name import TaskName
from memorizing.data.tokens import cache_writer, vocabulary_files
from memorizing.data.tokens.cache_writer import TokenisedDocument
from memorizing.data.tokens.vocabulary import MODEL_FILE

# Less text in a part would not be worth another start of TensorFlow.
_MIN_PART_BYTES = 32 << 20
# Even a large corpus has no more parts.
_MAX_PARTS = 1024


class Shard(NamedTuple):
    """A shard of the reader as the first reading found it.

    Attributes:
      name: what the reader calls it.
      digest: `ShardDigest.value` of its documents.
      splits: the split number of each document, an int8; `splits.NONE` where it is left out.
    """

    name: str
    digest: bytes
    splits: bytes


class Part(NamedTuple):
    """What one process tokenises at once.

    Attributes:
      number: from 0.
      shards: consecutive shards.
    """

    number: int
    shards: tuple[Shard, ...]


def parts(survey: Survey, split_numbers: Sequence[np.ndarray]) -> list[Part]:
    """Divides a corpus into parts of about the same size, which depend on nothing but the corpus.

    Args:
      survey: of the corpus.
      split_numbers: of the documents of each part of the survey.
    """
    enough = max(_MIN_PART_BYTES, survey.num_bytes // _MAX_PARTS)
    made: list[Part] = []
    shards: list[Shard] = []
    num_bytes = 0
    for part, numbers in zip(survey.parts, split_numbers, strict=True):
        ends = np.cumsum(survey.shard_documents(part.number))
        digests = survey.shard_digests(part.number)
        by_shard = np.split(numbers, ends[:-1])
        for name, digest, ours in zip(part.shards, digests, by_shard, strict=True):
            shards.append(Shard(name, digest, ours.astype(np.int8).tobytes()))
        num_bytes += survey.part_bytes(part.number)
        if num_bytes >= enough:
            made.append(Part(len(made), tuple(shards)))
            shards = []
            num_bytes = 0
    if shards:
        made.append(Part(len(made), tuple(shards)))
    return made


@dataclasses.dataclass(frozen=True)
class Tokenising:
    """The work on a part; can be pickled.

    Attributes:
      reader: of the corpus.
      task: name of the Task.
      vocabulary: `vocabulary_files.described` of it; its file lies in `directory`.
      by_seqio: whether the seqio Task of that name tokenises.
      min_tokens: documents of fewer tokens are left out, the end of the document not counted.
      directory: of the cache.
      work: folder of the parts' indices.
    """

    reader: CorpusReader
    task: TaskName
    vocabulary: Mapping[str, Any]
    by_seqio: bool
    min_tokens: int
    directory: str
    work: str

    def path(self, part: Part) -> epath.Path:
        """Where the index of a part lies."""
        return epath.Path(self.work) / f"part-{part.number:05d}.npz"

    def __call__(self, part: Part, advance: Callable[[], None]) -> None:
        """Tokenises a part.

        Args:
          part: to read.
          advance: called after each document.

        Raises:
          DataError: a document is not what the first reading found.
        """
        skipped: Counter[str] = Counter()
        documents = self._tokenised(part, skipped, advance)
        cache_writer.write_part(
            self.directory, self.path(part), part.number, self.vocabulary["size"], documents, skipped
        )

    def _tokenised(
        self, part: Part, skipped: Counter[str], advance: Callable[[], None]
    ) -> Iterator[tuple[str, TokenisedDocument]]:
        # Of the documents that were read and not yet tokenised.
        split_numbers: deque[int] = deque()
        by = self._by_seqio if self.by_seqio else self._by_vocabulary
        for document in by(lambda: self._examples(part, split_numbers)):
            split = splits.NAMES[split_numbers.popleft()]
            if document is None:
                skipped[cache_writer.CANNOT_BE_WRITTEN] += 1
            elif len(document.tokens) - 1 < self.min_tokens:
                skipped[f"fewer than {self.min_tokens} tokens"] += 1
            else:
                yield split, document
            advance()

    def _by_seqio(self, examples: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[TokenisedDocument]:
        has_model = self.task.num_pieces is not None
        model_path = os.path.join(self.directory, MODEL_FILE) if has_model else None
        for example in tensorflow_start.tasks().tokenised(self.task, model_path, examples):
            yield TokenisedDocument(example["doc_id"].decode(), int(example["num_bytes"]), example["targets"])

    def _by_vocabulary(self, examples: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[TokenisedDocument | None]:
        """Documents; None in the place of one that its tokens would not give back."""
        used = vocabulary_files.read(self.directory, self.vocabulary)
        for example in examples():
            text = example["text"].decode()
            if not vocabulary_files.can_write(used, text):
                yield None
                continue
            tokens = np.append(used.encode(text), np.int32(used.end_id))
            yield TokenisedDocument(example["doc_id"], example["num_bytes"], tokens)

    def _examples(self, part: Part, split_numbers: deque[int]) -> Iterator[dict[str, Any]]:
        for shard in part.shards:
            digest = ShardDigest()
            numbers = np.frombuffer(shard.splits, np.int8)
            # What is left out was counted in the first reading.
            for index, document in enumerate(self.reader.documents(shard.name, Counter())):
                num_bytes, _ = digest.add(document)
                if index >= len(numbers):
                    raise _changed(shard.name)
                if numbers[index] == splits.NONE:
                    continue
                split_numbers.append(int(numbers[index]))
                yield {"doc_id": document.key, "text": document.text.encode(), "num_bytes": num_bytes}
            if digest.value() != shard.digest:
                raise _changed(shard.name)


def _changed(shard: str) -> DataError:
    return DataError(f"the source has changed while it was read: {shard!r} is not what it was; prepare it again")
