"""The command `inspect`: a page that shows what the memory of a finished run did for one document."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from memorizing.batch import DataSource, text_of
from memorizing.commands import experiment_flags
from memorizing.config.runs import open_run
from memorizing.errors import UserError
from memorizing.evaluation import plots
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.evaluation.inspection import lookups as inspection_lib
from memorizing.evaluation.inspection import page as inspection_page
from memorizing.evaluation.inspection.lookups import Inspection, inspect
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE

FOLDER = "inspection"
MAX_TOKENS = 100_000

DESCRIPTION = f"""\
Reads a document with two memories and the same weights, and writes one HTML page: the text, every token coloured by how much the larger memory helped it; the gate of every
head; and for a chosen token the neighbours that each head found, with score, weight, distance and the text around them. The page needs no network and no other file.

  memorizing inspect                                      the demo's run, with its memory and with none, on the longest held-out document
  memorizing inspect --workdir=DIR --document=KEY         a held-out document by its name (or a part of it that only one has)
  memorizing inspect --workdir=DIR --document=FILE        any file of UTF-8 text
  memorizing inspect --workdir=DIR --memory_sizes=8192,32768    two memories, neither of which has to be that of training

Of a document of more than {MAX_TOKENS:,} tokens the first {MAX_TOKENS:,} are read, unless --max_tokens says otherwise. The page and its pictures are written to
WORKDIR/inspection.
"""


class Document(NamedTuple):
    """What is inspected.

    Attributes:
      name: what it is called.
      tokens: int32 [tokens].
      pieces: UTF-8 text of each token.
    """

    name: str
    tokens: np.ndarray
    pieces: list[bytes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    parser.add_argument("--document", metavar="KEY|FILE", help="what to read (default: the longest held-out document)")
    parser.add_argument(
        "--memory_sizes",
        metavar="A,B",
        help="the smaller and the larger memory in tokens, 0 for none (default: 0 and the run's own)",
    )
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"(default: {MAX_TOKENS:,})")


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if options.max_tokens < 1:
        raise UserError(f"--max_tokens={options.max_tokens}: at least 1")
    experiment_flags.use_devices(1)
    finished = open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings)
    sizes = _memory_sizes(finished, options.memory_sizes)
    finished.check_data()
    document = _document(finished, options.document)
    whole = len(document.tokens)
    document = Document(document.name, document.tokens[: options.max_tokens], document.pieces[: options.max_tokens])
    print(
        f"{document.name}: {len(document.tokens):,} of {whole:,} tokens, with memories of {sizes[0]:,} and {sizes[1]:,}",
        flush=True,
    )
    progress = _Progress(2 * len(document.tokens))
    params, buffers = jax.device_put((finished.params, finished.buffers))
    inspection = inspect(
        finished.experiment.model,
        params,
        buffers,
        inspection_lib.Document(document.tokens, finished.experiment.data.start_id),
        sizes,
        finished.experiment.batch.segment_length,
        progress.advance,
    )
    progress.end()
    print(_write(finished, document, inspection, whole))
    return 0


def _write(finished: FinishedRun, document: Document, inspection: Inspection, whole: int) -> str:
    gain, (smaller, larger) = inspection.gain, inspection.memory_sizes
    mean, best = f"{gain.mean():+.4f}", f"{gain.max():+.2f}"
    pictures = {
        "delta_by_position.png": (
            plots.gain_by_position(inspection),
            f"How much the larger memory helped each token, by position (figure 7 of the paper). Mean {mean} nats.",
        ),
        "distances.png": (
            plots.distances(inspection),
            "How far back the retrieved neighbours lie, beside all that lay in the memory.",
        ),
        "attention_by_age.png": (
            plots.mass_by_age(inspection),
            "Share of each head's attention by the age of the memory.",
        ),
    }
    read = (
        f"the first {len(document.tokens):,} of its {whole:,} tokens"
        if len(document.tokens) < whole
        else f"all {whole:,} tokens"
    )
    facts = {
        "read": read,
        "run": f"{finished.workdir}, step {finished.step}",
        "data": finished.experiment.data.identity,
        "segments": f"of {inspection.segment_length:,} tokens; a token looks up what stands in earlier segments only",
    }
    page = inspection_page.make(
        document.name,
        inspection,
        document.pieces,
        facts,
        {caption: (png, f"Plot: {caption}") for png, caption in pictures.values()},
    )
    folder = finished.workdir / FOLDER / (re.sub(r"[^\w.-]+", "-", document.name)[-80:] or "document")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (png, _) in pictures.items():
            (folder / name).write_bytes(png)
        (folder / "index.html").write_text(page)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    return (
        f"mean loss {inspection.nats[0].mean():.4f} with memory {smaller:,}, {inspection.nats[1].mean():.4f} with {larger:,} "
        f"(difference {mean}, the most for one token {best})\n"
        f"written to {folder}: index.html ({len(page.encode()) / 1e6:.1f} MB), {', '.join(pictures)}"
    )


def _memory_sizes(finished: FinishedRun, given: str | None) -> tuple[int, int]:
    model, length = finished.experiment.model, finished.experiment.batch.segment_length
    if not model.has_memory:
        raise UserError(f"the model of {finished.workdir} has no external memory: there is nothing to look into")
    if not model.memory_sizes.keys() - {CONTINUOUS_CACHE}:
        raise UserError(
            f"the only memory of the model of {finished.workdir} is its continuous cache: what is shown are the look-ups "
            "of layers"
        )
    if given is None:
        return 0, model.memory_size
    sizes = [size.strip() for size in given.split(",")]
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes) or not int(sizes[0]) < int(sizes[1]):
        raise UserError(f"--memory_sizes={given}: a smaller and a larger number of tokens, such as 0,2048")
    for size in filter(None, map(int, sizes)):
        try:
            model.with_memory_size(size).check(length)
        except UserError as error:
            raise UserError(f"--memory_sizes={given}: {error}") from None
    return int(sizes[0]), int(sizes[1])


def _document(finished: FinishedRun, given: str | None) -> Document:
    data = finished.experiment.data
    text = text_of(data)
    if text is None:
        return _tokens_only(data, given, finished.experiment.batch.segment_length)
    keys = list(text.document_keys())
    if given is None:
        index = int(np.argmax(data.document_bytes))
    elif given in keys:
        index = keys.index(given)
    else:
        matches = [index for index, key in enumerate(keys) if given in key]
        if len(matches) != 1 or epath.Path(given).expanduser().exists():
            return _file(given, keys, finished)
        (index,) = matches
    tokens = text.document_tokens(index)
    return Document(keys[index], tokens, text.vocabulary.pieces(tokens))


def _file(path: str, keys: Sequence[str], finished: FinishedRun) -> Document:
    file = epath.Path(path).expanduser()
    if not file.is_file():
        nearest = difflib.get_close_matches(path, keys, n=3, cutoff=0) or keys[:3]
        raise UserError(
            f"--document={path}: there is no such file, and no one held-out document of that name; there are {len(keys)}, such as {', '.join(nearest)}"
        )
    try:
        content = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--document={path} is no UTF-8 text (byte {error.start}): give a text file") from None
    except OSError as error:
        raise UserError(f"--document={path}: cannot be read ({error.strerror or error})") from None
    if "\0" in content:
        raise UserError(f"--document={path} is no text (it has zero bytes): give a text file")
    if not content.strip():
        raise UserError(f"--document={path} is empty: there is nothing to read")
    vocabulary = finished.vocabulary
    tokens = vocabulary.encode(content)
    return Document(file.name, tokens, vocabulary.pieces(tokens))


def _tokens_only(data: DataSource, given: str | None, segment_length: int) -> Document:
    """A held-out document of data that is no text, by its number; ids stand for text."""
    number = int(given) if given and given.isdecimal() else 0
    if given and not (given.isdecimal() and number < data.num_eval_documents):
        raise UserError(
            f"--document={given}: this data is no text; give a number from 0 to {data.num_eval_documents - 1}"
        )
    parts = []
    for batch, document, _ in data.evaluation_batches(data.num_eval_documents, segment_length):
        parts += [batch.targets[row, 0][batch.is_real[row, 0]] for row in np.flatnonzero(document == number)]
    tokens = np.concatenate(parts)
    return Document(f"document {number}", tokens, [f"{token} ".encode() for token in tokens.tolist()])


class _Progress:
    """A live line on a terminal, and nothing in a log."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._live = total, 0, sys.stdout.isatty()

    def advance(self, tokens: int) -> None:
        self._done += tokens
        if self._live:
            print(f"\r\x1b[Kread {self._done / self._total:.0%}", end="", flush=True)

    def end(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", flush=True)
