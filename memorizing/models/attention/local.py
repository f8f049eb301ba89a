"""Attention to the keys of a segment and to those that are carried in front of it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from memorizing.array_typing import HeadScale, Keys, Queries, Tree, Values
from memorizing.context import Report, Segment
from memorizing.models import kernels, masks, positions
from memorizing.models.attention import flash
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.flash import KernelKind
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.layers import soft_cap
from memorizing.models.masks import DistancesAndKeys, Visible
from memorizing.models.positions import Rotary


class Attended(NamedTuple):
    """Attention to some keys.

    Attributes:
      values: [B, T, N, H].
      log_normalizer: float32 [B, T, N], logarithm of the sum of exponentials; costs nothing unless it is used.
    """

    values: Queries
    log_normalizer: Float[Array, "B T N"]


class Carried(NamedTuple):
    """What is carried in front of a segment's keys: [B, W, K, H] of both, or None where nothing is."""

    keys: Keys | None = None
    values: Values | None = None


class LocalCore(nn.Module):
    """The dot-product core of attention to a segment and to what is carried in front of it: see `Attention.core`.

    As it is, nothing is carried: the methods below `attend` say what.
    """

    attention: BiasedAttention
    dims: LayerDims

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: Tree,
    ) -> tuple[Queries, Tree | None, Report]:
        attended, new_state, report = self.attend(queries, keys, values, scale, segment, state)
        return attended.values, new_state, report

    @nn.compact
    def attend(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: Tree,
        soft_mask: Float[Array, "N T all_S"] | None = None,
    ) -> tuple[Attended, Tree | None, Report]:
        """The same, with the normalisers of its softmax; and perhaps with a soft mask, see `local_attention`.

        The mask is over all keys: those that are carried, and the segment's.
        """
        state = self.readable(state)
        carried = self.carried(state)
        # [B, S, K, H], S = W + T
        all_keys = segment.with_kv_cache("keys", keys, carried.keys)
        all_values = segment.with_kv_cache("values", values, carried.values)
        num_queries = queries.shape[1]
        num_keys = all_keys.shape[1]

        visible = self.visible(segment, num_queries, num_keys, state)
        bias = self.attention.position_bias(self.dims, segment, num_queries, num_keys)
        placed = self.placed(segment, queries, all_keys, state)
        attended = local_attention(
            *placed,
            all_values,
            scale,
            bias,
            visible,
            num_carried=0 if segment.decoding is not None else num_keys - keys.shape[1],
            logit_cap=self.dims.attention_logit_cap,
            soft_mask=soft_mask,
            kernel=self.dims.attention_kernel,
        )

        if segment.decoding is not None:
            return attended, None, Report(kv_cache={"keys": all_keys, "values": all_values})
        return attended, self.next_state(segment, keys, values, state), Report()

    def readable(self, state: Tree) -> Tree:
        """The state with zeros where it holds nothing, and no gradient: see `hide`. The methods below are given it."""
        return state

    def carried(self, state: Tree) -> Carried:
        """What is carried in front of the segment. It gets no gradient."""
        return Carried()

    def visible(self, segment: Segment, num_queries: int, num_keys: int, state: Tree) -> Visible:
        """Which of the keys [carried; segment] each query sees."""
        return visible_by_distance(segment, num_queries)

    def placed(self, segment: Segment, queries: Queries, keys: Keys, state: Tree) -> tuple[Queries, Keys]:
        """Queries and keys [carried; segment] as the logits need them: see `at_positions`."""
        return at_positions(self.dims, segment, queries, keys)

    def next_state(self, segment: Segment, keys: Keys, values: Values, state: Tree) -> Tree:
        """The state after a whole segment, given its keys and values."""
        return state


def local_attention(
    queries: Queries,
    keys: Keys,
    values: Values,
    scale: HeadScale,
    by_distance: Float[Array, "N R"] | None,
    visible: Visible,
    *,
    num_carried: int = 0,
    logit_cap: float = 0.0,
    soft_mask: Float[Array, "N T S"] | None = None,
    kernel: KernelKind = "none",
) -> Attended:
    """softmax(scale * (q . k + bias)) v over the visible keys; query head n reads key head n // (N / K).

    Args:
      queries, keys, values: N heads of queries, K of the others.
      scale: of the logits.
      by_distance: the bias, R = S + T - 1 numbers a head in the order of `positions.distances`; None for none.
      visible: which keys each query sees.
      num_carried: keys and values in front that get no gradient, so that none is computed for them.
      logit_cap: see `layers.soft_cap`.
      soft_mask: logarithm of factors of the exponentials; None for none.
      kernel: see `flash.serves`; with a cap or a soft mask the plain form is used.
    """
    if not logit_cap and soft_mask is None and flash.serves(kernel, queries, keys, num_carried):
        return Attended(*flash.attention(kernel, queries, keys, values, scale, by_distance, visible, num_carried))
    with jax.named_scope("local_attention"):
        logits = _products(queries, keys, num_carried)
        if by_distance is not None:
            logits = logits + positions.same_by_key(by_distance, *logits.shape[2:])[None]
        logits = logits * scale[None, :, None, None]
        logits = soft_cap(logits, logit_cap)
        if soft_mask is not None:
            logits = logits + soft_mask[None]

        weights = attention_weights(logits, visible.mask)
        weights = weights.astype(values.dtype)
        # [B, N, T]
        log_normalizer = jax.nn.logsumexp(_visible_logits(logits, visible.mask), axis=-1)
        return Attended(_averages(weights, values, num_carried), log_normalizer.swapaxes(1, 2))


def _products(queries: Queries, keys: Keys, num_carried: int) -> Float[Array, "B N T S"]:
    """query . key, float32."""
    if queries.shape[2] == keys.shape[2]:
        return _einsum("BTNH,BSNH->BNTS", queries, keys, num_carried, jnp.float32)
    num_rows, num_queries, num_heads, _ = queries.shape
    # [B, K, N / K, T, S]
    products = _einsum("BTKGH,BSKH->BKGTS", in_groups(queries, keys.shape[2]), keys, num_carried, jnp.float32)
    return products.reshape(num_rows, num_heads, num_queries, -1)


def _averages(weights: Float[Array, "B N T S"], values: Values, num_carried: int) -> Queries:
    """The values of each query's keys by their weights."""
    num_rows, num_heads, num_queries, num_keys = weights.shape
    num_kv_heads = values.shape[2]
    if num_heads == num_kv_heads:
        return _einsum("BNTS,BSNH->BTNH", weights, values, num_carried)
    grouped = weights.reshape(num_rows, num_kv_heads, -1, num_queries, num_keys)
    # [B, T, K, N / K, H]
    averages = _einsum("BKGTS,BSKH->BTKGH", grouped, values, num_carried)
    return averages.reshape(num_rows, num_queries, num_heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _einsum(axes: str, left: Array, right: Array, num_fixed: int, dtype: Any = None) -> Array:
    """`jnp.einsum`, whose gradient leaves out the first places of `right` along S: it is 0 there."""
    return jnp.einsum(axes, left, right, preferred_element_type=dtype)


def _einsum_forward(axes: str, left: Array, right: Array, num_fixed: int, dtype: Any) -> tuple[Array, Any]:
    return _einsum(axes, left, right, num_fixed, dtype), (left, right)


def _einsum_backward(axes: str, num_fixed: int, dtype: Any, inputs: Any, gradient: Array) -> tuple[Array, Array]:
    left, right = inputs
    of_left, of_right, of_output = axes.replace("->", ",").split(",")

    def rest(axes: str, array: Array) -> Array:
        return jax.lax.slice_in_dim(array, num_fixed, None, axis=axes.index("S")) if "S" in axes else array

    _, pull_left = jax.vjp(lambda left: jnp.einsum(axes, left, right, preferred_element_type=dtype), left)
    others = rest(of_left, left)
    _, pull_right = jax.vjp(
        lambda right: jnp.einsum(axes, others, right, preferred_element_type=dtype), rest(of_right, right)
    )
    (for_left,) = pull_left(gradient)
    (for_rest,) = pull_right(rest(of_output, gradient))
    padding = [(num_fixed if axis == "S" else 0, 0) for axis in of_right]
    return for_left, jnp.pad(for_rest, padding)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def in_groups(queries: Shaped[Array, "B T N *rest"], num_kv_heads: int) -> Shaped[Array, "B T K G *rest"]:
    """Query heads by the key head that they read, G = N / K for each."""
    num_rows, num_queries, _, *rest = queries.shape
    return queries.reshape(num_rows, num_queries, num_kv_heads, -1, *rest)


def at_positions(
    dims: LayerDims,
    segment: Segment,
    queries: Queries,
    keys: Keys,
) -> tuple[Queries, Keys]:
    """Queries and keys as the logits need them: turned where positions are rotary, else as they are.

    Keys are carried and cached as they were before, since positions are counted anew in every segment.

    Args:
      dims: of the layer.
      segment: whose positions, or some of them, the queries are.
      queries: [B, T, N, H].
      keys: [carried; segment], [B, S, K, H].
    """
    rotary = dims.positions
    if not isinstance(rotary, Rotary):
        return queries, keys
    num_keys = keys.shape[1]
    # The segment's first position is 0.
    of_keys = jnp.arange(segment.layout.size - num_keys, segment.layout.size)
    turned_keys = rotary.turn(keys, of_keys[None, :, None])
    return turned_queries(rotary, segment, queries), turned_keys


def turned_queries(rotary: Rotary, segment: Segment, queries: Queries) -> Queries:
    """Queries turned by their positions in the segment."""
    of_segment = jnp.arange(segment.layout.size)
    of_queries = segment.select(of_segment, queries.shape[1])
    return rotary.turn(queries, of_queries[None, :, None])


def hide(
    cached: Shaped[Array, "B W *rest"],
    valid: Bool[Array, "B W"],
) -> Shaped[Array, "B W *rest"]:
    """Carried slots [B, W, ...] with zeros where they are empty, and no gradient.

    Empty slots may hold anything. A mask would turn NaN into 0 * NaN, which is NaN.
    """
    rest = (1,) * (cached.ndim - 2)
    valid = valid.reshape(valid.shape + rest)
    cached = jax.lax.stop_gradient(cached)
    return jnp.where(valid, cached, 0)


def push(
    slots: Shaped[Array, "B W *rest"],
    entering: Shaped[Array, "B T *rest"],
) -> Shaped[Array, "B W *rest"]:
    """The last W of [slots; entering], oldest first, and no gradient."""
    num_slots = slots.shape[1]
    both = jnp.concatenate([slots, entering], axis=1)
    last = both[:, -num_slots:]
    return jax.lax.stop_gradient(last)


def visible_keys(
    segment: Segment,
    num_queries: int,
    valid: Bool[Array, "B W"] | None = None,
) -> Bool[Array, "B T S"]:
    """Which of the keys [carried; segment] each query sees: those that the layout shows and that hold something.

    Every position sees at least itself, so that no row of the mask is empty.

    Args:
      segment: whose positions, or some of them, the queries are.
      num_queries: T.
      valid: which of the carried keys hold something; None where nothing is carried.
    """
    # [B, S]
    holds_key = segment.is_real if valid is None else segment.with_cached(valid)
    size = segment.layout.size
    num_keys = holds_key.shape[1]
    num_cached = num_keys - size

    # [T, S]
    shown = segment.select(masks.visible(segment.layout, num_cached), num_queries)
    itself = segment.select(masks.itself(size, num_keys), num_queries)

    # [B, T, S]
    seen = shown[None] & holds_key[:, None, :]
    return seen | itself[None]


def visible_by_distance(
    segment: Segment,
    num_queries: int,
    valid: Bool[Array, "B W"] | None = None,
    window: int | None = None,
) -> Visible:
    """`visible_keys`, and for a whole segment without memory tokens how distance and key decide it.

    Args:
      segment, num_queries, valid: see `visible_keys`.
      window: each query sees so many keys up to its own; None for all.
    """
    mask = visible_keys(segment, num_queries, valid)
    layout = segment.layout
    num_keys = mask.shape[2]
    if window is not None:
        near = masks.within(window, layout.size, num_keys)
        mask &= segment.select(near, num_queries)[None]
    if segment.decoding is not None or layout.num_read or layout.num_write:
        return Visible(mask)
    distances = positions.distances(layout.size, num_keys)
    seen = (distances >= 0) | layout.bidirectional
    if window is not None:
        seen &= distances < window
    holds_key = segment.is_real if valid is None else segment.with_cached(valid)
    return Visible(mask, DistancesAndKeys(seen, holds_key))


def attention_weights(
    logits: Float[Array, "B N T S"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T S"]:
    """softmax over the visible keys, float32.

    Args:
      logits: float32.
      mask: true where a key is visible; every query has a visible key.
    """
    return jax.nn.softmax(_visible_logits(logits, mask), axis=-1)


def _visible_logits(
    logits: Float[Array, "B N T S"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T S"]:
    return jnp.where(mask[:, None], logits, kernels.HIDDEN)
