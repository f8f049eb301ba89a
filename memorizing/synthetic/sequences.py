"""Copy and Reverse: random symbols, a separator, then what was read, once more.

The tasks of Bulatov et al. 2022, "Recurrent Memory Transformer", section 4.1. The sequence is as long as the sample
allows, so the same text can be cut into few long or many short segments. The answer is scored, what comes before it is
not.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from memorizing.errors import Count, UserError, Width
from memorizing.synthetic.task import Split, SyntheticTask, Text


@dataclasses.dataclass(frozen=True)
class SequenceTask(SyntheticTask):
    """Symbols 1 ... n, and n + 1 as the separator.

    Attributes:
      num_symbols: n.
    """

    num_symbols: Width = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.num_symbols >= 2, "num_symbols", "at least 2 symbols")

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 2

    @property
    def chance(self) -> float:
        """Of one symbol."""
        return 1 / self.num_symbols

    @property
    @abc.abstractmethod
    def answer_parts(self) -> int:
        """Length of the answer, in lengths of the sequence."""

    @abc.abstractmethod
    def answer(self, sequence: np.ndarray) -> np.ndarray:
        """What has to be written after the separator."""

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        room = num_segments * segment_length
        length = (room - 1) // (1 + self.answer_parts)
        if length < 1:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: "
                f"{type(self).__name__} needs at least {2 + self.answer_parts} tokens"
            )
        separator = self.num_symbols + 1
        sequence = rng.integers(1, self.num_symbols + 1, length, np.int32)
        ids = np.concatenate([sequence, [separator], self.answer(sequence)])
        return Text(ids, np.arange(len(ids)) > length)


@dataclasses.dataclass(frozen=True)
class Copy(SequenceTask):
    """The sequence again, `num_copies` times.

    A sequence of 120 symbols and its two copies are the paper's "copy 120" of 360 tokens.

    Attributes:
      num_copies: how often.
    """

    num_copies: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.num_copies >= 1, "num_copies", "at least 1 copy")

    @property
    def answer_parts(self) -> int:
        return self.num_copies

    def answer(self, sequence: np.ndarray) -> np.ndarray:
        return np.tile(sequence, self.num_copies)


@dataclasses.dataclass(frozen=True)
class Reverse(SequenceTask):
    """The sequence backwards."""

    @property
    def answer_parts(self) -> int:
        return 1

    def answer(self, sequence: np.ndarray) -> np.ndarray:
        return sequence[::-1]
