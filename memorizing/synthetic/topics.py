"""Topic-conditioned copy: what was stated of a topic is asked for, long after.

A statement is one token, which belongs to a topic and says its symbol; a question is a token of the topic alone, and is
followed by the symbol. A text begins with a statement of every topic, in random order. Then all topics are asked for,
in random order, round after round. A symbol can be predicted by attending to what belongs to the same topic, however
far back, whichever of its tokens stands there.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from memorizing.errors import Count, CountOrNone, Range, UserError, Width
from memorizing.synthetic.task import Split, SyntheticTask, Text


@dataclasses.dataclass(frozen=True)
class TopicCopy(SyntheticTask):
    """Symbols 1 ... n, then the questions of all topics, and then the n statements of each topic.

    Scored are the answers to questions whose topic last came up more than `min_distance` tokens back.

    Attributes:
      num_topics: of a sample.
      num_symbols: n.
      min_distance: in tokens.
    """

    eval_segments: Count = 1
    num_topics: Annotated[int, Range(1, 2**16)] = 16
    num_symbols: Width = 16
    min_distance: CountOrNone = 16

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_symbols + self.num_topics * (1 + self.num_symbols)

    @property
    def chance(self) -> float:
        """Of one symbol."""
        return 1 / self.num_symbols

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        length = num_segments * segment_length
        num_questions = (length - self.num_topics) // 2
        if num_questions < 1:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: TopicCopy needs at least {self.num_topics + 2} tokens, "
                f"one for each of TopicCopy.num_topics = {self.num_topics}, and two for a question and its answer"
            )
        num_rounds = -(-num_questions // self.num_topics)
        order = rng.permutation(self.num_topics)
        asked = np.concatenate([rng.permutation(self.num_topics) for _ in range(num_rounds)])[:num_questions]
        symbol_of = rng.integers(0, self.num_symbols, self.num_topics)

        questions = 1 + self.num_symbols + asked
        statements = 1 + self.num_symbols + self.num_topics + order * self.num_symbols + symbol_of[order]
        pairs = np.stack([questions, 1 + symbol_of[asked]], axis=1)
        are_far = np.stack([np.zeros(num_questions, bool), self._are_far(order, asked)], axis=1)
        # A last token is left over where the length and the number of topics are not both even or odd.
        rest = length - self.num_topics - pairs.size
        ids = np.concatenate([statements, pairs.ravel(), statements[:rest]])
        is_answer = np.concatenate([np.zeros(self.num_topics, bool), are_far.ravel(), np.zeros(rest, bool)])
        return Text(ids.astype(np.int32), is_answer)

    def _are_far(self, stated: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Of each question, whether its topic last came up far enough back, bool [questions]."""
        last = {topic: place for place, topic in enumerate(stated.tolist())}
        are_far = np.zeros(len(asked), bool)
        for index, topic in enumerate(asked.tolist()):
            place = self.num_topics + 2 * index
            are_far[index] = place - last[topic] > self.min_distance
            last[topic] = place
        return are_far
