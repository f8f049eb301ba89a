"""The text that facts are hidden in."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Annotated, Protocol

import numpy as np

from memorizing.errors import Range, UserError
from memorizing.synthetic import babi


class NoiseSource(Protocol):
    """A vocabulary that encodes facts and questions, and text in it to hide them in.

    It is a frozen dataclass that gin builds.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids; id 0 stands before a text and in none."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [length], without a start or an end, none of them 0.

        The text begins with a space where it follows another one.
        """
        ...

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Ids of some text, int32 [length], none of them 0: a function of the generator's state."""
        ...


@dataclasses.dataclass(frozen=True)
class SyntheticWords:
    """A vocabulary of whole words: those of the tasks, and others for the noise.

    Noise words are drawn independently and uniformly. No word of a task is ever noise.

    Attributes:
      num_words: noise words.
    """

    num_words: Annotated[int, Range(1, 2**20)] = 256

    def __post_init__(self) -> None:
        if self.num_words < 1:
            raise UserError(f"SyntheticWords.num_words = {self.num_words}: at least 1 word")

    @property
    def vocab_size(self) -> int:
        return 1 + len(babi.WORDS) + self.num_words

    def encode(self, text: str) -> np.ndarray:
        """See `NoiseSource`. Raises ValueError for a word that is not in the vocabulary."""
        words = re.findall(r"\w+|[^\w\s]", text)
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary of {self}")
        return np.array([self._ids[word] for word in words], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The words, with a space between any two; id 0 is left out."""
        return " ".join(self._words[i] for i in ids if i)

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """See `NoiseSource`."""
        return rng.integers(1 + len(babi.WORDS), self.vocab_size, length, np.int32)

    @functools.cached_property
    def _words(self) -> list[str]:
        return ["", *babi.WORDS, *(f"noise{i}" for i in range(self.num_words))]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words) if word}
