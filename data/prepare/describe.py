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
    heads = ("split", "documents", "tokens", "bytes", "bytes/token", *(f">={_thousands(bound)}" for bound in LONG))
    quantiles = ("shortest", "10%", "median", "90%", "longest")
    rows = [(*heads, *quantiles)]
    for name, split in opened.items():
        lengths, num_bytes = split.num_tokens, int(split.num_bytes.sum())
        total = int(lengths.sum())
        shares = [f"{np.mean(lengths >= bound):.1%}" if len(lengths) else "-" for bound in LONG]
        at = [f"{int(value):,}" for value in np.percentile(lengths, _QUANTILES)] if len(lengths) else ["-"] * 5
        per_token = f"{num_bytes / total:.2f}" if total else "-"
        rows.append((name, f"{len(split):,}", f"{total:,}", f"{num_bytes:,}", per_token, *shares, *at))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return lines


def _histogram(opened: Mapping[str, Split]) -> list[str]:
    """Documents by length, in powers of two, all splits together."""
    lengths = np.concatenate([split.num_tokens for split in opened.values()])
    if not len(lengths):
        return ["no documents"]
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    lines = ["documents by tokens:"]
    for power in range(int(powers.min()), len(counts)):
        bar = "#" * int(np.ceil(_BAR * counts[power] / counts.max()))
        lines.append(
            f"{_thousands(1 << power):>7} to {_thousands(2 << power):>5}  {counts[power]:>10,}  {bar}".rstrip()
        )
    return lines


def _sample(cache: TokenCache, opened: Mapping[str, Split]) -> list[str]:
    """The beginning of the document of median length of the first split that has any."""
    name, split = next(((name, split) for name, split in opened.items() if len(split)), (None, None))
    if split is None:
        return []
    index = int(np.argsort(split.num_tokens, kind="stable")[len(split) // 2])
    text = cache.vocabulary.decode(split.tokens(index, 0, min(_SAMPLE_TOKENS, int(split.num_tokens[index]))))
    lines = text.split("\n")[:_SAMPLE_LINES]
    head = f"the beginning of {split.key(index)!r}, of {split.num_tokens[index]:,} tokens, in {name}:"
    return [
        head,
        *(f"  | {_printable(textwrap.shorten(line, _WIDTH) if len(line) > _WIDTH else line)}" for line in lines),
    ]


def _draw(task: str, opened: Mapping[str, Split], picture: str) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = {name: split.num_tokens for name, split in opened.items() if len(split)}
    if lengths:
        highest = max(int(values.max()) for values in lengths.values())
        lowest = min(int(values.min()) for values in lengths.values())
        edges = np.geomspace(lowest, highest + 1, 40)
        axes.hist(list(lengths.values()), edges, stacked=True, label=[f"{n} ({len(v):,})" for n, v in lengths.items()])
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
