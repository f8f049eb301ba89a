"""How many tokens a second a host's stream hands out, and the memory it takes, against what the model of 200M parameters needs.

python benchmarks/data_rate.py [--cache=FOLDER] [--seconds=5] [--output=FILE.json]

The runs of the paper's size take 2^17 tokens a step in segments of 512, so 256 rows; a pod of 32 cores of TPU v3 has four hosts, of 64 rows each, and takes about a quarter of
a second for a step. Without --cache token caches of made-up documents are written: books, web pages, repositories of which some have millions of tokens; and an index of ten
million documents is streamed without files. Every stream also goes through the thread that reads ahead, as in training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from memorizing.data import cache_writer, staging, token_cache
from memorizing.data.cache_writer import TokenisedDocument
from memorizing.data.order import Line
from memorizing.data.read_ahead import ReadAhead
from memorizing.data.streams import Documents, DocumentStream
from memorizing.data.vocabulary import ByteVocabulary

TOKENS_PER_STEP, SECONDS_PER_STEP, NUM_HOSTS, LENGTH = 1 << 17, 0.25, 4, 512
NEEDED = TOKENS_PER_STEP / NUM_HOSTS / SECONDS_PER_STEP
MANY = 10_000_000

# Lengths of made-up documents: log-normal, as those of the corpora are.
CORPORA: dict[str, tuple[int, float, float]] = {
    "books": (400, 100_000, 0.5),
    "web pages": (5_000, 7_000, 0.7),
    "repositories": (120, 200_000, 1.6),
}


class Made:
    """Ten million documents that are nowhere: what the order and the positions cost by themselves."""

    def __init__(self) -> None:
        self.num_tokens = np.random.default_rng(0).integers(4_096, 20_000, MANY)
        self._tokens = np.ones(1 << 16, np.uint16)

    def __len__(self) -> int:
        return MANY

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._tokens[: (int(self.num_tokens[index]) if stop is None else stop) - start]


def write_cache(path: pathlib.Path, lengths: np.ndarray) -> None:
    """A cache of random tokens that compress about as tokens of text do."""
    random = np.random.default_rng(0)

    def documents() -> Iterator[tuple[str, TokenisedDocument]]:
        for index, length in enumerate(lengths):
            tokens = np.minimum(random.geometric(0.02, length), 258).astype(np.int32)
            yield "train", TokenisedDocument(str(index), int(length), tokens)

    used = ByteVocabulary()
    with staging.staged(str(path), token_cache.METADATA_FILE, {}) as folder:
        index_path = folder.work / "part.npz"
        cache_writer.write_part(folder.path, index_path, 0, used.size, documents())
        cache_writer.join(folder.path, [index_path], ["train"], "made_bytes", used, {})


def resident() -> float:
    """MiB of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(open_documents: Callable[[], Documents], seconds: float, ahead: bool) -> dict[str, float]:
    """One host's share of the rows of a step, for some seconds."""
    before = resident()
    documents = open_documents()
    num_rows = TOKENS_PER_STEP // LENGTH
    stream = DocumentStream(documents, "", Line([len(documents)], 0), num_rows, range(num_rows // NUM_HOSTS), 1, LENGTH)
    batches = ReadAhead(stream) if ahead else stream
    next(batches)
    steps, tokens, slowest = 0, 0, 0.0
    processor, start = time.process_time(), time.perf_counter()
    last = start
    while last - start < seconds:
        batch = next(batches)
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
        steps += 1
        tokens += batch.targets.size
    processor = time.process_time() - processor
    if ahead:
        batches.close()
    return {
        "tokens_per_processor_second": tokens / processor,
        "tokens_per_second": tokens / (last - start),
        "times_needed": tokens / (last - start) / NEEDED,
        "steps": steps,
        "slowest_ms": 1000 * slowest,
        "mebibytes": resident() - before,
        "longest_document": int(documents.num_tokens.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a token cache to read instead of made-up ones")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output")
    options = parser.parse_args()
    print(f"needed by a host: {NEEDED:,.0f} tokens a second\n")
    print(
        f"{'':<16}{'read ahead':>11}{'tokens/s':>14}{'x needed':>10}{'per CPU second':>16}{'slowest':>10}{'memory':>9}{'longest document':>18}"
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Callable[[], Documents]] = {}
        if options.cache:
            sources[pathlib.Path(options.cache).name] = lambda: token_cache.open_cache(options.cache).split("train")
        else:
            for name, (count, median, sigma) in CORPORA.items():
                path = pathlib.Path(folder) / name
                lengths = np.random.default_rng(1).lognormal(np.log(median), sigma, count).astype(np.int64) + 1
                write_cache(path, lengths)
                sources[name] = lambda path=path: token_cache.open_cache(str(path)).split("train")
            sources["10M documents"] = Made
        for name, open_documents in sources.items():
            for ahead in (False, True):
                found = measure(open_documents, options.seconds, ahead)
                results.append({"documents": name, "read_ahead": ahead, **found})
                print(
                    f"{name:<16}{'yes' if ahead else 'no':>11}{found['tokens_per_second']:>14,.0f}{found['times_needed']:>10,.0f}{found['tokens_per_processor_second']:>16,.0f}"
                    f"{found['slowest_ms']:>7,.0f} ms{found['mebibytes']:>5,.0f} MiB{found['longest_document']:>14,} tokens"
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\npeak memory of the process: {peak:,.0f} MiB; {os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    )
    if options.output:
        record = {
            "date": datetime.date.today().isoformat(),
            "needed": NEEDED,
            "peak_mebibytes": peak,
            "results": results,
        }
        pathlib.Path(options.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
