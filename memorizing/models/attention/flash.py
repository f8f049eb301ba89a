"""Attention whose logits never leave the chip: Pallas kernels for TPUs from v4 on.

The plain form writes a number for each head, query and key to the device's memory and reads it several times; here a
block of queries meets all its keys in the core's own memory (after Dao et al. 2022, arXiv:2205.14135). Since a block
sees all keys, no softmax is computed in parts. The backward pass computes the weights again: nothing is kept for it but
what went in. T5's bias and its gradient stay in place while the rows of a batch pass by, so that the gradient is summed
there.
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
Bias = Float[Array, "N T S"]


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
        # Here, so that shards exchange the gradient of R numbers a head, not of T * S.
        bias = positions.same_by_key(by_distance, num_queries, num_keys)
        heads_first = (array.swapaxes(1, 2) for array in (queries, keys, values))
        out, log_normalizer = softmax_attention(*heads_first, scale, bias, mask, kind == "interpreted")
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def softmax_attention(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"],
    interpret: bool = False,
) -> tuple[HeadQueries, Float[Array, "B N T"]]:
    """softmax(scale * (q . k + bias)) v over the visible keys, and the logarithms of its normalisers.

    Query head n reads key head n // (N / K).

    Args:
      queries: [B, N, T, H].
      keys, values: [B, K, S, H].
      scale: float32, of the logits.
      bias: float32.
      mask: which keys each query sees, at least one.
      interpret: whether the kernels are computed by plain operations, on any platform.
    """
    return _forward(queries, keys, values, scale, bias, mask, interpret)[0]


class _Inputs(NamedTuple):
    """What the kernels read, blocks or whole arrays; masks are numbers."""

    scale: Any
    queries: Any
    keys: Any
    values: Any
    bias: Any
    mask: Any


def _forward(
    queries: HeadQueries,
    keys: HeadKeys,
    values: HeadValues,
    scale: HeadScale,
    bias: Bias,
    mask: Bool[Array, "B T S"],
    interpret: bool,
) -> tuple[tuple[HeadQueries, Float[Array, "B N T"]], _Inputs]:
    inputs = _Inputs(scale, queries, keys, values, bias, mask.astype(jnp.int8))
    grid, blocks = _blocks(inputs)
    out, log_normalizer = pl.pallas_call(
        _forward_kernel,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, values.dtype),
            jax.ShapeDtypeStruct((*queries.shape[:-1], 1), jnp.float32),
        ],
        grid=grid,
        in_specs=[*blocks],
        out_specs=[blocks.queries, _like_queries(blocks, 1)],
        cost_estimate=_cost(inputs, num_products=2),
        compiler_params=_PARAMETERS,
        name="attention",
        interpret=interpret,
    )(*inputs)
    return (out, log_normalizer[..., 0]), inputs


def _backward(
    interpret: bool,
    inputs: _Inputs,
    gradients: tuple[HeadQueries, Float[Array, "B N T"]],
) -> tuple[Any, ...]:
    of_out, of_normalizer = gradients
    grid, blocks = _blocks(inputs)
    num_rows, num_heads, _, width = inputs.queries.shape
    num_kv_heads, num_keys = inputs.keys.shape[1:3]
    # Of each query head, also where several read the same keys.
    of_keys = pl.BlockSpec((None, None, num_keys, width), lambda head, row, block: (row, head, 0, 0))
    of_scale = pl.BlockSpec((None, 1, num_keys), lambda head, row, block: (head, 0, 0))
    shape_of_keys = (num_rows, num_heads, num_keys, width)
    sums_of_keys = pltpu.VMEM((num_keys, width), jnp.float32)
    for_queries, for_keys, for_values, for_scale, for_bias = pl.pallas_call(
        _backward_kernel,
        out_shape=[
            jax.ShapeDtypeStruct(inputs.queries.shape, inputs.queries.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.keys.dtype),
            jax.ShapeDtypeStruct(shape_of_keys, inputs.values.dtype),
            jax.ShapeDtypeStruct((num_heads, 1, num_keys), jnp.float32),
            jax.ShapeDtypeStruct(inputs.bias.shape, jnp.float32),
        ],
        grid=grid,
        in_specs=[*blocks, blocks.queries, _like_queries(blocks, 1)],
        out_specs=[blocks.queries, of_keys, of_keys, of_scale, blocks.bias],
        scratch_shapes=[sums_of_keys, sums_of_keys],
        cost_estimate=_cost(inputs, num_products=5),
        compiler_params=_PARAMETERS,
        name="attention_gradient",
        interpret=interpret,
    )(*inputs, of_out, of_normalizer[..., None])

    def of_kv_heads(gradient: Float[Array, "B N S H"]) -> HeadKeys:
        if num_heads == num_kv_heads:
            return gradient
        of_group = gradient.reshape(num_rows, num_kv_heads, -1, num_keys, width)
        return of_group.sum(axis=2, dtype=jnp.float32).astype(gradient.dtype)

    return for_queries, of_kv_heads(for_keys), of_kv_heads(for_values), for_scale.sum(axis=(1, 2)), for_bias, None


softmax_attention.defvjp(_forward, _backward)


def _blocks(inputs: _Inputs) -> tuple[tuple[int, int, int], _Inputs]:
    """The grid, [heads, rows, blocks of queries], and what of each array a kernel sees at a place of it."""
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    num_kv_heads, num_keys = inputs.keys.shape[1:3]
    queries_of_kv_head = num_heads // num_kv_heads
    at_once = num_queries
    while at_once * num_keys > BLOCK_LOGITS and at_once % (2 * _LANES) == 0:
        at_once //= 2

    def place_of_keys(head: Any, row: Any, block: Any) -> tuple[Any, ...]:
        return row, jax.lax.div(head, jnp.int32(queries_of_kv_head)), 0, 0

    keys = pl.BlockSpec((None, None, num_keys, width), place_of_keys)
    blocks = _Inputs(
        scale=pl.BlockSpec(memory_space=pltpu.SMEM),
        queries=pl.BlockSpec((None, None, at_once, width), lambda head, row, block: (row, head, block, 0)),
        keys=keys,
        values=keys,
        # All of a head's, as long as its rows pass by.
        bias=pl.BlockSpec((None, num_queries, num_keys), lambda head, row, block: (head, 0, 0)),
        mask=pl.BlockSpec((None, at_once, num_keys), lambda head, row, block: (row, block, 0)),
    )
    return (num_heads, num_rows, num_queries // at_once), blocks


def _like_queries(blocks: _Inputs, width: int) -> pl.BlockSpec:
    """Vectors of another width, one for each query."""
    return pl.BlockSpec((*blocks.queries.block_shape[:-1], width), blocks.queries.index_map)


def _cost(inputs: _Inputs, num_products: int) -> pl.CostEstimate:
    """What a kernel computes and moves, by which it is priced: see `memorizing.cost.pricing`."""
    num_rows, num_heads, num_queries, width = inputs.queries.shape
    num_logits = num_rows * num_heads * num_queries * inputs.keys.shape[2]
    # What goes in is read about once forward; backward gradients as large go in and out as well.
    return pl.CostEstimate(
        flops=2 * num_products * num_logits * width,
        bytes_accessed=num_products * sum(array.nbytes for array in inputs[1:]) // 2,
        transcendentals=num_logits,
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
    unscaled = _product(inputs.queries[...], inputs.keys[...], "TH,SH->TS") + inputs.bias[_own_queries(inputs)]
    # Registers of TPUs v4 compare no small numbers.
    visible = inputs.mask[...].astype(jnp.int32) != 0
    logits = jnp.where(visible, unscaled * _own_scale(inputs), HIDDEN)
    greatest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - greatest)
    normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
    return _Softmax(unscaled, exponentials / normalizer, greatest + jnp.log(normalizer))


def _own_queries(inputs: _Inputs) -> Any:
    """Which of a head's queries are those of the block."""
    at_once = inputs.queries.shape[0]
    return pl.ds(pl.program_id(2) * at_once, at_once)


def _own_scale(inputs: _Inputs) -> Float[Array, ""]:
    return inputs.scale[pl.program_id(0)]


def _product(left: jax.Array, right: jax.Array, axes: str) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _forward_kernel(*refs: Any) -> None:
    *inputs, out, log_normalizer = refs
    inputs = _Inputs(*inputs)
    softmax = _softmax(inputs)
    values = inputs.values[...]
    out[...] = _product(softmax.weights.astype(values.dtype), values, "TS,SH->TH").astype(out.dtype)
    log_normalizer[...] = softmax.log_normalizer


def _backward_kernel(*refs: Any) -> None:
    *inputs, of_out, of_normalizer, for_queries, for_keys, for_values, for_scale, for_bias, key_sums, value_sums = refs
    inputs = _Inputs(*inputs)
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
    of_values = of_out[...]
    value_sums[...] += _product(weights.astype(of_values.dtype), of_values, "TS,TH->SH")
    of_weights = _product(of_values, inputs.values[...], "TH,SH->TS")
    mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
    of_logits = weights * (of_weights - mean + of_normalizer[...])

    for_scale[...] += jnp.sum(of_logits * softmax.unscaled, axis=0, keepdims=True)
    of_unscaled = of_logits * _own_scale(inputs)
    for_bias[_own_queries(inputs)] += of_unscaled
    queries = inputs.queries[...]
    of_products = of_unscaled.astype(queries.dtype)
    for_queries[...] = _product(of_products, inputs.keys[...], "TS,SH->TH").astype(for_queries.dtype)
    key_sums[...] += _product(of_products, queries, "TS,TH->SH")

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        for_keys[...] = key_sums[...].astype(for_keys.dtype)
        for_values[...] = value_sums[...].astype(for_values.dtype)
