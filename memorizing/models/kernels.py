"""Attention whose logits never leave the chip: Pallas kernels for TPUs from v4 on.

The plain form writes a number for each head, query and key to the device's memory and reads it several times; here a
block of queries meets its keys in the core's own memory (after Dao et al. 2022, arXiv:2205.14135). Since a block meets
all that it sees at once, no softmax is computed in parts. The backward pass computes the weights again: nothing is kept
for it but what went in and the normalisers. T5's bias is that of a tile of queries, of which all others are slices; it
and its gradient stay in place while the rows of a batch pass by, so that the gradient is summed there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import HeadScale
from memorizing.models import positions

# Logits of a block of queries, at most: the core's own memory holds several arrays of this size.
BLOCK_LOGITS = 1 << 19
# Memory of their own that all cores have for a kernel, and what those from TPU v5e on can have, in bytes.
SMALL_MEMORY = 16 << 20
LARGE_MEMORY = 64 << 20
# Blocks are compiled for so many stretches of keys, at most.
MOST_STRETCHES = 4
# Numbers side by side in a register: lengths are multiples of it.
LANES = 128
# Logit where nothing is visible: of weight 0 beside any other, and finite.
HIDDEN = jnp.finfo(jnp.float32).min
# Added to a logit, also twice, for the same.
FAR = -1e30
_TO_BASE_2 = math.log2(math.e)

HeadQueries = Float[Array, "B N T H"]
HeadKeys = Float[Array, "B K S H"]
HeadValues = Float[Array, "B K S H"]
Bias = Float[Array, "N tile wide"]
# For every tile of 128 queries, the first key that is seen and the one behind the last.
KeysOfTiles = tuple[tuple[int, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def softmax_attention(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    carried: tuple[HeadKeys, HeadValues] | tuple[()],
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"] | None,
    hidden_keys: Float[Array, "B 1 S"] | None,
    seen: KeysOfTiles,
    interpret: bool = False,
) -> tuple[HeadQueries, Float[Array, "B N T"]]:
    """softmax(scale * q . k + bias) v over the visible keys, and the logarithms of its normalisers.

    Query head n reads key head n // (N / K).

    Args:
      queries: [B, N, T, H].
      keys, values: [B, K, S - W, H].
      carried: keys and values in front of them, [B, K, W, H], that get no gradient; or none.
      scale: float32, of the products.
      bias: float32, see `positions.wide_tile`.
      mask: which keys each query sees, at least one; None for all.
      hidden_keys: added to the logits of each key, a number that hides it or 0; None for nothing. Gets no gradient.
      seen: keys outside of these are hidden by the bias, and are left out.
      interpret: whether the kernels are computed by plain operations, on any platform.
    """
    return _forward(queries, keys, values, carried, scale, bias, mask, hidden_keys, seen, interpret)[0]


class _Inputs(NamedTuple):
    """What the kernels read, blocks or whole arrays; the bias and what hides keys are exponents of 2, masks numbers."""

    scale: Any
    queries: Any
    keys: Any
    values: Any
    bias: Any
    mask: Any | None
    hidden_keys: Any | None
    carried: tuple[Any, ...]

    @property
    def num_queries(self) -> int:
        """Of a head, by the width of its tile of the bias."""
        return self.bias.shape[-1] + LANES - self.num_keys

    @property
    def num_keys(self) -> int:
        """Of a head, the carried ones among them."""
        return self.num_carried + self.keys.shape[-2]

    @property
    def num_carried(self) -> int:
        return self.carried[0].shape[-2] if self.carried else 0


class _Saved(NamedTuple):
    """For the backward pass: the normaliser is 2^greatest times a sum, whose logarithm would be rounded."""

    inputs: _Inputs
    greatest_and_sum: Float[Array, "B N 2 T"]


def _forward(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    carried: tuple[HeadKeys, HeadValues] | tuple[()],
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"] | None,
    hidden_keys: Float[Array, "B 1 S"] | None,
    seen: KeysOfTiles,
    interpret: bool,
) -> tuple[tuple[HeadQueries, Float[Array, "B N T"]], _Saved]:
    numbers = None if mask is None else mask.astype(jnp.int8)
    inputs = _Inputs(scale, queries, keys, values, _TO_BASE_2 * bias, numbers, hidden_keys, carried)
    grid, blocks = _blocks(inputs)
    stretches = _stretches(seen, grid[2])
    num_rows, num_heads, num_queries, _ = queries.shape
    out, greatest_and_sum = pl.pallas_call(
        functools.partial(_forward_kernel, stretches),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, values.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads, 2, num_queries), jnp.float32),
        ],
        grid=grid,
        in_specs=[blocks],
        out_specs=[blocks.queries, _of_each_query(blocks, 2)],
        cost_estimate=_cost(inputs, stretches, of_all=2),
        compiler_params=_parameters(inputs),
        name="attention",
        interpret=interpret,
    )(inputs)
    log_normalizer = greatest_and_sum[:, :, 0] / _TO_BASE_2 + jnp.log(greatest_and_sum[:, :, 1])
    return (out, log_normalizer), _Saved(inputs, greatest_and_sum)


def _backward(
    seen: KeysOfTiles,
    interpret: bool,
    saved: _Saved,
    gradients: tuple[HeadQueries, Float[Array, "B N T"]],
) -> tuple[Any, ...]:
    inputs = saved.inputs
    of_out, of_normalizer = gradients
    # [B, N, 3, T]
    of_queries = jnp.concatenate([saved.greatest_and_sum, of_normalizer[:, :, None]], axis=2)
    grid, blocks = _blocks(inputs)
    stretches = _stretches(seen, grid[2])
    num_rows, num_heads, _, width = inputs.queries.shape
    num_kv_heads, num_own = inputs.keys.shape[1:3]
    # Of each query head, also where several read the same keys.
    of_keys = pl.BlockSpec((None, None, num_own, width), lambda head, row, block: (row, head, 0, 0))
    of_scale = pl.BlockSpec((None, 1, inputs.num_keys), lambda head, row, block: (head, 0, 0))
    shape_of_keys = (num_rows, num_heads, num_own, width)
    sums_of_keys = pltpu.VMEM((num_own, width), jnp.float32)
    for_queries, for_keys, for_values, for_scale, for_bias = pl.pallas_call(
        functools.partial(_backward_kernel, stretches),
        out_shape=[
            jax.ShapeDtypeStruct(inputs.queries.shape, inputs.queries.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.keys.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.values.dtype),
            jax.ShapeDtypeStruct((num_heads, 1, inputs.num_keys), jnp.float32),
            jax.ShapeDtypeStruct(inputs.bias.shape, jnp.float32),
        ],
        grid=grid,
        in_specs=[blocks, blocks.queries, _of_each_query(blocks, 3)],
        out_specs=[blocks.queries, of_keys, of_keys, of_scale, blocks.bias],
        scratch_shapes=[sums_of_keys, sums_of_keys],
        cost_estimate=_cost(inputs, stretches, of_all=3, of_own=2),
        compiler_params=_parameters(inputs),
        name="attention_gradient",
        interpret=interpret,
    )(inputs, of_out, of_queries)

    def of_kv_heads(gradient: Float[Array, "B N S H"]) -> HeadKeys:
        if num_heads == num_kv_heads:
            return gradient
        of_group = gradient.reshape(num_rows, num_kv_heads, -1, num_own, width)
        return of_group.sum(axis=2, dtype=jnp.float32).astype(gradient.dtype)

    for_scale = for_scale.sum(axis=(1, 2))
    return for_queries, of_kv_heads(for_keys), of_kv_heads(for_values), None, for_scale, for_bias, None, None


softmax_attention.defvjp(_forward, _backward)


def _blocks(inputs: _Inputs) -> tuple[tuple[int, int, int], _Inputs]:
    """The grid, [heads, rows, blocks of queries], and what of each array a kernel sees at a place of it."""
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    queries_of_kv_head = num_heads // inputs.keys.shape[1]
    num_blocks = count_blocks(num_queries, inputs.num_keys)
    at_once = num_queries // num_blocks

    def place_of_keys(head: Any, row: Any, block: Any) -> tuple[Any, ...]:
        return row, jax.lax.div(head, jnp.int32(queries_of_kv_head)), 0, 0

    def of_keys(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *array.shape[2:]), place_of_keys)

    blocks = _Inputs(
        scale=pl.BlockSpec(memory_space=pltpu.SMEM),
        queries=pl.BlockSpec((None, None, at_once, width), lambda head, row, block: (row, head, block, 0)),
        keys=of_keys(inputs.keys),
        values=of_keys(inputs.values),
        # Of a head, as long as its rows pass by.
        bias=pl.BlockSpec((None, *inputs.bias.shape[1:]), lambda head, row, block: (head, 0, 0)),
        mask=None
        if inputs.mask is None
        else pl.BlockSpec((None, at_once, inputs.num_keys), lambda head, row, block: (row, block, 0)),
        hidden_keys=None
        if inputs.hidden_keys is None
        else pl.BlockSpec((None, 1, inputs.num_keys), lambda head, row, block: (row, 0, 0)),
        carried=tuple(map(of_keys, inputs.carried)),
    )
    return (num_heads, num_rows, num_blocks), blocks


def count_blocks(num_queries: int, num_keys: int) -> int:
    """Blocks of a head's queries."""
    num_blocks = 1
    while num_queries * num_keys > BLOCK_LOGITS * num_blocks and num_queries % (2 * num_blocks * LANES) == 0:
        num_blocks *= 2
    return num_blocks


def memory(num_queries: int, num_keys: int, width: int, dtype: Any) -> int:
    """About what the backward kernel needs of a core's own memory, in bytes; rather too much.

    The compiler for TPUs v5e said 16.4 and 26.3 MiB where this says 18 and 28.

    Args:
      num_queries, num_keys, width: T, S, H.
      dtype: of queries, keys and values.
    """
    size = jnp.dtype(dtype).itemsize
    # What comes from the device's memory or goes there is there twice: one block is moved while another is used.
    bias_and_gradient = 2 * 2 * 4 * LANES * (num_queries + num_keys)
    keys_and_values = 2 * 2 * size * num_keys * width
    gradients_and_sums = 2 * (2 * size + 4) * num_queries * width
    # About four arrays of logits at once.
    logits = 4 * 4 * num_queries // count_blocks(num_queries, num_keys) * num_keys
    return bias_and_gradient + keys_and_values + gradients_and_sums + logits


def _stretches(seen: KeysOfTiles, num_blocks: int) -> list[slice]:
    """The keys that each block sees, or several side by side, in whole registers."""
    num_stretches = min(num_blocks, MOST_STRETCHES)
    at_once = len(seen) // num_stretches
    stretches = []
    for start in range(0, len(seen), at_once):
        firsts, ends = zip(*seen[start : start + at_once], strict=True)
        stretches.append(slice(min(firsts) // LANES * LANES, -(-max(ends) // LANES) * LANES))
    return stretches


def _parameters(inputs: _Inputs) -> pltpu.CompilerParams:
    """Where a chip has two cores, each computes half of the heads."""
    queries = inputs.queries
    is_small = memory(queries.shape[-2], inputs.num_keys, queries.shape[-1], queries.dtype) <= SMALL_MEMORY
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=None if is_small else LARGE_MEMORY,
    )


def _of_each_query(blocks: _Inputs, count: int) -> pl.BlockSpec:
    """A block of [B, N, count, T]: so many numbers for each query, which would fill a register each in a last axis."""
    at_once = blocks.queries.block_shape[-2]
    return pl.BlockSpec((None, None, count, at_once), lambda head, row, block: (row, head, 0, block))


def _cost(inputs: _Inputs, stretches: list[slice], of_all: int, of_own: int = 0) -> pl.CostEstimate:
    """What a kernel computes and moves, by which it is priced: see `memorizing.cost.pricing`.

    Args:
      inputs: whole arrays.
      stretches: of keys that are seen, each by as many queries.
      of_all, of_own: products of queries with all keys or values, and with those that are not carried.
    """
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    queries_of_stretch = num_rows * num_heads * num_queries // len(stretches)
    pairs = queries_of_stretch * sum(keys.stop - keys.start for keys in stretches)
    own_pairs = queries_of_stretch * sum(keys.stop - max(keys.start, inputs.num_carried) for keys in stretches)
    num_products = of_all + of_own
    # What goes in is read about once forward; backward gradients as large go in and out as well.
    return pl.CostEstimate(
        flops=2 * (of_all * pairs + of_own * own_pairs) * width,
        bytes_accessed=num_products * sum(array.nbytes for array in jax.tree.leaves(inputs[1:])) // 2,
        transcendentals=pairs,
    )


class _Block(NamedTuple):
    """What a place of the grid computes with.

    Attributes:
      inputs: blocks.
      scale: of the head.
      places: for every tile of the block's queries, where in the wide one its first key is.
    """

    inputs: _Inputs
    scale: Float[Array, ""]
    places: list[Any]

    @classmethod
    def of(cls, inputs: _Inputs) -> _Block:
        at_once = inputs.queries.shape[0]
        first_queries = [pl.program_id(2) * at_once + start for start in range(0, at_once, LANES)]
        places = [positions.first_of_tile(first_query, inputs.num_queries) for first_query in first_queries]
        return cls(inputs, inputs.scale[pl.program_id(0)], places)

    def products(self, seen: slice) -> Float[Array, "T S"]:
        """query . key, float32."""
        return _product(self.inputs.queries[...], self.keys(seen), "TH,SH->TS")

    def logits(self, products: Float[Array, "T S"], seen: slice) -> Float[Array, "T S"]:
        """Exponents of 2, which is what the chip computes powers of."""
        inputs = self.inputs
        bias = jnp.concatenate([inputs.bias[:, place] for place in self.places_of(seen)])
        logits = products * (_TO_BASE_2 * self.scale) + bias
        if inputs.hidden_keys is not None:
            logits = logits + inputs.hidden_keys[:, seen]
        if inputs.mask is None:
            return logits
        # Registers of TPUs v4 compare no small numbers.
        return jnp.where(inputs.mask[:, seen].astype(jnp.int32) != 0, logits, HIDDEN)

    def keys(self, seen: slice) -> Float[Array, "S H"]:
        """Of [carried; own]."""
        carried, _ = self.inputs.carried or (None, None)
        return _joined(carried, self.inputs.keys)[seen]

    def values(self, seen: slice) -> Float[Array, "S H"]:
        """Of [carried; own]."""
        _, carried = self.inputs.carried or (None, None)
        return _joined(carried, self.inputs.values)[seen]

    def places_of(self, seen: slice) -> list[Any]:
        """For every tile of the block's queries, where in the wide one these keys are."""
        firsts = (pl.multiple_of(first + seen.start, LANES) for first in self.places)
        return [pl.ds(first, seen.stop - seen.start) for first in firsts]

    def for_stretch(self, stretches: list[slice], compute: Callable[[slice], None]) -> None:
        """Computes with the keys that the block sees."""
        if len(stretches) == 1:
            compute(stretches[0])
            return
        blocks_of_each = self.inputs.num_queries // self.inputs.queries.shape[0] // len(stretches)
        own = jax.lax.div(pl.program_id(2), jnp.int32(blocks_of_each))
        for index, seen in enumerate(stretches):
            pl.when(own == index)(functools.partial(compute, seen))


def _joined(carried: Any | None, own: Any) -> Float[Array, "S H"]:
    return own[...] if carried is None else jnp.concatenate([carried[...], own[...]])


def _product(left: jax.Array, right: jax.Array, axes: str) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _as_row(column: Float[Array, "T 1"]) -> Float[Array, "1 T"]:
    return jnp.broadcast_to(column, (len(column), LANES)).T[:1]


def _as_column(row: Float[Array, "1 T"]) -> Float[Array, "T 1"]:
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _forward_kernel(stretches: list[slice], inputs: _Inputs, out: Any, greatest_and_sum: Any) -> None:
    block = _Block.of(inputs)

    def compute(seen: slice) -> None:
        logits = block.logits(block.products(seen), seen)
        greatest = jnp.max(logits, axis=-1, keepdims=True)
        exponentials = jnp.exp2(logits - greatest)
        normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
        values = block.values(seen)
        sums = _product(exponentials.astype(values.dtype), values, "TS,SH->TH")
        out[...] = (sums / normalizer).astype(out.dtype)
        greatest_and_sum[:1] = _as_row(greatest)
        greatest_and_sum[1:] = _as_row(normalizer)

    block.for_stretch(stretches, compute)


def _backward_kernel(
    stretches: list[slice],
    inputs: _Inputs,
    of_out: Any,
    of_queries: Any,
    for_queries: Any,
    for_keys: Any,
    for_values: Any,
    for_scale: Any,
    for_bias: Any,
    key_sums: Any,
    value_sums: Any,
) -> None:
    row, index = pl.program_id(1), pl.program_id(2)
    block = _Block.of(inputs)

    @pl.when(index == 0)
    def _() -> None:
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    @pl.when((row == 0) & (index == 0))
    def _() -> None:
        for_scale[...] = jnp.zeros_like(for_scale)
        for_bias[...] = jnp.zeros_like(for_bias)

    def compute(seen: slice) -> None:
        greatest, normalizer, of_normalizer = (_as_column(of_queries[i : i + 1]) for i in range(3))
        # The weights times their normaliser, by which the gradient of what they add up to is divided.
        products = block.products(seen)
        exponentials = jnp.exp2(block.logits(products, seen) - greatest)
        of_sums = (of_out[...] / normalizer).astype(of_out.dtype)
        of_weights = exponentials * _product(of_sums, block.values(seen), "TH,SH->TS")
        # Not from `out`, which is rounded: the gradient of the scale adds up what its mean is off.
        mean = jnp.sum(of_weights, axis=-1, keepdims=True)
        of_logits = of_weights - exponentials * ((mean - of_normalizer) / normalizer)

        for start, place in zip(range(0, len(of_logits), LANES), block.places_of(seen), strict=True):
            for_bias[:, place] += of_logits[start : start + LANES]
        # Not from the gradient of the queries, which adds up rounded numbers.
        for_scale[:, seen] += jnp.sum(of_logits * products, axis=0, keepdims=True)

        queries = inputs.queries[...]
        of_products = of_logits.astype(queries.dtype)
        for_queries[...] = (block.scale * _product(of_products, block.keys(seen), "TS,SH->TH")).astype(queries.dtype)

        # Among the keys that are seen, and among those that are not carried.
        num_before = max(inputs.num_carried - seen.start, 0)
        own = slice(seen.start + num_before - inputs.num_carried, seen.stop - inputs.num_carried)
        own_exponentials = exponentials[:, num_before:].astype(of_sums.dtype)
        value_sums[own] += _product(own_exponentials, of_sums, "TS,TH->SH")
        key_sums[own] += _product(of_products[:, num_before:], queries, "TS,TH->SH")

    block.for_stretch(stretches, compute)

    @pl.when(index == pl.num_programs(2) - 1)
    def _() -> None:
        for_keys[...] = (key_sums[...] * block.scale).astype(for_keys.dtype)
        for_values[...] = value_sums[...].astype(for_values.dtype)
