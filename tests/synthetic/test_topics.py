"""Topic-conditioned copy: a topic has one symbol in a sample, and what is scored can be known from far back only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.errors import UserError
from memorizing.synthetic import TopicCopy


@given(index=st.integers(0, 2**40), num_topics=st.integers(2, 12), num_words=st.integers(1, 5))
def test_a_scored_symbol_is_that_of_the_topics_last_pair_and_not_nearer(index: int, num_topics: int, num_words: int):
    task = TopicCopy(num_topics=num_topics, num_words=num_words, num_symbols=5, min_distance=6)
    sample = task.sample("train", 0, index, 2, 32)
    ids, weights = sample.targets.ravel(), sample.loss_weights.ravel()
    words, symbols = ids[::2], ids[1::2]
    assert (words > 5).all() and words.max() < task.vocab_size and ((symbols >= 1) & (symbols <= 5)).all()
    topics = (words - 6) // num_words
    assert not weights[::2].any() and set(topics) == set(range(num_topics))
    for pair, is_scored in enumerate(weights[1::2]):
        before = np.flatnonzero(topics[:pair] == topics[pair])
        assert is_scored == (len(before) > 0 and 2 * (pair - before[-1]) > 6)
        assert not len(before) or symbols[before[-1]] == symbols[pair]


def test_a_segment_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"segment_length = 16: TopicCopy needs more than 32"):
        TopicCopy().sample("train", 0, 0, 1, 16)
