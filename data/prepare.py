"""`memorizing prepare`, or `python -m memorizing.data.prepare`: from a raw corpus to a token cache.

The only module that imports the ones that need TensorFlow, and it does so when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import absl.logging

from . import cache_writer, corpora, documents, paths, splits, task_name, token_cache, vocabulary
from .documents import Reader, Survey
from .errors import DataError
from .progress import Progress
from .task_name import TaskName
from .token_cache import METADATA_FILE
from .vocabulary import Vocabulary

DEFAULT_TASK = "github_spm2048"
_ERROR_PREFIX = "memorizing: "
# Byte-pair merges of a few thousand pieces change little with more text than this.
_VOCABULARY_TRAINING_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cache is made from.

    Attributes:
      task: name of the seqio Task: corpus and vocabulary.
      source: folder of the raw corpus, or "stdlib".
      output: folder of the cache.
      validation_fraction: share of the documents that is held out.
      overwrite: whether a cache that is there gives way.
    """

    task: TaskName
    source: str
    output: str
    validation_fraction: float = 0.05
    overwrite: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to its parser."""
    parser.description = "Makes a token cache, which training reads: a vocabulary, and the tokens of whole documents."
    parser.add_argument(
        "--task",
        default=DEFAULT_TASK,
        help="corpus and vocabulary, CORPUS_bytes or CORPUS_spmSIZE; "
        f"corpora: {', '.join(corpora.CORPORA)} (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        default=corpora.STANDARD_LIBRARY,
        help="folder of the raw corpus; for github a folder of repositories, or stdlib, the standard library of this "
        "Python (default: %(default)s)",
    )
    parser.add_argument(
        "--output", help="folder of the cache (default: in the user's cache folder, where training looks for it)"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=Settings.validation_fraction,
        help="share of the documents that is held out (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there")


def run(args: argparse.Namespace, bindings: Sequence[str] = ()) -> int:
    """Runs the command. Returns its exit code: 2 where a setting, the source or the output cannot be used."""
    try:
        task = task_name.parse(args.task)
        source = args.source if args.source == corpora.STANDARD_LIBRARY else os.path.abspath(args.source)
        output = args.output or paths.default_cache_path(args.task, args.source)
        prepare(Settings(task, source, output, args.validation_fraction, args.overwrite), Progress())
    except DataError as error:
        print(f"{_ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    return 0


def prepare(settings: Settings, progress: Progress) -> None:
    """Makes the cache, unless it is there; nothing that is half made is ever seen at the output.

    Raises:
      DataError: a setting, the source or the output cannot be used.
    """
    if _is_there(settings):
        progress.print(f"{settings.output} is there already; --overwrite makes it again")
        return
    reader = corpora.reader(settings.task.corpus, settings.source)
    with paths.written_whole(settings.output, METADATA_FILE, settings.overwrite) as staging:
        with progress.stage("reading documents") as advance:
            survey = documents.survey(reader, advance)
        if not survey.num_bytes:
            raise DataError(f"{settings.source!r} has no document; left out: {_listed(survey.skipped)}")
        by_split = splits.assign(survey.num_bytes, settings.validation_fraction)
        used = _make_vocabulary(settings.task, reader, survey, by_split[splits.TRAIN], progress)
        writer = cache_writer.CacheWriter(staging, used)
        _write_splits(writer, settings.task, reader, by_split, used, progress)
        described = _provenance(settings) | {"source_fingerprint": survey.fingerprint, "skipped": survey.skipped}
        metadata = writer.finish(str(settings.task), described)
    _print_summary(settings.output, metadata, progress)


def _provenance(settings: Settings) -> dict[str, Any]:
    """What a cache keeps of its settings, besides its task."""
    return {"source": settings.source, "validation_fraction": settings.validation_fraction}


def _is_there(settings: Settings) -> bool:
    """Whether the output is a cache that will do. Raises DataError where it is something else."""
    if token_cache.exists(settings.output):
        if settings.overwrite:
            return False
        metadata = token_cache.read_metadata(settings.output, str(settings.task))
        for name, value in _provenance(settings).items():
            if metadata[name] != value:
                raise DataError(
                    f"{settings.output!r} is a token cache of {name}={metadata[name]!r}, not of {value!r}; "
                    "name another place with --output, or replace it with --overwrite"
                )
        return True
    # Not even --overwrite deletes what is no cache.
    if os.path.exists(settings.output) and not (os.path.isdir(settings.output) and not os.listdir(settings.output)):
        raise DataError(f"{settings.output!r} exists and is no token cache; name another place with --output")
    return False


def _make_vocabulary(
    task: TaskName, reader: Reader, survey: Survey, train_keys: Container[str], progress: Progress
) -> Vocabulary:
    """Bytes, or SentencePiece trained on the training split only."""
    if task.num_pieces is None:
        return vocabulary.ByteVocabulary()
    num_bytes = sum(size for key, size in survey.num_bytes.items() if key in train_keys)
    every = -(-num_bytes // _VOCABULARY_TRAINING_BYTES)
    with progress.stage(f"training a vocabulary of {task.num_pieces} pieces"):
        return vocabulary.train(_sample(reader, train_keys, every), task.num_pieces)


def _sample(reader: Reader, keys: Container[str], every: int) -> Iterator[str]:
    """Every n-th line of the documents."""
    index = 0
    for document in documents.read(reader, wanted=keys):
        for line in document.text.split("\n"):
            if line and index % every == 0:
                yield line
            index += 1


def _write_splits(
    writer: cache_writer.CacheWriter,
    task: TaskName,
    reader: Reader,
    by_split: dict[str, frozenset[str]],
    used: Vocabulary,
    progress: Progress,
) -> None:
    """Corpus -> TFDS builder -> seqio Task -> token cache."""
    with progress.stage("starting TensorFlow"), _quiet_stderr():
        builders, tasks = _import_tensorflow()
    num_documents = sum(map(len, by_split.values()))
    with _quiet_stderr(), tempfile.TemporaryDirectory(dir=os.path.dirname(writer.model_path)) as directory:
        with progress.stage("writing documents", num_documents) as advance:
            builder = builders.build(task.corpus, reader, by_split, directory, advance)
        seqio_task = tasks.register(str(task), builder, used, writer.model_path)
        with progress.stage("tokenising", num_documents) as advance:
            for split in by_split:
                writer.write_split(split, _tokenised(tasks.examples(seqio_task, split), advance))


def _tokenised(
    examples: Iterator[dict[str, Any]], advance: Callable[[], None]
) -> Iterator[cache_writer.TokenisedDocument]:
    for example in examples:
        yield cache_writer.TokenisedDocument(example["doc_id"].decode(), int(example["num_bytes"]), example["targets"])
        advance()


def _import_tensorflow() -> tuple[Any, Any]:
    """Imports and returns `builders` and `tasks`, which need TensorFlow: without its chatter, away from any
    accelerator.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Not only by default: a training process that waits for this one may own the accelerator.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    from . import builders, tasks

    absl.logging.set_verbosity(absl.logging.ERROR)
    return builders, tasks


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what libraries log past Python; shows it only when the block fails unexpectedly."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        original = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except DataError:
            raise
        except Exception:
            kept.seek(0)
            os.write(original, kept.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _print_summary(output: str, metadata: dict[str, Any], progress: Progress) -> None:
    progress.print(f"left out: {_listed(metadata['skipped'])}")
    for name, counts in metadata["splits"].items():
        progress.print(
            f"{name:>10}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes"
        )
    progress.print(f"token cache of {metadata['task']}: {output}")


def _listed(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items()) or "nothing"


def main() -> int:
    """`python -m memorizing.data.prepare`."""
    parser = argparse.ArgumentParser(prog="memorizing prepare")
    add_arguments(parser)
    # An exception, so that what is half written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
