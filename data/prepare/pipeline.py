"""From a raw corpus to a vocabulary, and to a token cache.

The corpus is read twice, part by part, by any number of workers. The first reading (`survey`) finds out what documents
there are and takes a sample of their text. Then the splits are known, and a vocabulary is trained on the training
documents. The second reading (`tokenising`) writes the tokens. Finished parts are in a folder beside the output (see
`staging`), so that a run that was killed and is started again continues with the parts that are missing.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath

from memorizing.data import documents
from memorizing.data.corpora import catalogue
from memorizing.data.documents import CorpusReader
from memorizing.data.errors import DataError
from memorizing.data.prepare import survey, tokenising
from memorizing.data.prepare.progress import PreparationProgress
from memorizing.data.prepare.survey import Survey, Surveying
from memorizing.data.prepare.text_sample import max_bytes_of_part
from memorizing.data.prepare.tokenising import Tokenising
from memorizing.data.prepare.workers import Workers
from memorizing.data.tasks import splits, task_name, tensorflow_start
from memorizing.data.tasks.splits import FileSplits, SplitRule
from memorizing.data.tasks.task_name import TaskName
from memorizing.data.tokens import cache_writer, staging, vocabulary, vocabulary_files
from memorizing.data.tokens.staging import Staging
from memorizing.data.tokens.token_cache import METADATA_FILE
from memorizing.data.tokens.vocabulary import Vocabulary

_MAX_PARTS = 1024
_DUPLICATE = "duplicate"
# Keys among which the nearest to a wrong one is looked for.
_MAX_COMPARED = 20_000
# Size of the text to train a vocabulary on. Byte-pair merges change little with more than this for each piece.
_MIN_SAMPLE_BYTES = 4 << 20
_SAMPLE_BYTES_PER_PIECE = 2 << 10

_Part = TypeVar("_Part", survey.Part, tokenising.Part, contravariant=True)


class _Work(Protocol[_Part]):
    """`Surveying` or `Tokenising`: what one process does with one part at a time."""

    def path(self, part: _Part) -> epath.Path:
        """Where the file is that the work on a part leaves."""
        ...

    def __call__(self, part: _Part, advance: Callable[[], None]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cache is made from.

    Attributes:
      task: name of the seqio Task: corpus and vocabulary.
      source: of the raw corpus: a folder, an archive, or "stdlib".
      reader_settings: fields of the reader by name, as text.
      splits: "official", "hash", the path of a file, or None: official ones where the corpus has such.
      default_split: of the documents that the file does not name.
      validation_fraction: share of the documents that is held out by hash.
      vocabulary_file: a SentencePiece model or a `tokenizer.json` to use; None: a SentencePiece model is trained.
      start_token, end_token: of a `tokenizer.json`, where others than its own stand before a document and end it.
    """

    task: TaskName
    source: str
    reader_settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    splits: str | None = None
    default_split: str | None = None
    validation_fraction: float = 0.05
    vocabulary_file: str | None = None
    start_token: str | None = None
    end_token: str | None = None

    @property
    def split_rule(self) -> str:
        """`splits`, resolved."""
        return self.splits or (splits.OFFICIAL if self.corpus.official_splits else splits.HASH)

    @property
    def by_seqio(self) -> bool:
        """Whether there is a seqio Task, which tokenises: for published corpora and seqio's own vocabularies."""
        return self.corpus.is_published and self.task.kind == task_name.SENTENCEPIECE

    @property
    def corpus(self) -> catalogue.Corpus:
        """Raises DataError where there is no such corpus."""
        return catalogue.find(self.task.corpus)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a cache records of these settings, to be compared with those of a later call; JSON-able."""
        by_hash = self.split_rule == splits.HASH
        by_file = self.split_rule not in (splits.HASH, splits.OFFICIAL)
        return {
            "source": self.source,
            "reader_settings": dict(sorted(self.reader_settings.items())),
            "splits_by": self.split_rule,
            "validation_fraction": self.validation_fraction if by_hash else None,
            "default_split": self.default_split if by_file else None,
            "min_tokens": self.corpus.min_tokens,
        }


def make_cache(
    settings: Settings, output: str, workers: Workers, progress: PreparationProgress, replace: bool = False
) -> None:
    """Makes a token cache. An unfinished one is never visible at the output.

    Args:
      settings: what it is made from.
      output: its folder, which is no cache yet unless `replace`.
      workers: what reads the corpus.
      progress: shows what is done.
      replace: whether to replace a cache that exists.

    Raises:
      DataError: a setting, the source or the output cannot be used.
    """
    preparation = _Preparation(settings, workers, progress)
    with staging.staged(output, METADATA_FILE, preparation.plan, replace, preparation.wait_for(output)) as staged:
        if staged is None:
            progress.print(f"{output} was made by another process")
            return
        surveyed = preparation.survey(staged)
        rule, split_numbers = preparation.divide(surveyed)
        used = preparation.vocabulary(staged, surveyed, split_numbers)
        index_paths = preparation.tokenise(staged, surveyed, split_numbers, used)
        skipped = Counter(surveyed.skipped)
        for path in index_paths:
            skipped.update(cache_writer.notes(path))
        described = settings.provenance | {
            "splits_rule": rule.described(),
            "reader": _described(preparation.reader),
            "source_fingerprint": surveyed.fingerprint,
            "licence": settings.corpus.licence,
            "citation": settings.corpus.citation,
            "skipped": documents.reasons(skipped),
            "damaged": documents.all_damage(skipped),
        }
        names = [name for name, count in splits.count(split_numbers).items() if count]
        metadata = cache_writer.join(staged.path, index_paths, names, str(settings.task), used, described)
        num_documents = {name: counts["documents"] for name, counts in metadata["splits"].items()}
        splits.check_none_empty(num_documents, metadata["skipped"])
    print_summary(output, metadata, progress)


def make_vocabulary(settings: Settings, output: str, workers: Workers, progress: PreparationProgress) -> None:
    """Trains a SentencePiece model on the training documents of a corpus, and writes it to the file `output`.

    Raises:
      DataError: a setting, the source or the output cannot be used.
    """
    if settings.task.num_pieces is None or settings.task.kind != task_name.SENTENCEPIECE:
        reason = "bytes need no vocabulary" if settings.task.num_pieces is None else "it is another's vocabulary"
        raise DataError(
            f"--vocab --task={settings.task}: {reason}, only those of SentencePiece are trained; "
            f"give {settings.task.corpus}_spm32000"
        )
    preparation = _Preparation(settings, workers, progress)
    with staging.scratch(output, preparation.plan, preparation.wait_for(output)) as staged:
        surveyed = preparation.survey(staged)
        _, split_numbers = preparation.divide(surveyed)
        used = preparation.vocabulary(staged, surveyed, split_numbers)
        # Tasks of other vocabularies were refused above.
        assert isinstance(used, vocabulary.SentencePieceVocabulary)
        staging.save(output, used.model)
    progress.print(f"vocabulary of {used.size} pieces: {output}")


class _Preparation:
    """The steps, each of which does only what has not been done yet."""

    def __init__(self, settings: Settings, workers: Workers, progress: PreparationProgress) -> None:
        """Raises DataError where a setting or the source cannot be used."""
        splits.check_fraction(settings.validation_fraction)
        self.settings = settings
        self._workers = workers
        self._progress = progress
        self.reader = catalogue.reader(settings.task.corpus, settings.source, settings.reader_settings)
        self._given = _given_vocabulary(settings)
        self._parts = survey.parts(self.reader.shards(), _MAX_PARTS)
        by_file = settings.split_rule not in (splits.HASH, splits.OFFICIAL)
        self._file_splits = splits.from_file(settings.split_rule, settings.default_split) if by_file else None

    @property
    def plan(self) -> dict[str, Any]:
        """What is made. Work that was begun with another plan is of no use."""
        return self.settings.provenance | {
            "task": str(self.settings.task),
            "reader": _described(self.reader),
            "splits": self._file_splits.described() if self._file_splits else None,
            "vocabulary": self._given.digest if self._given else None,
            "shards": [part.shards for part in self._parts],
        }

    def wait_for(self, output: str) -> Callable[[], None]:
        return lambda: self._progress.print(f"waiting for another process, which is making {output}")

    def survey(self, staged: Staging) -> Survey:
        """The first reading."""
        sample_bytes = 0 if self._given else max_bytes_of_part(self._sample_bytes, max(len(self._parts), 1))
        work = Surveying(self.reader, os.fspath(staged.work), sample_bytes)
        self._run("reading documents", work, self._parts, None)
        found = Survey(work, self._parts)
        skipped = documents.reasons(found.skipped)
        for name in documents.all_damage(found.skipped):
            self._progress.print(f"damaged: {name}")
        if not found.num_documents:
            raise DataError(f"{self.settings.source!r} has no document; left out: {listed(skipped)}")
        return found

    def divide(self, surveyed: Survey) -> tuple[SplitRule, list[np.ndarray]]:
        """The rule of the splits, and the split numbers of the documents of each part of the survey."""
        by = self.settings.split_rule
        rule: SplitRule
        left_out = self._left_out(surveyed)
        if self._file_splits:
            rule = self._file_splits
            self._check_all_found(rule, surveyed)
        elif by == splits.OFFICIAL:
            rule = splits.OfficialSplits()
        else:
            hashes = surveyed.hashes if left_out is None else surveyed.hashes[~np.concatenate(left_out)]
            rule = splits.by_rank(hashes, self.settings.validation_fraction)
        numbers = surveyed.split_numbers(rule)
        if left_out is not None:
            for of_part, is_left_out in zip(numbers, left_out, strict=True):
                of_part[is_left_out] = splits.NONE
        splits.check_none_empty(splits.count(numbers), documents.reasons(surveyed.skipped))
        return rule, numbers

    def _left_out(self, surveyed: Survey) -> list[np.ndarray] | None:
        """Of each part, which documents are left out now that all are known, bool [documents]; None for none."""
        if getattr(self.reader, "keep_duplicates", True):
            return None
        repeated = surveyed.repeated()
        count = sum(int(part.sum()) for part in repeated)
        if count:
            surveyed.skipped[_DUPLICATE] = count
        return repeated

    def _check_all_found(self, rule: FileSplits, surveyed: Survey) -> None:
        """Says which keys of the file of splits are those of no document.

        Raises:
          DataError: a document was to be held out: under another key it would be trained on.
        """
        missing = rule.without_document(surveyed.hashes)
        if not missing:
            return
        first = missing[0]
        keys = itertools.chain.from_iterable(surveyed.keys(number) for number in range(len(surveyed.parts)))
        nearest = difflib.get_close_matches(first, itertools.islice(keys, _MAX_COMPARED), n=1, cutoff=0)
        told = (
            f"keys in {self.settings.split_rule} that no document has: {len(missing):,}, such as {first!r}; the nearest is "
            f"{nearest[0]!r}"
        )
        if rule.by_key[first] != splits.NAMES.index(splits.TRAIN):
            raise DataError(f"{told}: what is to be held out has to be found; correct the file, or delete the line")
        self._progress.print(told)

    def vocabulary(self, staged: Staging, surveyed: Survey, split_numbers: Sequence[np.ndarray]) -> Vocabulary:
        """Bytes, the vocabulary that the user gave, or one that is trained on the training documents only."""
        if self._given:
            vocabulary_files.save(self._given, staged.path)
            return self._given
        num_pieces = self.settings.task.num_pieces
        # For bytes the vocabulary is given.
        assert num_pieces is not None
        path = staged.path / vocabulary.MODEL_FILE
        if not path.exists():
            with self._progress.stage(f"training a vocabulary of {num_pieces} pieces"):
                lines = surveyed.sample_lines(split_numbers, self._sample_bytes)
                staging.save(path, vocabulary.train(lines, num_pieces).model)
        return vocabulary.SentencePieceVocabulary(path.read_bytes())

    def tokenise(
        self, staged: Staging, surveyed: Survey, split_numbers: Sequence[np.ndarray], used: Vocabulary
    ) -> list[Any]:
        """The second reading. Returns the indices of all parts, in order."""
        missing = tensorflow_start.missing() if self.settings.by_seqio else None
        if missing:
            self._progress.print(f"{missing} is not installed: tokenising without the seqio Task, to the same tokens")
        work = Tokenising(
            reader=self.reader,
            task=self.settings.task,
            vocabulary=vocabulary_files.described(used),
            by_seqio=self.settings.by_seqio and not missing,
            min_tokens=self.settings.corpus.min_tokens,
            directory=os.fspath(staged.path),
            work=os.fspath(staged.work),
        )
        parts = tokenising.parts(surveyed, split_numbers)
        self._run("tokenising", work, parts, sum(splits.count(split_numbers).values()))
        return [work.path(part) for part in parts]

    @property
    def _sample_bytes(self) -> int:
        return max(_MIN_SAMPLE_BYTES, _SAMPLE_BYTES_PER_PIECE * (self.settings.task.num_pieces or 0))

    def _run(self, name: str, work: _Work[_Part], parts: Sequence[_Part], total: int | None) -> None:
        """Does the work on the parts whose files are missing."""
        missing = [part for part in parts if not work.path(part).exists()]
        if len(missing) < len(parts):
            self._progress.print(f"{name}: {len(parts) - len(missing)} of {len(parts)} parts were done before")
            total = None
        with self._progress.stage(name, total) as advance:
            self._workers.run(work, missing, advance)


def _given_vocabulary(settings: Settings) -> Vocabulary | None:
    """The vocabulary, or None where one has to be trained."""
    if settings.task.num_pieces is None:
        if settings.vocabulary_file:
            raise DataError(
                f"--vocabulary={settings.vocabulary_file}: {settings.task} is of bytes; "
                f"give --task={settings.task.corpus}_spmSIZE"
            )
        return vocabulary.ByteVocabulary()
    if settings.vocabulary_file is None:
        if settings.task.kind != task_name.SENTENCEPIECE:
            raise DataError(f"--task={settings.task}: name the tokenizer, --vocabulary=FOLDER/tokenizer.json")
        return None
    loaded = vocabulary_files.load(settings.vocabulary_file, settings.start_token, settings.end_token)
    if loaded.name != settings.task.vocabulary:
        raise DataError(
            f"--vocabulary={settings.vocabulary_file} has {loaded.size} pieces: give "
            f"--task={settings.task.corpus}_{loaded.name}, or another vocabulary"
        )
    return loaded


def _described(reader: CorpusReader) -> dict[str, Any]:
    """All settings of a reader, JSON-able."""
    described: dict[str, Any] = {"class": type(reader).__name__}
    # All readers are dataclasses, which a protocol cannot say.
    for field in dataclasses.fields(reader):  # pyright: ignore[reportArgumentType]
        value = getattr(reader, field.name)
        described[field.name] = list(value) if isinstance(value, tuple) else value
    return described


def print_summary(output: str, metadata: Mapping[str, Any], progress: PreparationProgress) -> None:
    """Prints what a cache holds."""
    progress.print(f"left out: {listed(metadata['skipped'])}")
    for name, counts in metadata["splits"].items():
        progress.print(
            f"{name:>10}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes"
        )
    progress.print(f"token cache of {metadata['task']}: {output}")


def listed(skipped: Mapping[str, int]) -> str:
    """What was left out, in a line."""
    return ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items()) or "nothing"
