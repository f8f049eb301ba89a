"""A Transformer-XL cache (Dai et al. 2019) of keys and values.

Every position also sees the last W positions before its segment, and, if asked for, the first positions of its document
(the attention sinks of Xiao et al. 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from memorizing.array_typing import AxesTree, Keys, Queries, Values
from memorizing.context import Layout, Segment
from memorizing.errors import Count, Range, UserError
from memorizing.models import masks
from memorizing.models.attention.base import Example, LayerDims, attend_flops, projection_flops
from memorizing.models.attention.local import (
    Carried,
    LocalCore,
    hide,
    push,
    turned_queries,
    visible_by_distance,
    visible_keys,
)
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.masks import Visible
from memorizing.models.positions import LayerPositions, Rotary


@struct.dataclass
class Sinks:
    """The first positions of the row's document.

    Attributes:
      keys, values: [B, sinks, K, H] in the dtype of the activations.
      valid: bool [B, sinks].
      num_before: int32 [B], positions of the document before the segment that comes next.
    """

    keys: Keys | Any
    values: Values | Any
    valid: Bool[Array, "B _"] | Any
    num_before: Int[Array, "B"] | Any


@struct.dataclass
class XLState:
    """The last W positions of the row's document.

    Attributes:
      keys, values: [B, W, K, H] in the dtype of the activations.
      valid: bool [B, W].
      sinks: its first positions; () where none are kept.
    """

    keys: Keys | Any
    values: Values | Any
    valid: Bool[Array, "B W"] | Any
    sinks: Sinks | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class XLAttention(BiasedAttention):
    """Attends to the segment and to a cache of the positions before it. No gradient reaches the cache.

    Attributes:
      window: W, in positions.
      num_buckets, max_distance: see `BiasedAttention`.
      same_length: lets every position see exactly the last W positions up to itself (a sliding window), instead of the
        whole cache.
      positions: of these layers, where they have others than the model (`LMConfig.positions`).
      num_sinks: first positions of a document that stay visible when the window has left them. They stand where they
        are in the document, but never further away than directly in front of the cache: so no distance grows with the
        document. A pretrained model that slides its window over a document breaks without the first few.
    """

    can_decode: ClassVar[bool] = True
    takes_all_parts: ClassVar[bool] = True

    window: Count = 512
    same_length: bool = False
    positions: LayerPositions = None
    num_sinks: Annotated[int, Range(0, 2**16)] = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(
                f"XLAttention.window = {self.window}: at least 1 position; without a cache use @FullAttention()"
            )
        super().__post_init__()

    @property
    def num_before(self) -> int:
        """The cache."""
        return self.window

    @property
    def joins_memory(self) -> bool:
        """Whether all positions of a segment see the same cache."""
        return not self.same_length

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> XLState:
        def empty(num_positions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            shape = (batch_size, num_positions, dims.kv_heads, dims.head_dim)
            return jnp.zeros(shape, dims.dtype), jnp.zeros(shape, dims.dtype), jnp.zeros(shape[:2], bool)

        if not self.num_sinks:
            return XLState(*empty(self.window))
        return XLState(*empty(self.window), Sinks(*empty(self.num_sinks), jnp.zeros(batch_size, jnp.int32)))

    def state_axes(self) -> AxesTree:
        content = ("batch", "length", "heads", "head_dim")
        valid = ("batch", "length")
        sinks = Sinks(keys=content, values=content, valid=valid, num_before=("batch",))
        return XLState(keys=content, values=content, valid=valid, sinks=sinks if self.num_sinks else ())

    def fresh_state(self) -> XLState:
        sinks = Sinks(keys=None, values=None, valid=False, num_before=0)
        return XLState(keys=None, values=None, valid=False, sinks=sinks if self.num_sinks else ())

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return XLCore(self, dims.with_positions(self.positions), name=name)

    def check_parts(self, dims: LayerDims) -> None:
        super().check_parts(dims)
        positions = dims.with_positions(self.positions).positions
        if isinstance(positions, Rotary):
            positions.check(dims.head_dim)

    def sees_before(self, state: XLState, positions_back: Int[Array, "M"]) -> Bool[Array, "#B M"]:
        is_cached = (positions_back <= self.window)[None, :]
        if not isinstance(state.sinks, Sinks):
            return is_cached
        in_document = state.sinks.num_before[:, None] - positions_back[None, :]
        return is_cached | (in_document < self.num_sinks)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        num_keys = self.num_sinks + self.window + layout.size
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, num_keys)

    def with_window(self, window: int) -> XLAttention:
        """With another window, unless every position sees exactly W, as a model does that was trained with it."""
        return self if self.same_length else dataclasses.replace(self, window=window)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        meaning = f"keys and values of {segment_length} positions in every layer"
        return Example("cache", meaning, cls(window=segment_length))


class XLCore(LocalCore):
    """The dot-product core: see `Attention.core`. The keys are [sinks; cached; segment], S = sinks + W + T."""

    attention: XLAttention
    dims: LayerDims

    def readable(self, state: XLState) -> XLState:
        def shown(slots: Any) -> Any:
            return slots.replace(keys=hide(slots.keys, slots.valid), values=hide(slots.values, slots.valid))

        sinks = shown(state.sinks) if isinstance(state.sinks, Sinks) else ()
        return dataclasses.replace(shown(state), sinks=sinks)

    def carried(self, state: XLState) -> Carried:
        if not isinstance(state.sinks, Sinks):
            return Carried(state.keys, state.values)
        keys = jnp.concatenate([state.sinks.keys, state.keys], axis=1)
        values = jnp.concatenate([state.sinks.values, state.values], axis=1)
        return Carried(keys, values)

    def next_state(self, segment: Segment, keys: Keys, values: Values, state: XLState) -> XLState:
        own = segment.layout.own
        return XLState(
            keys=push(state.keys, own(keys)),
            values=push(state.values, own(values)),
            valid=push(state.valid, own(segment.is_real)),
            sinks=_with_segment(state.sinks, own(keys), own(values), own(segment.is_real)),
        )

    def visible(self, segment: Segment, num_queries: int, num_keys: int, state: XLState) -> Visible:
        config = self.attention
        sinks = state.sinks
        window = config.window if config.same_length else None
        if not isinstance(sinks, Sinks):
            return visible_by_distance(segment, num_queries, state.valid, window)

        # Where keys are, counted from the segment's first position: [B, sinks] and [W + T].
        of_sinks = jnp.arange(config.num_sinks)[None, :] - sinks.num_before[:, None]
        of_others = jnp.arange(-config.window, segment.layout.size)
        # A sink that has not left the cache is seen there.
        is_behind = of_sinks < -config.window
        valid = jnp.concatenate([sinks.valid & is_behind, state.valid], axis=1)
        if window is None:
            return visible_by_distance(segment, num_queries, valid)

        near = masks.within(window, segment.layout.size, len(of_others))
        # [B, W + T]
        is_sink = of_others[None, :] + sinks.num_before[:, None] < config.num_sinks
        is_seen = segment.select(near, num_queries)[None] | is_sink[:, None, :]
        of_sinks_too = jnp.pad(is_seen, ((0, 0), (0, 0), (config.num_sinks, 0)), constant_values=True)
        return Visible(visible_keys(segment, num_queries, valid) & of_sinks_too)

    def placed(self, segment: Segment, queries: Queries, keys: Keys, state: XLState) -> tuple[Queries, Keys]:
        sinks = state.sinks
        rotary = self.dims.positions
        if not isinstance(rotary, Rotary) or not isinstance(sinks, Sinks):
            return super().placed(segment, queries, keys, state)
        num_sinks = self.attention.num_sinks
        window = self.attention.window
        num_rows = keys.shape[0]
        # How far the document's first position is before the segment, at most directly in front of the cache: [B].
        back = jnp.minimum(sinks.num_before, window + num_sinks)
        of_sinks = jnp.arange(num_sinks)[None, :] - back[:, None]
        of_others = jnp.arange(-window, segment.layout.size)[None, :]
        of_others = jnp.broadcast_to(of_others, (num_rows, of_others.shape[1]))
        # [B, S]
        of_keys = jnp.concatenate([of_sinks, of_others], axis=1)
        return turned_queries(rotary, segment, queries), rotary.turn(keys, of_keys[:, :, None])


def _with_segment(
    sinks: Sinks | tuple[()],
    keys: Keys,
    values: Values,
    is_real: Bool[Array, "B T"],
) -> Sinks | tuple[()]:
    """The sinks with those of a segment's own positions that are among the document's first."""
    if not isinstance(sinks, Sinks):
        return ()
    num_sinks = sinks.valid.shape[1]
    length = keys.shape[1]
    # Where each sink is in the segment, [B, sinks].
    place = jnp.arange(num_sinks)[None, :] - sinks.num_before[:, None]
    is_inside = (place >= 0) & (place < length)
    place = jnp.clip(place, 0, length - 1)
    is_new = is_inside & jnp.take_along_axis(is_real, place, axis=1)

    def taken(new: jax.Array, old: jax.Array) -> jax.Array:
        of_place = jnp.take_along_axis(new, place[:, :, None, None], axis=1)
        return jax.lax.stop_gradient(jnp.where(is_new[:, :, None, None], of_place, old))

    return Sinks(
        keys=taken(keys, sinks.keys),
        values=taken(values, sinks.values),
        valid=sinks.valid | is_new,
        num_before=sinks.num_before + length,
    )
