"""The command `inspect`: pages that show what a finished run's memory and attention did for one document."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from memorizing.array_typing import Tree
from memorizing.batch import DataSource, Vocabulary, text_of
from memorizing.commands import experiment_flags
from memorizing.commands.documents import longest_document, read_text
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation import plots
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.evaluation.inspection.attention import read_attention, tells_attention
from memorizing.evaluation.inspection.attention_page import make_attention_page
from memorizing.evaluation.inspection.document import DocumentTokens
from memorizing.evaluation.inspection.lookups import Inspection, Lookups, inspect, recall_of
from memorizing.evaluation.inspection.page import make_page
from memorizing.runtime.json_lines import replace_bytes, replace_text
from memorizing.runtime.progress import bar

FOLDER = "inspection"
ATTENTION_PAGE = "attention.html"
MAX_TOKENS = 100_000

DESCRIPTION = f"""\
Reads a document with two memories and the same weights, and writes one HTML page: the text, every token coloured by how much the larger memory helped it; the gate of every
head; and for a chosen token the neighbours that each head found, with score, weight, distance and the text around them. The page needs no network and no other file.

  memorizing inspect                                      the demo's run, with its memory and with none, on the longest held-out document
  memorizing inspect --workdir=DIR --document=KEY         a held-out document by its name (or a part of it that only one has)
  memorizing inspect --workdir=DIR --document=FILE        any file of UTF-8 text
  memorizing inspect --workdir=DIR --memory_sizes=8192,32768    two memories, neither of which has to be that of training

Where layers tell what they attended to within a segment (by pattern, hash or cluster), a second page, attention.html, shows it for every token; without a memory it is the only one.

Of a document of more than {MAX_TOKENS:,} tokens the first {MAX_TOKENS:,} are read, unless --max_tokens says otherwise. The page and its pictures are written to
WORKDIR/inspection.
"""


class NamedDocument(NamedTuple):
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
    parser.add_argument(
        "--max_tokens", type=Range(1, MOST).of(int), default=MAX_TOKENS, metavar="N", help=f"(default: {MAX_TOKENS:,})"
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    experiment_flags.use_devices(1)
    finished = open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings)
    model = finished.experiment.model
    if not model.has_memory and not tells_attention(model):
        raise UserError(
            f"the model of {finished.workdir} has no external memory, and its attention tells nothing: there is "
            "nothing to look into"
        )
    if options.memory_sizes and not model.has_memory:
        raise UserError(
            f"--memory_sizes={options.memory_sizes}: the model of {finished.workdir} has no external memory; leave the "
            "flag out"
        )
    sizes = _memory_sizes(finished, options.memory_sizes) if model.has_memory else None
    finished.check_data()
    whole = _document(finished, options.document)
    document = NamedDocument(whole.name, whole.tokens[: options.max_tokens], whole.pieces[: options.max_tokens])
    params, buffers = jax.device_put((finished.params, finished.buffers))
    if sizes:
        print(_inspect_memory(finished, params, buffers, document, sizes, len(whole.tokens)))
    if tells_attention(model):
        print(_inspect_attention(finished, params, buffers, document, len(whole.tokens)))
    return 0


def _inspect_memory(
    finished: FinishedRun,
    params: Tree,
    buffers: Tree,
    document: NamedDocument,
    sizes: tuple[int, int],
    num_tokens: int,
) -> str:
    """Reads with two memories, and writes the page about them.

    Args:
      finished, params, buffers: the run.
      document: what is read of the document.
      sizes: of the memories.
      num_tokens: of the whole document.

    Returns:
      What to print.
    """
    smaller, larger = sizes
    num_read = len(document.tokens)
    print(
        f"{document.name}: {num_read:,} of {num_tokens:,} tokens, with memories of {smaller:,} and {larger:,}",
        flush=True,
    )
    with bar(f"compiling, then reading {document.name} twice", 2 * num_read) as shown:
        inspection = inspect(
            finished.experiment.model,
            params,
            buffers,
            DocumentTokens(document.tokens, finished.experiment.data.start_id),
            sizes,
            finished.experiment.batch.segment_length,
            shown.advance,
        )
    return _write(finished, document, inspection, num_tokens)


def _inspect_attention(
    finished: FinishedRun,
    params: Tree,
    buffers: Tree,
    document: NamedDocument,
    num_tokens: int,
) -> str:
    """Reads once, and writes the page about what was attended to; arguments and result as of `_inspect_memory`."""
    segment_length = finished.experiment.batch.segment_length
    num_read = len(document.tokens)
    print(f"{document.name}: attention of {num_read:,} of {num_tokens:,} tokens", flush=True)
    with bar(f"compiling, then reading {document.name}", num_read) as shown:
        reading = read_attention(
            finished.experiment.model,
            params,
            buffers,
            DocumentTokens(document.tokens, finished.experiment.data.start_id),
            segment_length,
            shown.advance,
        )
    facts = _facts(finished, num_read, num_tokens)
    page = make_attention_page(document.name, reading, document.pieces, segment_length, facts)
    folder = _folder(finished, document)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / ATTENTION_PAGE, page)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    megabytes = len(page.encode()) / 1e6
    return f"mean loss {reading.nats.mean():.4f}; written to {folder}: {ATTENTION_PAGE} ({megabytes:.1f} MB)"


def _facts(finished: FinishedRun, num_read: int, num_tokens: int) -> dict[str, str]:
    """What both pages say, by label."""
    if num_read < num_tokens:
        read = f"the first {num_read:,} of its {num_tokens:,} tokens"
    else:
        read = f"all {num_tokens:,} tokens"
    return {
        "read": read,
        "run": f"{finished.workdir}, step {finished.step}",
        "data": finished.experiment.data.identity,
    }


def _folder(finished: FinishedRun, document: NamedDocument) -> epath.Path:
    """Where the pages of a document are written."""
    name = re.sub(r"[^\w.-]+", "-", document.name)[-80:]
    return finished.workdir / FOLDER / (name or "document")


def _write(finished: FinishedRun, document: NamedDocument, inspection: Inspection, num_tokens: int) -> str:
    """Writes the page and its pictures.

    Args:
      finished: the run.
      document: what was read of the document.
      inspection: of that.
      num_tokens: of the whole document.

    Returns:
      What to print.
    """
    gain = inspection.gain
    mean = f"{gain.mean():+.4f}"
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
            "Share of attention by the age of the memory, by head, or of many heads by layer.",
        ),
    }
    facts = {
        **_facts(finished, len(document.tokens), num_tokens),
        "segments": f"of {inspection.segment_length:,} tokens; a token looks up what stands in earlier segments only",
    }
    figures = {caption: (png, f"Plot: {caption}") for png, caption in pictures.values()}
    page = make_page(document.name, inspection, document.pieces, facts, figures)
    folder = _folder(finished, document)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (png, _) in pictures.items():
            replace_bytes(folder / name, png)
        replace_text(folder / "index.html", page)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    smaller, larger = inspection.memory_sizes
    with_smaller = inspection.nats[0].mean()
    with_larger = inspection.nats[1].mean()
    megabytes = len(page.encode()) / 1e6
    recalls = [_recall(finished, inspection, lookups) for lookups in inspection.lookups]
    return (
        "\n".join(recalls)
        + "\n"
        + (
            f"mean loss {with_smaller:.4f} with memory {smaller:,}, {with_larger:.4f} with {larger:,} "
            f"(difference {mean}, the most for one token {gain.max():+.2f})\n"
            f"written to {folder}: index.html ({megabytes:.1f} MB), {', '.join(pictures)}"
        )
    )


def _recall(finished: FinishedRun, inspection: Inspection, lookups: Lookups) -> str:
    """A line that says how often a memory led to the right token."""
    segment_length = finished.experiment.batch.segment_length
    recall = recall_of(lookups, inspection.tokens, inspection.memory_sizes[1], segment_length)
    hit_share, hit_weight = recall.hit_share[lookups.heads], recall.hit_weight[lookups.heads]
    return (
        f"{lookups.layer}: {hit_share.mean():.1%} of the neighbours were followed by the token to be predicted "
        f"(of all in the memory {recall.hit_chance:.1%}), with {hit_weight.mean():.1%} of the attention"
    )


def _memory_sizes(finished: FinishedRun, given: str | None) -> tuple[int, int]:
    model = finished.experiment.model
    if given is None:
        return 0, model.memory_size
    sizes = [size.strip() for size in given.split(",")]
    are_two_numbers = len(sizes) == 2 and all(size.isdecimal() and len(size) < 20 for size in sizes)
    if not are_two_numbers or int(sizes[0]) >= int(sizes[1]) or int(sizes[1]) > MOST:
        raise UserError(f"--memory_sizes={given}: a smaller and a larger number of tokens, such as 0,2048")
    smaller, larger = map(int, sizes)
    try:
        # 0 stands for no memory: nothing to check.
        if smaller:
            model.with_memory_size(smaller).check(finished.experiment.batch.segment_length)
        model.with_memory_size(larger).check(finished.experiment.batch.segment_length)
    except UserError as error:
        raise UserError(f"--memory_sizes={given}: {error}") from None
    return smaller, larger


def _document(finished: FinishedRun, given: str | None) -> NamedDocument:
    data = finished.experiment.data
    text = text_of(data)
    if text is None:
        return _tokens_only(data, given, finished.experiment.batch.segment_length)
    keys = list(text.document_keys())
    if given is None:
        index = longest_document(data)
    elif given in keys:
        index = keys.index(given)
    else:
        matches = [index for index, key in enumerate(keys) if given in key]
        if len(matches) != 1 or epath.Path(given).expanduser().exists():
            return _file(given, keys, text.vocabulary)
        (index,) = matches
    tokens = text.document_tokens(index)
    return NamedDocument(keys[index], tokens, text.vocabulary.pieces(tokens))


def _file(path: str, keys: Sequence[str], vocabulary: Vocabulary) -> NamedDocument:
    file = epath.Path(path).expanduser()
    named = f"--document={path}"
    if not file.is_file():
        nearest = difflib.get_close_matches(path, keys, n=3, cutoff=0) or keys[:3]
        raise UserError(
            f"{named}: there is no such file, and no one held-out document of that name; "
            f"there are {len(keys)}, such as {', '.join(nearest)}"
        )
    content = read_text(
        file,
        named,
        not_utf8="is no UTF-8 text (byte {place}): give a text file",
        not_text="is no text (it has zero bytes): give a text file",
    )
    if not content.strip():
        raise UserError(f"{named} is empty: there is nothing to read")
    tokens = vocabulary.encode(content)
    return NamedDocument(file.name, tokens, vocabulary.pieces(tokens))


def _tokens_only(data: DataSource, given: str | None, segment_length: int) -> NamedDocument:
    """A held-out document of data that is no text, by its number; ids stand for text."""
    number = int(given) if given and given.isdecimal() else 0
    if given and not (given.isdecimal() and number < data.num_eval_documents):
        raise UserError(
            f"--document={given}: this data is no text; give a number from 0 to {data.num_eval_documents - 1}"
        )
    parts = []
    for batch, document, _ in data.evaluation_batches(data.num_eval_documents, segment_length):
        for row in np.flatnonzero(document == number):
            is_real = batch.is_real[row, 0]  # [T]
            parts.append(batch.targets[row, 0][is_real])
    tokens = np.concatenate(parts)
    pieces = [f"{token} ".encode() for token in tokens.tolist()]
    return NamedDocument(f"document {number}", tokens, pieces)
