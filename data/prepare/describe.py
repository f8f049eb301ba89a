"""What a token cache holds: how many documents and tokens, how long they are, and what one of them looks like."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping

import numpy as np

from memorizing.data.prepare.progress import PreparationProgress
from memorizing.data.tokens import paths, token_cache
from memorizing.data.tokens.token_cache import Split, TokenCache

# Shares of documents of at least so many tokens are told: the bound of C4(4K+), and what only a memory reaches.
LONG = (4096, 20_000, 100_000)
_QUANTILES = (0, 10, 50, 90, 100)
_BAR = 50
_SAMPLE_TOKENS = 400
_SAMPLE_LINES = 24
_WIDTH = 120
PICTURE = "lengths.png"


def describe(path: str, picture: str | None, progress: PreparationProgress) -> None:
    """Prints what a cache holds and draws the lengths of its documents.

    Args:
      path: of the cache.
      picture: file of the picture; None: `lengths.png` in the folder of a local cache, or else in the current one.
      progress: prints.

    Raises:
      DataError: there is no finished cache.
    """
    cache = token_cache.open_cache(path)
    opened = {name: cache.split(name) for name in cache.metadata["splits"]}
    for line in (*_summary(cache, opened), "", *_histogram(opened), "", *_sample(cache, opened)):
        progress.print(line)
    picture = picture or (PICTURE if paths.is_remote(path) else os.path.join(path, PICTURE))
    _draw(cache.metadata["task"], opened, picture)
    progress.print(f"\nlengths as a picture: {picture}")


def _summary(cache: TokenCache, opened: Mapping[str, Split]) -> list[str]:
    metadata = cache.metadata
    lines = [f"{metadata['task']}, vocabulary of {cache.vocab_size:,} ids, from {metadata.get('source', 'somewhere')}"]
    if metadata.get("licence"):
        lines.append(f"licence: {metadata['licence']}")
    heads = ["split", "documents", "tokens", "bytes", "bytes/token"]
    heads += [f">={_thousands(bound)}" for bound in LONG]
    heads += ["shortest", "10%", "median", "90%", "longest"]
    rows = [heads, *(_row(name, split) for name, split in opened.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return lines


def _row(name: str, split: Split) -> list[str]:
    """The figures of a split, in the order of the heads."""
    lengths = split.num_tokens
    num_tokens = int(lengths.sum())
    num_bytes = int(split.num_bytes.sum())
    row = [name, f"{len(split):,}", f"{num_tokens:,}", f"{num_bytes:,}"]
    row.append(f"{num_bytes / num_tokens:.2f}" if num_tokens else "-")
    if not len(lengths):
        return row + ["-"] * (len(LONG) + len(_QUANTILES))
    row += [f"{np.mean(lengths >= bound):.1%}" for bound in LONG]
    row += [f"{int(length):,}" for length in np.percentile(lengths, _QUANTILES)]
    return row


def _histogram(opened: Mapping[str, Split]) -> list[str]:
    """Documents by length, in powers of two, all splits together."""
    lengths = np.concatenate([split.num_tokens for split in opened.values()])
    if not len(lengths):
        return ["no documents"]
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    lines = ["documents by tokens:"]
    for power in range(int(powers.min()), len(counts)):
        first = _thousands(1 << power)
        end = _thousands(2 << power)
        bar = "#" * int(np.ceil(_BAR * counts[power] / counts.max()))
        lines.append(f"{first:>7} to {end:>5}  {counts[power]:>10,}  {bar}".rstrip())
    return lines


def _sample(cache: TokenCache, opened: Mapping[str, Split]) -> list[str]:
    """The beginning of the document of median length of the first split that has any."""
    for name, split in opened.items():
        if len(split):
            return _beginning(cache, name, split)
    return []


def _beginning(cache: TokenCache, name: str, split: Split) -> list[str]:
    by_length = np.argsort(split.num_tokens, kind="stable")
    index = int(by_length[len(split) // 2])
    num_tokens = int(split.num_tokens[index])
    text = cache.vocabulary.decode(split.tokens(index, 0, min(_SAMPLE_TOKENS, num_tokens)))
    lines = [f"the beginning of {split.key(index)!r}, of {num_tokens:,} tokens, in {name}:"]
    for line in text.split("\n")[:_SAMPLE_LINES]:
        shown = textwrap.shorten(line, _WIDTH) if len(line) > _WIDTH else line
        lines.append(f"  | {_printable(shown)}")
    return lines


def _draw(task: str, opened: Mapping[str, Split], picture: str) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = {name: split.num_tokens for name, split in opened.items() if len(split)}
    if lengths:
        highest = max(int(values.max()) for values in lengths.values())
        lowest = min(int(values.min()) for values in lengths.values())
        edges = np.geomspace(lowest, highest + 1, 40)
        labels = [f"{name} ({len(values):,})" for name, values in lengths.items()]
        axes.hist(list(lengths.values()), edges.tolist(), stacked=True, label=labels)
        axes.legend()
    for bound in LONG:
        axes.axvline(bound, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=task)
    figure.savefig(picture, dpi=120)


def _thousands(number: int) -> str:
    """A round number in short form, such as 4K."""
    for suffix, unit in (("M", 1 << 20), ("K", 1 << 10), ("M", 1_000_000), ("K", 1000)):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{suffix}"
    return str(number)


def _printable(line: str) -> str:
    """A line whose characters that would change the terminal are escaped."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
