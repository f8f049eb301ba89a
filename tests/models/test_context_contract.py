"""Laws 1-5 of everything that carries context, for every mechanism of mechanisms.py.

At the level of the language model.

What a user relies on: a new document starts as on a fresh model, whatever the row held before; a prediction never
depends on a later token, on padding or on another row.
Where nothing may change the tests ask for equal bits: the same compiled program runs on both inputs, so rounding is no
excuse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import ALL_REAL, LENGTH, MECHANISMS, NO_START, ROWS, VOCAB, Mechanism, random_tokens

from memorizing import context as context_lib
from memorizing.context import Context

by_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)


# Law 2: every leaf has the row axis first.


def test_leaves_have_the_row_axis_first(mechanism: Mechanism):
    """Splitting, sharding and dropping rows are generic only because of this."""

    def check(leaf: jax.Array, names: tuple[str, ...]) -> None:
        assert len(names) == leaf.ndim
        assert leaf.ndim == 0 or (names[0] == "batch" and leaf.shape[0] == 5)

    jax.tree.map(check, mechanism.config.init_context(5, LENGTH), mechanism.config.context_axes())


def test_state_axes_and_fresh_state_have_one_structure(mechanism: Mechanism):
    for group in mechanism.config.groups:
        attention = group.attention
        state = jax.tree.structure(attention.init_state(mechanism.config.dims, ROWS, LENGTH))
        assert state == jax.tree.structure(
            attention.state_axes(), is_leaf=lambda leaf: type(leaf) is tuple and leaf != ()
        )
        assert state == jax.tree.structure(attention.fresh_state(), is_leaf=lambda leaf: leaf is None)


def test_a_step_keeps_shapes_and_dtypes_of_the_context(mechanism: Mechanism):
    """Else the second step would compile again, or a checkpoint would not fit."""
    fresh, used = mechanism.model.fresh_context(), mechanism.model.context_after(1)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, used)
    assert jax.tree.map(jnp.result_type, fresh) == jax.tree.map(jnp.result_type, used)


@given(
    parts=st.integers(1, 4),
    rows_per_part=st.integers(1, 3),
    trailing=st.lists(st.integers(0, 3), max_size=3),
)
def test_split_rows_and_join_rows_are_inverse(parts: int, rows_per_part: int, trailing: list[int]):
    shape = (parts * rows_per_part, *trailing)
    tree = {"rows": np.arange(np.prod(shape)).reshape(shape), "clock": np.asarray(7)}
    split = context_lib.split_rows(tree, parts)
    assert split["rows"].shape == (parts, rows_per_part, *trailing)
    joined = context_lib.join_rows(split)
    np.testing.assert_array_equal(joined["rows"], tree["rows"])
    np.testing.assert_array_equal(joined["clock"], 7)


# Law 3: reset is exact and cheap.


def poisoned(context: Context, rows: np.ndarray, value: float) -> Context:
    """The context with every float of these rows replaced: stored keys and values, whatever else is carried."""

    def poison(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(rows.reshape((-1,) + (1,) * (leaf.ndim - 1)), jnp.asarray(value, leaf.dtype), leaf)

    return jax.tree.map(poison, context)


@pytest.mark.parametrize("poison", [None, np.nan, np.inf])
def test_a_reset_row_is_fresh_and_the_others_do_not_notice(mechanism: Mechanism, poison: float | None):
    model, rng = mechanism.model, np.random.default_rng(0)
    start = np.array([True, False, True])
    used = model.context_after(5)
    old = used if poison is None else poisoned(used, start, poison)
    fresh, kept = model.fresh_context(), used
    # The segments after the reset are where a slot comes back that was only hidden.
    for segment in range(3):
        tokens, flags = random_tokens(rng), start & (segment == 0)
        logits, old = model.forward(tokens, ALL_REAL, flags, old)
        fresh_logits, fresh = model.forward(tokens, ALL_REAL, flags, fresh)
        kept_logits, kept = model.forward(tokens, ALL_REAL, NO_START, kept)
        if segment == 0:
            np.testing.assert_array_equal(logits[start], fresh_logits[start])
            differs = np.abs(logits[start] - kept_logits[start]).max() > 1e-3
            assert differs == mechanism.carries_context, "the test cannot see what it forbids"
        # Later the same memories may lie in other slots, and are added in another order.
        np.testing.assert_allclose(logits[start], fresh_logits[start], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(logits[~start], kept_logits[~start])
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_gradients_are_finite_after_a_reset_of_a_poisoned_row(mechanism: Mechanism, poison: float):
    model, rng = mechanism.model, np.random.default_rng(0)
    start = np.array([True, False, True])
    context = poisoned(model.context_after(5), start, poison)
    for flags in (start, NO_START):
        tokens = random_tokens(rng)
        (to_params, _), _ = model.gradients(tokens, ALL_REAL, flags, context)
        for path, leaf in jax.tree_util.tree_leaves_with_path(to_params):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        _, context = model.forward(tokens, ALL_REAL, flags, context)


def test_reset_does_not_touch_what_is_stored(mechanism: Mechanism):
    """A memory can be hundreds of GiB: a reset that rewrites it costs more than the step."""
    context = mechanism.model.context_after(2)
    for group in mechanism.config.groups:
        state = context[group.name]
        reset = context_lib.reset_rows(state, group.attention.fresh_state(), np.ones(ROWS, bool))
        before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, reset))
        fresh = jax.tree.leaves(group.attention.fresh_state(), is_leaf=lambda leaf: leaf is None)
        for (path, old), (_, new), value in zip(before, after, fresh, strict=True):
            if value is None:
                assert old.dtype != bool and new is old, jax.tree_util.keystr(path)
            else:
                # A flag, or a count for each row.
                assert (np.asarray(new) == value).all(), jax.tree_util.keystr(path)


# Law 5: nothing leaks.


def test_influence_by_gradient_is_causal_and_stays_in_its_row(mechanism: Mechanism):
    model, rng = mechanism.model, np.random.default_rng(0)
    influence = np.asarray(model.influence(random_tokens(rng), ALL_REAL, NO_START, model.context_after(3)))
    # [B, T, B, S]
    same_row = np.eye(ROWS, dtype=bool)[:, None, :, None]
    not_later = np.tri(LENGTH, dtype=bool)[None, :, None, :]
    allowed = np.broadcast_to(same_row & not_later, influence.shape)
    assert (influence[~allowed] == 0).all()
    assert (influence[allowed] > 0).all(), "the test cannot see what it forbids"


@by_mechanism
@settings(max_examples=20)
@given(
    row=st.integers(0, ROWS - 1),
    position=st.integers(0, LENGTH - 1),
    token=st.integers(1, VOCAB - 1),
    seed=st.integers(0, 9),
)
def test_a_token_changes_nothing_before_it_and_nothing_in_other_rows(
    mechanism: Mechanism, row: int, position: int, token: int, seed: int
):
    """Also what no gradient shows: the choice of neighbours, and what later segments see."""
    model, rng = mechanism.model, np.random.default_rng(seed)
    context, tokens, later = model.context_after(3), random_tokens(rng), random_tokens(rng)
    changed = tokens.copy()
    changed[row, position] = token
    (logits, after), (changed_logits, changed_after) = (
        model.forward(each, ALL_REAL, NO_START, context) for each in (tokens, changed)
    )
    others = np.arange(ROWS) != row
    if mechanism.order_of_sums_depends_on_later_tokens:
        np.testing.assert_allclose(logits[row, :position], changed_logits[row, :position], rtol=0, atol=1e-5)
    elif not mechanism.later_tokens_decide_what_is_seen:
        np.testing.assert_array_equal(logits[row, :position], changed_logits[row, :position])
    np.testing.assert_array_equal(logits[others], changed_logits[others])
    logits, changed_logits = (model.forward(later, ALL_REAL, NO_START, each)[0] for each in (after, changed_after))
    np.testing.assert_array_equal(logits[others], changed_logits[others])


def test_the_order_of_rows_does_not_matter(mechanism: Mechanism):
    model, order = mechanism.model, np.array([2, 0, 1])
    tokens, start = random_tokens(np.random.default_rng(0)), np.array([False, True, False])
    context = model.context_after(3)
    permuted = jax.tree.map(lambda leaf: leaf[order] if leaf.ndim else leaf, context)
    logits, _ = model.forward(tokens, ALL_REAL, start, context)
    permuted_logits, _ = model.forward(tokens[order], ALL_REAL, start[order], permuted)
    np.testing.assert_allclose(permuted_logits, logits[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_real", [1, 5, LENGTH - 1])
def test_padding_is_neither_seen_nor_stored(mechanism: Mechanism, num_real: int):
    model, rng = mechanism.model, np.random.default_rng(0)
    is_real = ALL_REAL & (np.arange(LENGTH) < num_real)
    tokens, later = random_tokens(rng), random_tokens(rng)
    other_padding = np.where(is_real, tokens, random_tokens(rng))
    context = model.context_after(3)
    (logits, after), (other_logits, other_after) = (
        model.forward(each, is_real, NO_START, context) for each in (tokens, other_padding)
    )
    np.testing.assert_array_equal(logits[:, :num_real], other_logits[:, :num_real])
    for _ in range(2):
        logits, after = model.forward(later, ALL_REAL, NO_START, after)
        other_logits, other_after = model.forward(later, ALL_REAL, NO_START, other_after)
        np.testing.assert_array_equal(logits, other_logits)


def test_what_was_read_before_is_seen_exactly_where_promised(mechanism: Mechanism):
    """The other side of no leak: a mechanism that carries context uses it."""
    model, tokens = mechanism.model, random_tokens(np.random.default_rng(0))
    logits, fresh_logits = (
        model.forward(tokens, ALL_REAL, NO_START, context)[0]
        for context in (model.context_after(3), model.fresh_context())
    )
    difference = np.abs(logits - fresh_logits).max(axis=-1)
    assert (difference > 1e-3).any() if mechanism.carries_context else (difference == 0).all()


def test_two_segments_equal_one_of_twice_the_length(mechanism: Mechanism):
    if not mechanism.two_segments_equal_one:
        pytest.skip("not promised")
    model, tokens = mechanism.model, random_tokens(np.random.default_rng(0), 2 * LENGTH)
    start, context, halves = np.ones(ROWS, bool), model.context_after(3), []
    for half in np.split(tokens, 2, axis=1):
        logits, context = model.forward(half, ALL_REAL, start, context)
        halves.append(logits)
        start = NO_START
    long = model.fresh_context(length=2 * LENGTH)
    whole, _ = model.forward(tokens, np.ones_like(tokens, bool), NO_START, long)
    np.testing.assert_allclose(np.concatenate(halves, axis=1), whole, rtol=0, atol=1e-5)


def test_no_gradient_enters_or_leaves_what_is_carried(mechanism: Mechanism):
    """Of the steps before nothing is left to differentiate.

    A gradient into the context would be lost work, one out of it a wrong update.
    """
    if mechanism.gradient_reaches_context:
        pytest.skip("gradient flows within a step")
    model, tokens = mechanism.model, random_tokens(np.random.default_rng(0))
    of_loss, of_carried = model.gradients(tokens, ALL_REAL, NO_START, model.context_after(3))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(of_loss[0]))
    assert not any(np.any(leaf) for leaf in of_loss[1]), "into the context"
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_carried[0])), "out of the context"
