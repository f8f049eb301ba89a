"""A text that is written ends before the first of its stopping texts, and no part of one is ever said."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.generation.stopping_text import StoppingText

TEXT = st.text(st.sampled_from("abö"), max_size=12)


@settings(max_examples=200)
@given(text=TEXT, stop=st.lists(TEXT.filter(len), max_size=3))
def test_a_text_ends_before_what_stops_it(text: str, stop: list[str]):
    stream, said = StoppingText(stop), ""
    for character in text:
        said += stream.add(character)
        if stream.has_stopped:
            break
    said += stream.end()
    # The first that is complete counts.
    heard = next((text[:size] for size in range(len(text) + 1) if any(each in text[:size] for each in stop)), None)
    if heard is None:
        assert said == text and not stream.has_stopped
    else:
        assert said == heard[: min(heard.index(each) for each in stop if each in heard)] and stream.has_stopped
