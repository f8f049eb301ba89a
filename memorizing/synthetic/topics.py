"""Topic-conditioned copy: what was said of a topic is said again, long after.

A topic is known by several words, and has one symbol in each sample. A text is pairs of a word and the symbol of its
topic, the topics in random order, round after round. A symbol can be predicted where the topic came up before: by
attending to what belongs to the same topic, however far back, whichever of its words stood there.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from memorizing.errors import Count, CountOrNone, Range, UserError, Width
from memorizing.synthetic.task import Split, SyntheticTask, Text


@dataclasses.dataclass(frozen=True)
class TopicCopy(SyntheticTask):
    """Symbols 1 ... n, then the words of the first topic, of the second, and so on.

    Scored are the symbols of topics whose last pair lies more than `min_distance` tokens back.

    Attributes:
      num_topics: of a sample.
      num_words: of each topic.
      num_symbols: n.
      min_distance: in tokens.
    """

    eval_segments: Count = 1
    num_topics: Annotated[int, Range(1, 2**16)] = 16
    num_words: Annotated[int, Range(1, 2**12)] = 4
    num_symbols: Width = 16
    min_distance: CountOrNone = 16

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_symbols + self.num_topics * self.num_words

    @property
    def chance(self) -> float:
        """Of one symbol."""
        return 1 / self.num_symbols

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        num_pairs = num_segments * segment_length // 2
        if num_pairs <= self.num_topics:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: TopicCopy needs more than {2 * self.num_topics} "
                f"tokens, two for each of TopicCopy.num_topics = {self.num_topics}"
            )
        num_rounds = -(-num_pairs // self.num_topics)
        # [pairs]
        topics = np.concatenate([rng.permutation(self.num_topics) for _ in range(num_rounds)])[:num_pairs]
        words = 1 + self.num_symbols + topics * self.num_words + rng.integers(0, self.num_words, num_pairs)
        symbols = rng.integers(1, self.num_symbols + 1, self.num_topics)[topics]
        ids = np.stack([words, symbols], axis=1).ravel()
        is_answer = np.stack([np.zeros(num_pairs, bool), self._is_far(topics)], axis=1).ravel()
        return Text(ids.astype(np.int32), is_answer)

    def _is_far(self, topics: np.ndarray) -> np.ndarray:
        """Whether the pair before of the same topic is far enough back, bool [pairs]; false where there is none."""
        is_far = np.zeros(len(topics), bool)
        last: dict[int, int] = {}
        for pair, topic in enumerate(topics.tolist()):
            is_far[pair] = topic in last and 2 * (pair - last[topic]) > self.min_distance
            last[topic] = pair
        return is_far
