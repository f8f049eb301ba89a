"""The factorised attention of the Sparse Transformer (Child et al. 2019): two small sets of keys for each query.

With a stride l of about the root of the segment's length n, each set holds about l keys, and every earlier position
is reached in two steps. Both sets are blocks of the segment cut into rows of l positions, so that time and memory grow
as n * sqrt(n): no array of all queries by all keys is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.context import Attended, Layout, Report, Segment
from memorizing.errors import Count, UserError
from memorizing.models import partial_softmax, positions
from memorizing.models.attention.base import Example, LayerDims, attend_flops, projection_flops
from memorizing.models.attention.flash import KernelKind
from memorizing.models.attention.local import local_attention
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.sparse import dense
from memorizing.models.attention.sparse.dividing import check_divides, divisor_near_root
from memorizing.models.masks import Visible
from memorizing.models.partial_softmax import Partial

# The segment cut into m blocks of l positions.
Blocks = Float[Array, "B m l N H"]
# Bias of the logits by static distances back in tokens.
Bias = Callable[[np.ndarray], Float[Array, "N *shape"]]


@dataclasses.dataclass(frozen=True)
class SparseAttention(BiasedAttention):
    """Every position sees itself and two sets of earlier ones, at most (section 4 of the paper).

    'strided': the first set are the last l positions, the second every l-th one before. 'fixed': the first set is the
    block of l positions that the query is in, the second the last positions of every block, each head its own. Always
    j <= i:

      strided   first: i - j <= l               second: (i - j) mod l = 0
      fixed     first: floor(j / l) = floor(i / l)   second: j mod l in the head's summary columns

    Attributes:
      pattern: 'strided' or 'fixed'.
      sees: which of the sets: 'first' or 'second', to be interleaved as a pattern of two layers; 'merged', both in
        every head; 'split', the first in one half of the heads and the second in the other.
      stride: l, in positions; divides the segment length.
      summary_width: c, columns of a block that a head sees in the second fixed set; divides the stride. Heads take
        different columns, counted from the block's end.
      num_buckets, max_distance: see `BiasedAttention`.
    """

    can_decode: ClassVar[bool] = True
    caches_segment_only: ClassVar[bool] = True
    tells_attention: ClassVar[bool] = True
    takes_memory_tokens: ClassVar[bool] = False

    pattern: Literal["strided", "fixed"] = "strided"
    sees: Literal["first", "second", "merged", "split"] = "merged"
    stride: Count = 128
    summary_width: Count = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UserError(f"SparseAttention.stride = {self.stride}: at least 1 position")
        if self.pattern == "fixed" and (self.summary_width < 1 or self.stride % self.summary_width):
            raise UserError(
                f"SparseAttention.summary_width = {self.summary_width}: expected a divisor of "
                f"SparseAttention.stride = {self.stride}"
            )

    def check(self, segment_length: int) -> None:
        check_divides("SparseAttention.stride", self.stride, segment_length)

    def heads(self, num_heads: int) -> tuple[range, range]:
        """The heads that see the first set, and those that see the second."""
        every = range(num_heads)
        none = range(0)
        half = (num_heads + 1) // 2
        return {
            "first": (every, none),
            "second": (none, every),
            "merged": (every, every),
            "split": (every[:half], every[half:]),
        }[self.sees]

    def summary_columns(self, place: int) -> Int[np.ndarray, "c"]:
        """The columns of a block that a head sees in the second fixed set; `place` counts the heads that see it."""
        num_parts = self.stride // self.summary_width
        part = num_parts - 1 - place % num_parts
        return np.arange(part * self.summary_width, (part + 1) * self.summary_width)

    def visible(
        self,
        num_heads: int,
        query: Int[Array, "T"],
        key: Int[Array, "S"],
    ) -> Bool[Array, "N T S"]:
        """The keys that each query sees, from their positions: the definition of the sets."""
        stride = self.stride
        query = query[:, None]
        key = key[None, :]
        first = query - key <= stride if self.pattern == "strided" else query // stride == key // stride

        def second(place: int) -> Bool[Array, "T S"]:
            if self.pattern == "strided":
                return (query - key) % stride == 0
            columns = self.summary_columns(place)
            column = jnp.broadcast_to(key % stride, first.shape)
            return (column >= columns[0]) & (column <= columns[-1])

        heads_of_first, heads_of_second = self.heads(num_heads)
        seen = []
        for head in range(num_heads):
            of_head = query == key
            if head in heads_of_first:
                of_head |= first
            if head in heads_of_second:
                of_head |= second(heads_of_second.index(head))
            seen.append(of_head & (key <= query))
        return jnp.stack(seen)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return SparseCore(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """The blocks as they are computed, what a mask hides in them included."""
        length = layout.size
        num_blocks = -(-length // self.stride)
        first, second = self.heads(dims.num_heads)
        # Keys of a query in each set.
        width = 2 * self.stride if self.pattern == "strided" else self.stride
        others = num_blocks if self.pattern == "strided" else num_blocks * self.summary_width
        attend = 0
        for heads, num_keys in ((first, width), (second, others)):
            of_heads = dataclasses.replace(dims, num_heads=len(heads))
            attend += attend_flops(of_heads, length, num_keys)
        return projection_flops(dims, layout) + attend

    @classmethod
    def example(cls, segment_length: int) -> Example:
        stride = divisor_near_root(segment_length)
        meaning = f"nothing carried; within a segment the last {stride} positions and every {stride}-th, in every layer"
        return Example("sparse", meaning, cls(stride=stride))


class SparseCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: SparseAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: tuple,
    ) -> tuple[Queries, tuple | None, Report]:
        config = self.attention
        keys = segment.with_kv_cache("keys", keys)
        values = segment.with_kv_cache("values", values)
        bias = config.distance_bias(self.dims)
        # There is no mask of what is real: padding comes after all that is real, and no position sees a later one.
        attend = self._attend_token if segment.is_decode_step else self._attend_segment
        y = attend(queries, keys, values, scale, bias, segment)

        if segment.decoding is not None:
            return y, None, Report(kv_cache={"keys": keys, "values": values})
        if not segment.num_shown:
            return y, state, Report()
        return y, state, Report(attended=self._attended(queries, keys, scale, bias, segment.num_shown))

    def _attended(
        self,
        queries: Queries,
        keys: Keys,
        scale: HeadScale,
        bias: Bias,
        num_shown: int,
    ) -> tuple[Attended]:
        """What the heads attended to; a position belongs to a block and to a column of it."""
        num_rows, length, num_heads, _ = queries.shape
        position = jnp.arange(length)
        by_distance = bias(np.arange(length))

        def weights(query: Int[Array, "t"]) -> Float[Array, "B N t S"]:
            logits = dense.logits(queries[:, query], keys, by_distance, scale, query)
            return dense.softmax(logits, self.attention.visible(num_heads, query, position)[None])

        # [T, 2]
        groups = jnp.stack([position // self.attention.stride, position % self.attention.stride], axis=-1)
        groups = jnp.broadcast_to(groups[None, :, None], (num_rows, length, num_heads, 2))
        heads = range(num_heads)
        return (dense.strongest(weights, length, num_shown, groups, ("block", "column"), heads),)

    def _attend_segment(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        bias: Bias,
        segment: Segment,
    ) -> Queries:
        """All positions at once, in blocks."""
        config = self.attention
        num_rows, length, num_heads, head_dim = queries.shape
        first, second = config.heads(num_heads)

        def of_heads(heads: range) -> BlockHeads:
            blocks = (num_rows, -1, config.stride, num_heads, head_dim)
            chosen = slice(heads.start, heads.stop)
            return BlockHeads(
                *(each.reshape(blocks)[..., chosen, :] for each in (queries, keys, values)),
                scale=scale[chosen],
                bias=lambda distances: bias(distances)[chosen],
                are_merged=config.sees == "merged",
                kernel=self.dims.attention_kernel,
            )

        # Each [B, m, l, N, H]
        attended = []
        if first:
            see_first = _last_positions if config.pattern == "strided" else _own_block
            attended.append(see_first(of_heads(first)))
        if second and config.pattern == "strided":
            attended.append(_same_column(of_heads(second)))
        elif second:
            columns = np.stack([config.summary_columns(place) for place in range(len(second))])
            attended.append(_summaries(of_heads(second), columns))

        if config.sees == "merged":
            y = partial_softmax.join(*attended).values
        else:
            y = jnp.concatenate([part.values for part in attended], axis=3)
        return y.reshape(num_rows, length, num_heads, head_dim)

    def _attend_token(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        bias: Bias,
        segment: Segment,
    ) -> Queries:
        """One position of a decode step, against all keys of the segment under a mask."""
        assert segment.decoding is not None, "a decode step"
        length, num_heads = keys.shape[1:3]
        query = segment.decoding.position + jnp.arange(queries.shape[1])
        key = np.arange(length)
        visible = self.attention.visible(num_heads, query, jnp.asarray(key))
        logits = dense.logits(queries, keys, bias(key), scale, query)
        return dense.attend(logits, visible[None], values)


class BlockHeads(NamedTuple):
    """Heads that see one of the sets, of the segment in blocks.

    Attributes:
      queries, keys, values: [B, m, l, N, H].
      scale: of the logits, float32 [N].
      bias: of the logits by distance back, for these heads.
      are_merged: whether these heads see the other set, too: the second one then leaves out what is in the first.
      kernel: see `flash.serves`.
    """

    queries: Blocks
    keys: Blocks
    values: Blocks
    scale: HeadScale
    bias: Bias
    are_merged: bool
    kernel: KernelKind


def _last_positions(heads: BlockHeads) -> Partial:
    """The first strided set: l positions before each, in its own block and the one before."""
    num_blocks, stride = heads.queries.shape[1:3]
    # [l, 2 l]; the keys begin a block earlier.
    distance = np.arange(stride)[:, None] + stride - np.arange(2 * stride)[None, :]
    is_near = (distance >= 0) & (distance <= stride)
    # Nothing is before the first block: [m, 1, 2 l].
    exists = (np.arange(2 * stride) >= stride) | (np.arange(num_blocks) > 0)[:, None, None]
    with_before = heads._replace(keys=_with_block_before(heads.keys), values=_with_block_before(heads.values))
    return _block_by_block(with_before, is_near & exists)


def _same_column(heads: BlockHeads) -> Partial:
    """The second strided set: the same column of the query's block and all earlier ones."""
    num_blocks, stride = heads.queries.shape[1:3]
    # [m, m]
    blocks_back = np.arange(num_blocks)[:, None] - np.arange(num_blocks)[None, :]
    visible = blocks_back >= (2 if heads.are_merged else 0)
    # The segment's columns take the place of its blocks, [B, l, m, N, H].
    columns = heads._replace(
        queries=heads.queries.swapaxes(1, 2),
        keys=heads.keys.swapaxes(1, 2),
        values=heads.values.swapaxes(1, 2),
        bias=lambda blocks: heads.bias(stride * blocks),
    )
    seen = _block_by_block(columns, visible[None])
    return Partial(seen.values.swapaxes(1, 2), seen.log_normalizer.swapaxes(1, 2))


def _own_block(heads: BlockHeads) -> Partial:
    """The first fixed set: the block that the query is in."""
    stride = heads.queries.shape[2]
    return _block_by_block(heads, np.tri(stride, dtype=bool)[None])


def _block_by_block(heads: BlockHeads, visible: Bool[np.ndarray, "#m l S"]) -> Partial:
    """Every block of queries to the keys of the same block, which end where the queries end.

    Args:
      heads: keys and values are [B, m, S, N, H].
      visible: which of a block's keys each query sees; where none, the normaliser's logarithm is that of nothing.
    """
    num_rows, num_blocks, num_queries = heads.queries.shape[:3]
    num_keys = heads.keys.shape[2]
    blocks = (num_rows * num_blocks, -1)
    mask = jnp.broadcast_to(visible, (num_rows, num_blocks, num_queries, num_keys))
    queries, keys, values = (each.reshape(*blocks, *each.shape[3:]) for each in heads[:3])
    seen = local_attention(
        queries,
        keys,
        values,
        heads.scale,
        heads.bias(positions.distances(num_queries, num_keys)),
        Visible(mask.reshape(*blocks, num_keys)),
        kernel=heads.kernel,
    )
    return Partial(seen.values.reshape(heads.queries.shape), seen.log_normalizer.reshape(heads.queries.shape[:-1]))


def _summaries(heads: BlockHeads, columns: Int[np.ndarray, "N c"]) -> Partial:
    """The second fixed set: some columns of every block up to the query, and the query's own position.

    Args:
      heads: that see it.
      columns: of a block, for each head.
    """
    num_rows, num_blocks, stride, num_heads, head_dim = heads.queries.shape
    length = num_blocks * stride

    def summaries(blocks: Blocks) -> Float[Array, "B N S H"]:
        # [N, c, B, m, H]
        by_column = jnp.moveaxis(blocks, (3, 2), (0, 1))
        chosen = by_column[np.arange(num_heads)[:, None], columns]
        return jnp.moveaxis(chosen, (0, 1), (1, 3)).reshape(num_rows, num_heads, -1, head_dim)

    # Positions of queries and keys, [1, T, 1] and [N, 1, S], S = m c.
    query = jnp.arange(length)[None, :, None]
    key = (stride * np.arange(num_blocks)[None, :, None] + columns[:, None, :]).reshape(num_heads, 1, -1)
    # The query's own block is in the first set, its own position is added below.
    is_before = key // stride < query // stride if heads.are_merged else key < query

    queries = heads.queries.reshape(num_rows, length, num_heads, head_dim)
    products = jnp.einsum("BTNH,BNSH->BNTS", queries, summaries(heads.keys), preferred_element_type=jnp.float32)
    logits = _logits(products, _summary_bias(heads, columns), heads.scale)
    seen = partial_softmax.attend(logits, is_before[None], summaries(heads.values))
    if not heads.are_merged:
        seen = partial_softmax.join(seen, _itself(heads))
    blocks = (num_rows, num_blocks, stride, num_heads)
    return Partial(
        seen.values.swapaxes(1, 2).reshape(*blocks, head_dim), seen.log_normalizer.swapaxes(1, 2).reshape(blocks)
    )


def _summary_bias(heads: BlockHeads, columns: Int[np.ndarray, "N c"]) -> Float[Array, "N T S"]:
    """The bias of every query for the summaries of every block."""
    _, num_blocks, stride, num_heads, _ = heads.queries.shape
    # It depends on the number of blocks back and on the two columns: [N, m, l, c].
    blocks_back = stride * jnp.arange(num_blocks)[None, :, None, None]
    columns_back = jnp.arange(stride)[None, :, None] - columns[:, None, :]
    distance = jnp.maximum(blocks_back + columns_back[:, None], 0)
    by_distance = heads.bias(np.arange(num_blocks * stride))
    by_blocks_back = by_distance[np.arange(num_heads)[:, None, None, None], distance]
    # [N, m, m, l, c]
    back = np.maximum(np.arange(num_blocks)[:, None] - np.arange(num_blocks)[None, :], 0)
    by_block = by_blocks_back[:, back]
    return by_block.swapaxes(2, 3).reshape(num_heads, num_blocks * stride, -1)


def _itself(heads: BlockHeads) -> Partial:
    """Every query's own position alone."""
    num_rows, _, _, num_heads, head_dim = heads.queries.shape
    products = jnp.einsum("BmlNH,BmlNH->BNml", heads.queries, heads.keys, preferred_element_type=jnp.float32)
    logits = _logits(products, heads.bias(np.zeros(1, int)), heads.scale)
    values = _heads_first(heads.values)
    return Partial(
        values.reshape(num_rows, num_heads, -1, head_dim),
        logits.reshape(num_rows, num_heads, -1),
    )


def _logits(
    products: Float[Array, "B N *keys"],
    bias: Float[Array, "N *#keys"],
    scale: HeadScale,
) -> Float[Array, "B N *keys"]:
    """scale * (q . k + bias), float32."""
    of_head = (1, -1) + (1,) * (products.ndim - 2)
    bias = bias.reshape(1, *bias.shape[:1], *(1,) * (products.ndim - 1 - bias.ndim), *bias.shape[1:])
    return (products + bias) * scale.reshape(of_head)


def _with_block_before(blocks: Blocks) -> Float[Array, "B m S N H"]:
    """Every block behind the one before it; zeros before the first one."""
    before = jnp.pad(blocks[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([before, blocks], axis=2)


def _heads_first(blocks: Float[Array, "B m S N H"]) -> Float[Array, "B N m S H"]:
    return jnp.moveaxis(blocks, 3, 1)
