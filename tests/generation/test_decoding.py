"""Writing token by token gives what reading gives, for every mechanism.

Whatever the length of the prompt, and across the borders of segments.

What a user relies on: the text that a model writes is drawn from the predictions that it was trained and evaluated for,
and what it remembers of a text does not depend on
whether it has read or written it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, MECHANISMS, VOCAB, Mechanism, apply_model, drawn_variables, init_params
from paces import pass_at_once

from memorizing.context import Report, Segment
from memorizing.errors import UserError
from memorizing.generation.decoding import TextDecoder
from memorizing.generation.programs import Decoder, OpenSegment, Weights, predict
from memorizing.generation.sampling import Sampling, draw
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.attention.compressive import CompressiveAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.transformer_xl import TransformerXLAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.recurrent_tokens import RecurrentTokens

# Settings that change what a position sees, beside the mechanisms that every contract test runs over.
VARIANTS = (
    *(mechanism for mechanism in MECHANISMS if not mechanism.later_tokens_decide_what_is_seen),
    Mechanism(
        "own settings of transformer-xl and rmt",
        attention=TransformerXLAttention(window=LENGTH + 3, clamp_distance=5, same_length=True),
        recurrent_tokens=RecurrentTokens(num_tokens=3, sees_cache=False),
    ),
    Mechanism(
        "everything",
        attention=CompressiveAttention(
            window=2 * LENGTH, compressed_size=4, rate=4, compressor="most_used", loss="none"
        ),
        attention_at=((1, KNNAttention(2 * LENGTH, num_neighbors=4, local=XLAttention(window=LENGTH + 3))),),
        recurrent_tokens=RecurrentTokens(num_tokens=2),
    ),
)
ANYTHING = np.arange(VOCAB) > 0
ANY_TOKEN = Sampling(1.0, top_p=1.0)
DRAW = jax.jit(draw)
# Nothing, one token, a segment but for one input (the first input is the padding before a document), exactly one, and
# more than the memory of most of them holds.
PROMPT_LENGTHS = (0, 1, LENGTH - 2, LENGTH - 1, LENGTH, 3 * LENGTH + 3)


class Case:
    """A mechanism's model, ready to read and write one row."""

    def __init__(self, mechanism: Mechanism) -> None:
        self.config = mechanism.config
        self.decoder = Decoder(self.config, LENGTH)
        variables = drawn_variables(self.config)
        self.params, self.buffers = variables["params"], variables["buffers"]

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.buffers)

    @functools.cached_property
    def predict(self) -> Callable:
        return jax.jit(functools.partial(predict, self.config, LENGTH))

    def reader(self) -> TextDecoder:
        return TextDecoder(self.decoder, self.weights, self.decoder.start(0))

    @functools.cached_property
    def _forward(self) -> Callable:
        return jax.jit(
            lambda tokens, is_real, context: apply_model(
                self.config, self.params, tokens, is_real, np.zeros(1, bool), context, self.buffers
            )[:2]
        )

    def teacher_forced(self, tokens: np.ndarray) -> np.ndarray:
        """Logits as evaluation computes them: of every token of a document and of the one after it, [length + 1, V]."""
        inputs = np.pad(tokens, ((0, 0), (1, -(tokens.shape[1] + 1) % LENGTH)))
        is_real = np.arange(inputs.shape[1])[None] <= tokens.shape[1]
        context, logits = self.config.init_context(1, LENGTH), []
        for start in range(0, inputs.shape[1], LENGTH):
            segment = slice(start, start + LENGTH)
            part, context = self._forward(inputs[:, segment], is_real[:, segment], context)
            logits.append(part[0])
        return np.concatenate(logits)[: tokens.shape[1] + 1]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda mechanism: mechanism.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, (1, length), np.int32)


def write(reader: TextDecoder, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Tokens [B, num_tokens] that the reader writes."""
    return np.stack(list(reader.generate(num_tokens, ANY_TOKEN, seed, ANYTHING)), axis=1)


def write_stepwise(case: Case, reader: TextDecoder, num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same one token at a time; and the logits [B, num_tokens, V] that each was drawn from."""
    sampling, drawn, logits = ANY_TOKEN.arrays(ANYTHING, seed), [], []
    segment = reader.open_segment()
    for _ in range(num_tokens):
        of_token, kv_cache = case.predict(case.weights, reader.context, segment)
        tokens = np.asarray(DRAW(of_token, segment.position, sampling))
        reader.accept(tokens)
        drawn.append(tokens)
        logits.append(np.asarray(of_token))
        after = OpenSegment(tokens, segment.index + 1, segment.position + 1, kv_cache)
        segment = after if reader.room else reader.open_segment()
    return np.stack(drawn, axis=1), np.stack(logits, axis=1)


@pytest.mark.parametrize("prompt_length", PROMPT_LENGTHS)
def test_written_tokens_are_drawn_from_the_teacher_forced_logits(case: Case, prompt_length: int):
    reader, prompt = case.reader(), text(prompt_length)
    reader.read(prompt)
    alone = reader.fork(1)
    written, logits = write_stepwise(case, reader, 2 * LENGTH + 3)
    np.testing.assert_array_equal(write(alone, 2 * LENGTH + 3), written)
    whole = np.concatenate([prompt, written], axis=1)
    expected = case.teacher_forced(whole)
    # Heads that are not scaled have logits several times as large, and so is what is rounded away.
    size = max(expected.std(), 1.0)
    np.testing.assert_allclose(logits[0], expected[prompt_length:-1], rtol=0, atol=2e-5 * size)
    assert expected.std(axis=0).max() > 0.1, "the test cannot see what it forbids"


def test_what_is_read_is_scored_as_in_evaluation_however_it_is_cut(case: Case):
    tokens, length = text(4 * LENGTH + 5), 4 * LENGTH + 5
    log_probabilities = jax.nn.log_softmax(case.teacher_forced(tokens)[:-1])
    expected = -np.asarray(log_probabilities)[np.arange(length), tokens[0]]
    for cuts in ((), (1,), (LENGTH - 1, LENGTH), (3, 3 + LENGTH, 3 * LENGTH + 1)):
        reader = case.reader()
        parts = [reader.read(part) for part in np.split(tokens, cuts, axis=1)]
        nats, is_likeliest = (np.concatenate(of_parts, axis=1)[0] for of_parts in zip(*parts, strict=True))
        np.testing.assert_allclose(nats, expected, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(is_likeliest, np.argmax(log_probabilities, axis=-1) == tokens[0])
        assert reader.num_tokens == length


def test_what_is_remembered_is_the_same_bit_for_bit_whether_it_was_read_or_written(case: Case):
    writer, prompt = case.reader(), text(LENGTH + 3)
    writer.read(prompt)
    written = write(writer, 3 * LENGTH)
    reader = case.reader()
    reader.read(np.concatenate([prompt, written], axis=1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(reader.state.context):
        same = jax.tree_util.tree_leaves_with_path(writer.state.context)
        np.testing.assert_array_equal(leaf, dict(same)[path], err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(reader.state.inputs, writer.state.inputs)


def test_beginning_a_segment_twice_is_beginning_it_once(case: Case):
    """An open segment's context has begun; when the segment passes as a whole it begins again."""
    reader = case.reader()
    reader.read(text(3 * LENGTH))
    once = jax.tree.map(np.asarray, reader.state.context)
    jax.tree.map(np.testing.assert_array_equal, once, case.decoder.prepare(reader.state.context))


def test_no_position_and_no_length_compiles_again(case: Case, caplog: pytest.LogCaptureFixture):
    def use(prompt_length: int) -> None:
        reader = case.reader()
        reader.read(text(prompt_length))
        for _ in reader.generate(LENGTH + 2, Sampling(0.5 + prompt_length, top_k=prompt_length), 0, ANYTHING):
            pass

    use(LENGTH + 1)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for prompt_length in (0, 2, LENGTH, 2 * LENGTH + 1):
            use(prompt_length)
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 7)(np.ones(3))
        assert "Compiling" in caplog.text, "the test cannot see what it forbids"


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_what_is_written_does_not_depend_on_how_many_tokens_the_device_draws_at_once(
    case: Case, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    expected, other = case.reader(), case.reader()
    prompt = text(LENGTH - 1)
    expected.read(prompt)
    other.read(prompt)
    pass_at_once(monkeypatch, 32)
    written = write(expected, 2 * LENGTH + 1)
    pass_at_once(monkeypatch, at_once)
    np.testing.assert_array_equal(write(other, 2 * LENGTH + 1), written)


@pytest.mark.parametrize("num_read", [1, 3, LENGTH, LENGTH + 2])
def test_whoever_stops_early_has_not_read_what_the_device_has_drawn_since(
    case: Case, num_read: int, monkeypatch: pytest.MonkeyPatch
):
    pass_at_once(monkeypatch, 5)
    stopped, expected = case.reader(), case.reader()
    written = list(itertools.islice(stopped.generate(3 * LENGTH, ANY_TOKEN, 3, ANYTHING), num_read))
    np.testing.assert_array_equal(write(expected, num_read, seed=3), np.stack(written, axis=1))
    assert stopped.num_tokens == expected.num_tokens == num_read
    jax.tree.map(np.testing.assert_array_equal, stopped.state, expected.state)
    # It goes on as if nothing had been drawn.
    np.testing.assert_array_equal(write(stopped, LENGTH + 1, seed=4), write(expected, LENGTH + 1, seed=4))


def test_writing_may_be_interrupted_anywhere(case: Case):
    expected = write(case.reader(), 2 * LENGTH + 1, seed=5)
    parts, written = case.reader(), []
    for num_tokens in (1, LENGTH - 1, 2, LENGTH - 1):
        written.append(write(parts, num_tokens, seed=5))
        parts = parts.fork(1)
    np.testing.assert_array_equal(np.concatenate(written, axis=1), expected)


def test_what_is_kept_has_one_shape_and_dtype_while_a_segment_is_open(case: Case):
    """Also of a model in bfloat16."""
    config = dataclasses.replace(case.config, dtype="bfloat16")
    decoder, tokens = Decoder(config, LENGTH), np.zeros((1, LENGTH), np.int32)
    context = jax.eval_shape(lambda: config.init_context(1, LENGTH))
    _, prefilled = jax.eval_shape(decoder.prefill, case.weights, context, tokens, tokens)
    place = np.int32(0)
    segment = OpenSegment(tokens[:, 0], place, place, prefilled)
    arguments = (case.weights, context, segment, Sampling().arrays(ANYTHING, 0), place)
    cached = jax.eval_shape(decoder.decode, *arguments)[1].kv_cache
    assert prefilled == cached
    floats = [leaf.dtype for leaf in jax.tree.leaves(cached) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("bfloat16")}


def test_rows_that_write_side_by_side_do_not_notice_each_other():
    case, length = Case(VARIANTS[-1]), LENGTH + 5
    reader = case.reader()
    reader.read(text(length))
    alone = write(reader.fork(1), 2 * LENGTH)
    together, logits = write_stepwise(case, reader.fork(3), 2 * LENGTH)
    np.testing.assert_array_equal(write(reader.fork(3), 2 * LENGTH), together)
    np.testing.assert_array_equal(together[:1], alone)
    assert len({tuple(row) for row in together.tolist()}) == 3
    # Each row remembers what it has written itself.
    for row in range(3):
        expected = case.teacher_forced(np.concatenate([text(length), together[row : row + 1]], axis=1))
        np.testing.assert_allclose(logits[row], expected[length:-1], rtol=0, atol=2e-5)
    # And the reader that they came from has not moved.
    assert reader.num_tokens == length
    np.testing.assert_array_equal(write(reader, 2 * LENGTH), alone)


@dataclasses.dataclass(frozen=True)
class WholeSegments(FullAttention):
    """A mechanism that does not pass segments token by token, and says so."""

    can_decode: ClassVar[bool] = False

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return Mean(name=name)


class Mean(nn.Module):
    def __call__(self, x: jax.Array, segment: Segment, state: tuple) -> tuple[jax.Array, tuple, Report]:
        return jnp.cumsum(x, axis=1) / segment.layout.size, state, Report()


def test_a_mechanism_that_reads_whole_segments_only_is_refused():
    """Not decoded wrongly."""
    config = Mechanism("mean", attention=WholeSegments()).config
    params = init_params(config, 1, LENGTH, jax.random.key(0))
    context = config.init_context(1, LENGTH)
    tokens, flags = text(LENGTH), np.ones((1, LENGTH), bool)
    assert apply_model(config, params, tokens, flags, flags[:, 0], context).logits.shape == (1, LENGTH, VOCAB)
    with pytest.raises(UserError, match=r"@WholeSegments\(\) reads whole segments only"):
        Decoder(config, LENGTH)


def test_nobody_decodes_who_does_not_say_so():
    """A mechanism of somebody's own that knows nothing of decoding must not be decoded wrongly."""
    assert not Attention.can_decode


def test_a_model_whose_positions_see_later_ones_is_refused():
    config = dataclasses.replace(
        Mechanism("encoder", attention=FullAttention()).config, recurrent_tokens=RecurrentTokens(2, version="encoder")
    )
    with pytest.raises(UserError, match=r"RecurrentTokens\.version = 'encoder'"):
        Decoder(config, LENGTH)
