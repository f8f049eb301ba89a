"""Attention whose logits never leave the chip: Pallas kernels for TPUs from v4 on.

The plain form writes a number for each head, query and key to the device's memory and reads it several times; here a
block of queries meets all its keys in the core's own memory (after Dao et al. 2022, arXiv:2205.14135). Since a block
sees all keys, no softmax is computed in parts. The backward pass computes the weights again: nothing is kept for it but
what went in. T5's bias is that of a tile of queries, of which all others are slices; it and its gradient stay in place
while the rows of a batch pass by, so that the gradient is summed there. What is carried in front of a segment is read
where it lies, and gets no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.models import positions

# Where the kernels are used: on TPUs that have them; anywhere, computed by plain operations, for tests; or nowhere.
KernelKind = Literal["tpu", "interpreted", "none"]

# These have no compiler for kernels.
_TOO_OLD = ("TPU v2", "TPU v3")
# Logits of a block of queries, at most: the core's own memory holds several arrays of this size.
BLOCK_LOGITS = 1 << 18
# Logits of a head, at least: smaller blocks take no less time than the plain form (`bench tpu --attention`).
_LEAST_HEAD_LOGITS = 1 << 17
# Logits of a head, at most: those of the bias and of its gradient lie in the core's own memory as well.
_HEAD_LOGITS = 1 << 20
# Numbers side by side in a register: lengths are multiples of it.
_LANES = 128
# Logit where nothing is visible: of weight 0 beside any other, and finite.
HIDDEN = jnp.finfo(jnp.float32).min
# Where a chip has two cores, each computes half of the heads.
_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))

HeadQueries = Float[Array, "B N T H"]
HeadKeys = Float[Array, "B K S H"]
HeadValues = Float[Array, "B K S H"]
Bias = Float[Array, "N tile wide"]


def serves(kind: KernelKind, queries: Queries, keys: Keys) -> bool:
    """Whether the kernels are used for a segment's queries and the keys that they see.

    They are where the mesh that is set is one of TPUs from v4 on and they pay, from 2^17 pairs of a query and a key on;
    where lengths are multiples of 128, there are no more than 2^20 such pairs, and heads and rows fill the mesh.

    Args:
      kind: where they may be.
      queries, keys: [B, T, N, H] and [B, S, K, H].
    """
    num_rows, num_queries, num_heads, _ = queries.shape
    num_keys, num_kv_heads = keys.shape[1:3]
    num_pairs = num_queries * num_keys
    mesh = jax.sharding.get_abstract_mesh()
    if kind == "none" or (kind == "tpu" and not (has_kernels(mesh) and num_pairs >= _LEAST_HEAD_LOGITS)):
        return False
    heads_fit = mesh.empty or num_heads % mesh.shape["model"] == num_kv_heads % mesh.shape["model"] == 0
    rows_fit = mesh.empty or num_rows % mesh.shape["data"] == 0
    lengths_fit = num_queries % _LANES == num_keys % _LANES == 0
    return heads_fit and rows_fit and lengths_fit and num_pairs <= _HEAD_LOGITS


def has_kernels(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether the devices of a mesh are TPUs that have a compiler for them."""
    device = None if mesh.empty else mesh.abstract_device
    return device is not None and device.platform == "tpu" and not device.device_kind.startswith(_TOO_OLD)


def attention(
    kind: KernelKind,
    queries: Queries,
    keys: Keys,
    values: Values,
    scale: HeadScale,
    by_distance: Float[Array, "N R"] | None,
    mask: Bool[Array, "B T S"],
    num_carried: int = 0,
) -> tuple[Queries, Float[Array, "B T N"]]:
    """`local.local_attention` by the kernels, on every shard of the mesh that is set.

    Returns:
      The values, and the logarithms of the normalisers.
    """
    num_queries, num_heads = queries.shape[1:3]
    num_keys = keys.shape[1]
    if by_distance is None:
        by_distance = jnp.zeros((num_heads, num_queries + num_keys - 1))

    def of_shard(
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        by_distance: Float[Array, "N R"],
        mask: Bool[Array, "B T S"],
    ) -> tuple[Queries, Float[Array, "B T N"]]:
        # Here, so that shards exchange the gradient of R numbers a head, not that of a tile.
        bias = positions.wide_tile(by_distance, num_queries, num_keys)
        own = (array.swapaxes(1, 2) for array in (queries, keys[:, num_carried:], values[:, num_carried:]))
        before = (keys[:, :num_carried], values[:, :num_carried]) if num_carried else ()
        carried = tuple(jax.lax.stop_gradient(array).swapaxes(1, 2) for array in before)
        out, log_normalizer = softmax_attention(*own, carried, scale, bias, mask, kind == "interpreted")
        return out.swapaxes(1, 2), log_normalizer.swapaxes(1, 2)

    if not jax.sharding.get_abstract_mesh().empty:
        by_head = P("data", None, "model")
        of_shard = jax.shard_map(
            of_shard,
            in_specs=(by_head, by_head, by_head, P("model"), P("model"), P("data")),
            out_specs=(by_head, by_head),
            # A kernel does not say over which axes of the mesh its results vary.
            check_vma=False,
        )
    with jax.named_scope("local_attention"):
        return of_shard(queries, keys, values, scale, by_distance, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def softmax_attention(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    carried: tuple[HeadKeys, HeadValues] | tuple[()],
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"],
    interpret: bool = False,
) -> tuple[HeadQueries, Float[Array, "B N T"]]:
    """softmax(scale * (q . k + bias)) v over the visible keys, and the logarithms of its normalisers.

    Query head n reads key head n // (N / K).

    Args:
      queries: [B, N, T, H].
      keys, values: [B, K, S - W, H].
      carried: keys and values in front of them, [B, K, W, H], that get no gradient; or none.
      scale: float32, of the logits.
      bias: float32, see `positions.wide_tile`.
      mask: which keys each query sees, at least one.
      interpret: whether the kernels are computed by plain operations, on any platform.
    """
    return _forward(queries, keys, values, carried, scale, bias, mask, interpret)[0]


class _Inputs(NamedTuple):
    """What the kernels read, blocks or whole arrays; masks are numbers."""

    scale: Any
    queries: Any
    keys: Any
    values: Any
    bias: Any
    mask: Any
    carried: tuple[Any, ...]

    @property
    def num_keys(self) -> int:
        """Of a head, the carried ones among them."""
        return self.mask.shape[-1]

    @property
    def num_carried(self) -> int:
        return self.num_keys - self.keys.shape[-2]


def _forward(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    carried: tuple[HeadKeys, HeadValues] | tuple[()],
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"],
    interpret: bool,
) -> tuple[tuple[HeadQueries, Float[Array, "B N T"]], _Inputs]:
    inputs = _Inputs(scale, queries, keys, values, bias, mask.astype(jnp.int8), carried)
    grid, blocks = _blocks(inputs)
    out, log_normalizer = pl.pallas_call(
        _forward_kernel,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, values.dtype),
            jax.ShapeDtypeStruct((*queries.shape[:-1], 1), jnp.float32),
        ],
        grid=grid,
        in_specs=[blocks],
        out_specs=[blocks.queries, _like_queries(blocks, 1)],
        cost_estimate=_cost(inputs, of_all=2),
        compiler_params=_PARAMETERS,
        name="attention",
        interpret=interpret,
    )(inputs)
    return (out, log_normalizer[..., 0]), inputs


def _backward(
    interpret: bool,
    inputs: _Inputs,
    gradients: tuple[HeadQueries, Float[Array, "B N T"]],
) -> tuple[Any, ...]:
    of_out, of_normalizer = gradients
    grid, blocks = _blocks(inputs)
    num_rows, num_heads, _, width = inputs.queries.shape
    num_kv_heads, num_own = inputs.keys.shape[1:3]
    # Of each query head, also where several read the same keys.
    of_keys = pl.BlockSpec((None, None, num_own, width), lambda head, row, block: (row, head, 0, 0))
    of_scale = pl.BlockSpec((None, 1, inputs.num_keys), lambda head, row, block: (head, 0, 0))
    shape_of_keys = (num_rows, num_heads, num_own, width)
    sums_of_keys = pltpu.VMEM((num_own, width), jnp.float32)
    for_queries, for_keys, for_values, for_scale, for_bias = pl.pallas_call(
        _backward_kernel,
        out_shape=[
            jax.ShapeDtypeStruct(inputs.queries.shape, inputs.queries.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.keys.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.values.dtype),
            jax.ShapeDtypeStruct((num_heads, 1, inputs.num_keys), jnp.float32),
            jax.ShapeDtypeStruct(inputs.bias.shape, jnp.float32),
        ],
        grid=grid,
        in_specs=[blocks, blocks.queries, _like_queries(blocks, 1)],
        out_specs=[blocks.queries, of_keys, of_keys, of_scale, blocks.bias],
        scratch_shapes=[sums_of_keys, sums_of_keys],
        cost_estimate=_cost(inputs, of_all=3, of_own=2),
        compiler_params=_PARAMETERS,
        name="attention_gradient",
        interpret=interpret,
    )(inputs, of_out, of_normalizer[..., None])

    def of_kv_heads(gradient: Float[Array, "B N S H"]) -> HeadKeys:
        if num_heads == num_kv_heads:
            return gradient
        of_group = gradient.reshape(num_rows, num_kv_heads, -1, num_own, width)
        return of_group.sum(axis=2, dtype=jnp.float32).astype(gradient.dtype)

    for_scale = for_scale.sum(axis=(1, 2))
    return for_queries, of_kv_heads(for_keys), of_kv_heads(for_values), None, for_scale, for_bias, None


softmax_attention.defvjp(_forward, _backward)


def _blocks(inputs: _Inputs) -> tuple[tuple[int, int, int], _Inputs]:
    """The grid, [heads, rows, blocks of queries], and what of each array a kernel sees at a place of it."""
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    queries_of_kv_head = num_heads // inputs.keys.shape[1]
    at_once = num_queries
    while at_once * inputs.num_keys > BLOCK_LOGITS and at_once % (2 * _LANES) == 0:
        at_once //= 2

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
        mask=pl.BlockSpec((None, at_once, inputs.num_keys), lambda head, row, block: (row, block, 0)),
        carried=tuple(map(of_keys, inputs.carried)),
    )
    return (num_heads, num_rows, num_queries // at_once), blocks


def _like_queries(blocks: _Inputs, width: int) -> pl.BlockSpec:
    """Vectors of another width, one for each query."""
    return pl.BlockSpec((*blocks.queries.block_shape[:-1], width), blocks.queries.index_map)


def _cost(inputs: _Inputs, of_all: int, of_own: int = 0) -> pl.CostEstimate:
    """What a kernel computes and moves, by which it is priced: see `memorizing.cost.pricing`.

    Args:
      inputs: whole arrays.
      of_all, of_own: products of queries with all keys or values, and with those that are not carried.
    """
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    pairs = num_rows * num_heads * num_queries * inputs.num_keys
    own_pairs = num_rows * num_heads * num_queries * inputs.keys.shape[2]
    num_products = of_all + of_own
    # What goes in is read about once forward; backward gradients as large go in and out as well.
    return pl.CostEstimate(
        flops=2 * (of_all * pairs + of_own * own_pairs) * width,
        bytes_accessed=num_products * sum(array.nbytes for array in jax.tree.leaves(inputs[1:])) // 2,
        transcendentals=pairs,
    )


class _Softmax(NamedTuple):
    """Of a block of queries, float32.

    Attributes:
      unscaled: the logits before the scale and the mask.
      weights: of the keys.
      log_normalizer: logarithms of the sums of exponentials.
    """

    unscaled: Float[Array, "T S"]
    weights: Float[Array, "T S"]
    log_normalizer: Float[Array, "T 1"]


def _softmax(inputs: _Inputs) -> _Softmax:
    unscaled = _product(inputs.queries[...], _all_keys(inputs), "TH,SH->TS") + _own_bias(inputs)
    # Registers of TPUs v4 compare no small numbers.
    visible = inputs.mask[...].astype(jnp.int32) != 0
    logits = jnp.where(visible, unscaled * _own_scale(inputs), HIDDEN)
    greatest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - greatest)
    normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
    return _Softmax(unscaled, exponentials / normalizer, greatest + jnp.log(normalizer))


def _all_keys(inputs: _Inputs) -> Float[Array, "S H"]:
    """[carried; own]."""
    own = inputs.keys[...]
    return jnp.concatenate([inputs.carried[0][...], own]) if inputs.carried else own


def _all_values(inputs: _Inputs) -> Float[Array, "S H"]:
    """[carried; own]."""
    own = inputs.values[...]
    return jnp.concatenate([inputs.carried[1][...], own]) if inputs.carried else own


def _own_bias(inputs: _Inputs) -> Float[Array, "T S"]:
    """Of the block's queries."""
    return jnp.concatenate([inputs.bias[:, place] for place in _places_in_tile(inputs)])


def _places_in_tile(inputs: _Inputs) -> list[Any]:
    """For every tile of the block's queries, where in the wide one its keys are."""
    at_once = inputs.queries.shape[0]
    num_queries = inputs.bias.shape[1] + _LANES - inputs.num_keys
    places = []
    for start in range(0, at_once, _LANES):
        first = positions.first_of_tile(pl.program_id(2) * at_once + start, num_queries)
        places.append(pl.ds(pl.multiple_of(first, _LANES), inputs.num_keys))
    return places


def _own_scale(inputs: _Inputs) -> Float[Array, ""]:
    return inputs.scale[pl.program_id(0)]


def _product(left: jax.Array, right: jax.Array, axes: str) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _forward_kernel(inputs: _Inputs, out: Any, log_normalizer: Any) -> None:
    softmax = _softmax(inputs)
    values = _all_values(inputs)
    out[...] = _product(softmax.weights.astype(values.dtype), values, "TS,SH->TH").astype(out.dtype)
    log_normalizer[...] = softmax.log_normalizer


def _backward_kernel(
    inputs: _Inputs,
    of_out: Any,
    of_normalizer: Any,
    for_queries: Any,
    for_keys: Any,
    for_values: Any,
    for_scale: Any,
    for_bias: Any,
    key_sums: Any,
    value_sums: Any,
) -> None:
    row, block = pl.program_id(1), pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    @pl.when((row == 0) & (block == 0))
    def _() -> None:
        for_scale[...] = jnp.zeros_like(for_scale)
        for_bias[...] = jnp.zeros_like(for_bias)

    softmax = _softmax(inputs)
    weights = softmax.weights
    own = slice(inputs.num_carried, None)
    of_values = of_out[...]
    value_sums[...] += _product(weights[:, own].astype(of_values.dtype), of_values, "TS,TH->SH")
    of_weights = _product(of_values, _all_values(inputs), "TH,SH->TS")
    mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
    of_logits = weights * (of_weights - mean + of_normalizer[...])

    for_scale[...] += jnp.sum(of_logits * softmax.unscaled, axis=0, keepdims=True)
    of_unscaled = of_logits * _own_scale(inputs)
    for start, place in zip(range(0, len(of_unscaled), _LANES), _places_in_tile(inputs), strict=True):
        for_bias[:, place] += of_unscaled[start : start + _LANES]
    queries = inputs.queries[...]
    of_products = of_unscaled.astype(queries.dtype)
    for_queries[...] = _product(of_products, _all_keys(inputs), "TS,SH->TH").astype(for_queries.dtype)
    key_sums[...] += _product(of_products[:, own], queries, "TS,TH->SH")

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        for_keys[...] = key_sums[...].astype(for_keys.dtype)
        for_values[...] = value_sums[...].astype(for_values.dtype)
