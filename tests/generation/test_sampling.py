"""What may be drawn, and how often it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.errors import UserError
from memorizing.generation.sampling import Sampling, SamplingArrays, draw

VOCAB = 12
ANYTHING = np.ones(VOCAB, bool)
DRAW = jax.jit(draw)


def drawn(logits: np.ndarray, sampling: Sampling, num_draws: int = 512, allowed: np.ndarray = ANYTHING) -> np.ndarray:
    """Tokens drawn from the same logits in different rows."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num_draws, VOCAB))
    return np.asarray(DRAW(rows, 0, sampling.arrays(allowed, 0)))


def nucleus(logits: np.ndarray, sampling: Sampling, allowed: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Reference: the tokens that may be drawn, and the probability of each token, written as the definitions are."""
    ranked = sorted(np.flatnonzero(allowed), key=lambda token: -logits[token])
    ranked = ranked[: 1 if sampling.temperature == 0 else sampling.top_k or None]
    scaled = logits[ranked] / (sampling.temperature or 1.0)
    p = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    count = next(n for n in range(1, len(ranked) + 1) if p[:n].sum() >= sampling.top_p - 1e-6 or n == len(ranked))
    probabilities = np.zeros(VOCAB)
    probabilities[ranked[:count]] = p[:count] / p[:count].sum()
    return ranked[:count], probabilities


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB + 1),
    top_p=st.sampled_from([0.05, 0.4, 0.9, 1.0]),
    num_allowed=st.integers(1, VOCAB),
)
def test_tokens_are_drawn_as_often_as_they_are_probable(
    seed: int, temperature: float, top_k: int, top_p: float, num_allowed: int
):
    rng = np.random.default_rng(seed)
    logits, allowed = rng.normal(0, 2, VOCAB), rng.permutation(VOCAB) < num_allowed
    sampling = Sampling(temperature, top_k, top_p)
    possible, probabilities = nucleus(logits, sampling, allowed)
    tokens = drawn(logits, sampling, 2048, allowed)
    assert set(tokens) <= set(possible)
    shares = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    # Four and a half standard deviations of a share.
    np.testing.assert_array_less(np.abs(shares - probabilities), 4.5 * np.sqrt(0.25 / len(tokens)))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.integers(0, VOCAB),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
)
def test_a_seed_draws_the_token_that_is_drawn_among_tokens_in_order(
    seed: int, temperature: float, top_k: int, top_p: float
):
    """What was written with a seed once is written again."""
    rng = np.random.default_rng(seed)
    # Many are equal, some of them to 0, which has two signs.
    logits = np.round(rng.normal(0, 2, (64, VOCAB))).astype(np.float32) * rng.choice([-1, 1], (64, 1))
    sampling, position = Sampling(temperature, top_k, top_p).arrays(rng.random(VOCAB) < 0.9, seed), 5
    np.testing.assert_array_equal(DRAW(logits, position, sampling), in_order(logits, position, sampling))


@jax.jit
def in_order(logits: jax.Array, position: int, sampling: SamplingArrays) -> jax.Array:
    """Reference: tokens in the order of their logits, and a draw among the first ones."""
    logits, ranks = jnp.where(sampling.allowed[None], logits, -jnp.inf), jnp.arange(VOCAB)[None]
    tokens = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, tokens, axis=-1) / sampling.temperature
    scaled = jnp.where(ranks < sampling.top_k, scaled, -jnp.inf)
    p = jax.nn.softmax(scaled, axis=-1)
    is_candidate = (jnp.cumsum(p, axis=-1) - p < sampling.top_p) | (ranks == 0)
    scaled = jnp.where(is_candidate, scaled, -jnp.inf)

    def of_row(row: jax.Array, scaled: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
        return jax.random.categorical(key, scaled)

    drawn = jax.vmap(of_row)(jnp.arange(len(logits)), scaled)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def test_temperature_0_takes_the_first_of_the_most_probable():
    logits = np.array([0, 3, 1, 3, 2, 0, 0, 0, 0, 0, 0, 0.0])
    assert set(drawn(logits, Sampling(temperature=0, top_p=1.0))) == {1}


def test_of_equal_tokens_exactly_k_are_left():
    assert set(drawn(np.zeros(VOCAB), Sampling(1.0, top_k=3, top_p=1.0))) == {0, 1, 2}


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]):
    with pytest.raises(UserError, match=f"{next(iter(setting))} = .*: "):
        Sampling(**setting)
