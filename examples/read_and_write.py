"""What memory is worth on a text of yours.

Its second half is scored alone, and again after the first half has been read; then the model continues the text.

python examples/read_and_write.py runs/demo SOME_FILE.py
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

import memorizing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="folder of a finished run")
    parser.add_argument("file", help="UTF-8 text, the longer the better")
    options = parser.parse_args(arguments)
    text = pathlib.Path(options.file).read_text()
    middle = len(text) // 2
    first = text[:middle]
    second = text[middle:]

    model = memorizing.load(options.workdir)
    alone = model.score(second)
    session = model.session()
    session.read(first)
    after = session.read(second)

    print(f"{len(after.tokens):,} tokens of {options.file}, its second half")
    print(f"  alone:                {alone.bits_per_byte:.4f} bits per byte, perplexity {alone.perplexity:.2f}")
    print(f"  after the first half: {after.bits_per_byte:.4f} bits per byte, perplexity {after.perplexity:.2f}")
    print("where it helped most, in nats:")
    gain = alone.nats - after.nats
    for place in np.argsort(-gain)[:8]:
        start = max(place - 12, 0)
        before = "".join(after.pieces[start:place])
        print(f"  {gain[place]:+6.2f}  {before!r} -> {after.pieces[place]!r}")
    print("and on it goes:")
    print(session.generate(num_tokens=100, seed=1)[0])


if __name__ == "__main__":
    main()
