"""`memorizing prepare`, or `python -m memorizing.data.prepare`: from a raw corpus to a token cache."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from etils import epath

from memorizing.data.corpora import catalogue
from memorizing.data.errors import DataError
from memorizing.data.prepare import describe, pipeline, workers
from memorizing.data.prepare.beam import Beam
from memorizing.data.prepare.pipeline import Settings
from memorizing.data.prepare.progress import PreparationProgress
from memorizing.data.prepare.workers import Processes, Workers
from memorizing.data.tasks import task_name
from memorizing.data.tokens import paths, token_cache, vocabulary_files
from memorizing.errors import Range

DEFAULT_TASK = "github_spm2048"
_ERROR_PREFIX = "memorizing: "
_READER_FLAG = "reader."

DESCRIPTION = """\
Makes a token cache, which training reads: a vocabulary, and the tokens of whole documents.

  memorizing prepare --task=arxiv_spm32000 --source=DIR --output=CACHE     vocabulary and cache of a corpus
  memorizing prepare --vocab --task=arxiv_spm32000 --source=DIR            the vocabulary alone
  memorizing prepare --task=c4_spm32000 --source=DIR --vocabulary=FILE     a cache with a vocabulary that is there
  memorizing prepare --describe=CACHE                                      what a cache holds

It is parallel over this machine's processors, and goes on where it was when it is killed and started again.

On many machines it is an Apache Beam pipeline (pip install 'memorizing[prep]'); every --beam=OPTION goes to Beam:

  memorizing prepare --task=c4_bytes --source=gs://BUCKET/c4 --output=gs://BUCKET/cache --beam=--runner=DataflowRunner
      --beam=--project=PROJECT --beam=--region=REGION --beam=--temp_location=gs://BUCKET/tmp \
--beam=--sdk_container_image=IMAGE

corpora and how to get them:
{corpora}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to its parser."""
    listed = "".join(f"  {corpus.name:<10} {corpus.archives}\n" for corpus in catalogue.CORPORA.values())
    parser.description = DESCRIPTION.format(corpora=listed)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--task",
        default=DEFAULT_TASK,
        help="corpus and vocabulary, CORPUS_bytes, CORPUS_spmSIZE or, of a tokenizer.json, CORPUS_hfSIZE; "
        f"corpora: {', '.join(catalogue.CORPORA)} (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        default=catalogue.STANDARD_LIBRARY,
        help="folder or archive of the raw corpus; for github also stdlib, the standard library of this Python; for "
        "text folders, files and patterns with commas between "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        help="folder of the cache (default: in the user's cache folder, where training looks for it); with --vocab the "
        "file of the vocabulary, with --describe that of the picture",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="a SentencePiece model, or a Hugging Face tokenizer.json, to use (default: a model is trained)",
    )
    for name, place in (("start", "stands before a document's first one"), ("end", "ends a document")):
        parser.add_argument(
            f"--{name}_token", metavar="TOKEN", help=f"of a tokenizer.json, what {place} (default: its own)"
        )
    parser.add_argument("--vocab", action="store_true", help="only train the vocabulary")
    parser.add_argument("--describe", metavar="CACHE", help="show what a token cache holds, and make nothing")
    parser.add_argument(
        "--splits",
        metavar="HOW",
        help="official, hash, or a file of lines KEY<tab>SPLIT, the splits being train, validation and test "
        "(default: official where the corpus has such, else by the hash of the key)",
    )
    parser.add_argument("--default_split", help="split of the documents that the file of splits does not name")
    parser.add_argument(
        "--validation_fraction",
        type=Range(0, 1).of(float),
        default=Settings.validation_fraction,
        help="share of the documents that is held out by hash (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=Range(1, 2**16).of(int),
        default=workers.available_processors(),
        help="how many at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--beam", metavar="OPTION", action="append", help="run as an Apache Beam pipeline with this option; repeatable"
    )
    group = parser.add_argument_group("settings of the readers")
    for name, meaning in catalogue.settings().items():
        group.add_argument(f"--{_READER_FLAG}{name}", metavar="VALUE", help=meaning.replace("%", "%%"))


def run(args: argparse.Namespace, bindings: Sequence[str] = ()) -> int:
    """Runs the command. Returns its exit code: 2 where a setting, the source or the output cannot be used."""
    try:
        if bindings:
            raise DataError(f"--gin.{bindings[0]}: prepare has no gin bindings; its settings are flags")
        if args.describe:
            describe.describe(args.describe, args.output, PreparationProgress())
        else:
            _make(args, PreparationProgress())
    except DataError as error:
        print(f"{_ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_ERROR_PREFIX}stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _make(args: argparse.Namespace, progress: PreparationProgress) -> None:
    task = task_name.parse(args.task, args.source)
    settings = Settings(
        task=task,
        source=catalogue.absolute(task.corpus, args.source),
        reader_settings={
            name: value for name in catalogue.settings() if (value := getattr(args, _READER_FLAG + name)) is not None
        },
        splits=args.splits,
        default_split=args.default_split,
        validation_fraction=args.validation_fraction,
        vocabulary_file=args.vocabulary,
        start_token=args.start_token,
        end_token=args.end_token,
    )
    chosen: Workers = Processes(args.processes) if args.beam is None else Beam(args.beam)
    if args.vocab:
        output = args.output or paths.vocabulary_path(task.num_pieces or 0)
        if epath.Path(output).exists() and not args.overwrite:
            raise DataError(
                f"{output!r} is there already; name another file with --output, or replace it with --overwrite"
            )
        pipeline.make_vocabulary(settings, output, chosen, progress)
        return
    output = args.output or paths.default_cache_path(str(task), args.source, args.vocabulary)
    if not args.overwrite and _is_there(settings, output):
        progress.print(f"{output} is there already; --overwrite makes it again")
        return
    _check_replaceable(output)
    pipeline.make_cache(settings, output, chosen, progress, args.overwrite)


def _is_there(settings: Settings, output: str) -> bool:
    """Whether the output is already a cache of these settings.

    Raises:
      DataError: it is a cache of other settings.
    """
    if not token_cache.exists(output):
        return False
    metadata = token_cache.read_metadata(output, str(settings.task))
    expected = settings.provenance
    if settings.vocabulary_file:
        loaded = vocabulary_files.load(settings.vocabulary_file, settings.start_token, settings.end_token)
        if loaded.digest != metadata["vocabulary"]["digest"]:
            raise DataError(
                f"{output!r} is a token cache of another vocabulary than {settings.vocabulary_file}; "
                "name another place with --output, or replace it with --overwrite"
            )
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise DataError(
                f"{output!r} is a token cache of {name}={metadata.get(name)!r}, not of {value!r}; "
                "name another place with --output, or replace it with --overwrite"
            )
    return True


def _check_replaceable(output: str) -> None:
    """Raises DataError where the output is something that not even --overwrite may delete."""
    if token_cache.exists(output) or paths.is_remote(output) or not os.path.exists(output):
        return
    if not os.path.isdir(output) or os.listdir(output):
        raise DataError(f"{output!r} exists and is no token cache; name another place with --output")


def main() -> int:
    """`python -m memorizing.data.prepare`."""
    parser = argparse.ArgumentParser(prog="memorizing prepare")
    add_arguments(parser)
    return run(parser.parse_args())
