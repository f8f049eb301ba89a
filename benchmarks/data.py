"""How many tokens a second a host's stream gives, and its memory, against what the model of 200M parameters needs.

The runs of the paper's size take 2^17 tokens a step in segments of 512, so 256 rows; a pod of 32 cores of TPU v3 has
four hosts, of 64 rows each, and takes about a quarter of a second for a step. Without --cache, token caches of made-up
documents are written: books, web pages, repositories of which some have millions of tokens; and an index of ten million
documents is streamed without files. Every stream is also measured through the thread that reads ahead, as in training.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from memorizing.data.streams.order import Line
from memorizing.data.streams.read_ahead import ReadAhead
from memorizing.data.streams.segments import Documents, DocumentStream
from memorizing.data.tokens import cache_writer, staging, token_cache
from memorizing.data.tokens.cache_writer import TokenisedDocument
from memorizing.data.tokens.vocabulary import ByteVocabulary
from memorizing.errors import Range, UserError
from memorizing.runtime import tables

TOKENS_PER_STEP = 1 << 17
SECONDS_PER_STEP = 0.25
NUM_HOSTS = 4
LENGTH = 512
# Tokens a second that a host's stream has to give.
NEEDED = TOKENS_PER_STEP / NUM_HOSTS / SECONDS_PER_STEP
MANY = 10_000_000

# Number, median length and spread of made-up documents: lengths are log-normal, as those of the corpora are.
CORPORA: dict[str, tuple[int, float, float]] = {
    "books": (400, 100_000, 0.5),
    "web pages": (5_000, 7_000, 0.7),
    "repositories": (120, 200_000, 1.6),
}


class Made:
    """Ten million documents without files: they show the cost of order and positions alone."""

    def __init__(self) -> None:
        self.num_tokens = np.random.default_rng(0).integers(4_096, 20_000, MANY)
        self._tokens = np.ones(1 << 16, np.uint16)

    def __len__(self) -> int:
        return MANY

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        if stop is None:
            stop = int(self.num_tokens[index])
        return self._tokens[: stop - start]


def write_cache(path: pathlib.Path, lengths: np.ndarray) -> None:
    """A cache of random tokens that compress about as tokens of text do."""
    random = np.random.default_rng(0)

    def documents() -> Iterator[tuple[str, TokenisedDocument]]:
        for index, length in enumerate(lengths):
            tokens = np.minimum(random.geometric(0.02, length), 258)
            yield "train", TokenisedDocument(str(index), int(length), tokens.astype(np.int32))

    vocabulary = ByteVocabulary()
    with staging.staged(str(path), token_cache.METADATA_FILE, {}) as folder:
        index_path = folder.work / "part.npz"
        cache_writer.write_part(folder.path, index_path, 0, vocabulary.size, documents())
        cache_writer.join(folder.path, [index_path], ["train"], "made_bytes", vocabulary, {})


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(open_documents: Callable[[], Documents], seconds: float, ahead: bool) -> dict[str, float]:
    """Reads one host's share of the rows of a step, for some seconds."""
    before = resident()
    documents = open_documents()
    order = Line([len(documents)], 0)
    num_rows = TOKENS_PER_STEP // LENGTH
    rows = range(num_rows // NUM_HOSTS)
    stream = DocumentStream(documents, "", order, num_rows, rows, 1, LENGTH)
    reader = ReadAhead(stream) if ahead else None
    batches = stream if reader is None else reader
    next(batches)
    steps = 0
    tokens = 0
    slowest = 0.0
    processor_start = time.process_time()
    start = time.perf_counter()
    last = start
    while last - start < seconds:
        batch = next(batches)
        now = time.perf_counter()
        slowest = max(slowest, now - last)
        last = now
        steps += 1
        tokens += batch.targets.size
    processor_seconds = time.process_time() - processor_start
    if reader is not None:
        reader.close()
    tokens_per_second = tokens / (last - start)
    return {
        "tokens_per_processor_second": tokens / processor_seconds,
        "tokens_per_second": tokens_per_second,
        "times_needed": tokens_per_second / NEEDED,
        "steps": steps,
        "slowest_ms": 1000 * slowest,
        "mebibytes": resident() - before,
        "longest_document": int(documents.num_tokens.max()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--cache", metavar="FOLDER", help="a token cache to read instead of made-up ones")
    parser.add_argument(
        "--seconds",
        type=Range(1e-3, 1e6).of(float),
        default=5.0,
        metavar="S",
        help="for each row (default: %(default)s)",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    if bindings:
        raise UserError(f"bench data takes no bindings, but was given --gin.{bindings[0]}")
    if not options.seconds > 0:
        raise UserError(f"--seconds={options.seconds}: more than 0")
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache
        sources = {pathlib.Path(cache).name: _opener(cache)} if cache else made_up(folder)
        results = []
        for name, open_documents in sources.items():
            for ahead in (False, True):
                figures = measure(open_documents, options.seconds, ahead)
                results.append({"documents": name, "read_ahead": ahead} | figures)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"needed by a host: {NEEDED:,.0f} tokens a second\n")
    print(f"{_table(results)}\n")
    print(f"peak memory of the process: {peak:,.0f} MiB")
    return {"needed": NEEDED, "peak_mebibytes": peak, "rows": results}


def made_up(folder: str) -> dict[str, Callable[[], Documents]]:
    """Token caches of made-up documents, and ten million documents without any."""
    sources: dict[str, Callable[[], Documents]] = {}
    for name, (count, median, sigma) in CORPORA.items():
        path = pathlib.Path(folder) / name
        lengths = np.random.default_rng(1).lognormal(np.log(median), sigma, count)
        write_cache(path, lengths.astype(np.int64) + 1)
        sources[name] = _opener(str(path))
    return sources | {"10M documents": Made}


def _opener(path: str) -> Callable[[], Documents]:
    return lambda: token_cache.open_cache(path).split("train")


def _table(results: list[dict[str, Any]]) -> str:
    rows = [["", "read ahead", "tokens/s", "x needed", "per CPU second", "slowest", "memory", "longest document"]]
    for row in results:
        rows.append(
            [
                row["documents"],
                "yes" if row["read_ahead"] else "no",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['times_needed']:,.0f}",
                f"{row['tokens_per_processor_second']:,.0f}",
                f"{row['slowest_ms']:,.0f} ms",
                f"{row['mebibytes']:,.0f} MiB",
                f"{row['longest_document']:,} tokens",
            ]
        )
    return tables.align(rows)
