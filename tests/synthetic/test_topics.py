"""Topic-conditioned copy: a topic has one symbol in a sample, and what is scored can be known from far back only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.errors import UserError
from memorizing.synthetic import TopicCopy


@given(index=st.integers(0, 2**40), num_topics=st.integers(2, 12), length=st.sampled_from([15, 16]))
def test_a_scored_symbol_was_stated_or_answered_before_and_not_nearer(index: int, num_topics: int, length: int):
    task = TopicCopy(num_topics=num_topics, num_symbols=5, min_distance=6)
    sample = task.sample("train", 0, index, 2, length)
    ids, is_scored = sample.targets.ravel(), sample.loss_weights.ravel() > 0
    assert ids.max() < task.vocab_size
    first_statement = 6 + num_topics
    statements = ids[:num_topics] - first_statement
    assert (statements >= 0).all() and set(statements // 5) == set(range(num_topics))
    symbol_of = {topic: 1 + symbol for topic, symbol in zip(statements // 5, statements % 5, strict=True)}
    last = {topic: place for place, topic in enumerate(statements // 5)}

    for question in range(num_topics, len(ids) - 1, 2):
        topic = ids[question] - 6
        assert 0 <= topic < num_topics and ids[question + 1] == symbol_of[topic]
        assert is_scored[question + 1] == (question - last[topic] > 6)
        assert not is_scored[question]
        last[topic] = question
    assert not is_scored[:num_topics].any()


def test_a_segment_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"segment_length = 16: TopicCopy needs at least 18"):
        TopicCopy().sample("train", 0, 0, 1, 16)
