"""Compressive Transformer (Rae et al. 2020): what leaves the Transformer-XL memory is compressed and kept for longer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import Activations, AxesTree, Scalar
from memorizing.context import Layout, Report, Segment
from memorizing.errors import UserError
from memorizing.models.attention.base import Attention, Example, LayerDims, hide, matmul_flops, visible_keys
from memorizing.models.attention.transformer_xl import RelativeAttention, relative_attention_flops
from memorizing.models.layers import Einsum


@struct.dataclass
class CompressiveState:
    """Inputs of the layer at the last W positions, and C compressed states of older ones.

    Attributes:
      hidden: [B, W, D] in the dtype of the activations, oldest first.
      valid: bool [B, W].
      usage: float32 [B, W], attention that each position has received, summed over heads and queries.
      compressed: [B, C, D], oldest first.
      compressed_valid: bool [B, C].
    """

    hidden: Float[Array, "B W D"]
    valid: Bool[Array, "B W"]
    usage: Float[Array, "B W"]
    compressed: Float[Array, "B C D"]
    compressed_valid: Bool[Array, "B C"]


@dataclasses.dataclass(frozen=True)
class CompressiveAttention(Attention):
    """Attends to [compressed memory; memory; segment] with Transformer-XL's relative positions.

    The oldest segment leaves the memory as `segment / rate` compressed states. Only the auxiliary loss trains the
    compressor, and it trains nothing else (section 3.2).

    Attributes:
      window: W, positions in the memory; a multiple of the segment length.
      compressed_size: C, compressed states.
      rate: positions that become one compressed state; divides the segment length.
      compressor: 'mean', 'max', 'conv' (kernel and stride are the rate), 'dilated' (two dilated convolutions before it),
        or 'most_used' (keeps the positions that were attended to most, as they are).
      loss: 'attention' (reconstructs what the layer reads from the old states), 'autoencoding' (the old states
        themselves) or 'none'.
      loss_weight: factor of the auxiliary loss.
    """

    can_decode: ClassVar[bool] = True

    window: int = 512
    compressed_size: int = 512
    rate: int = 4
    compressor: Literal["mean", "max", "conv", "dilated", "most_used"] = "conv"
    loss: Literal["attention", "autoencoding", "none"] = "attention"
    loss_weight: float = 1.0

    def check(self, segment_length: int) -> None:
        if self.window % segment_length or self.window < 1:
            raise UserError(
                f"CompressiveAttention.window = {self.window} is not a multiple of the segment length {segment_length}"
            )
        if self.rate < 1 or segment_length % self.rate:
            raise UserError(
                f"CompressiveAttention.rate = {self.rate} does not divide the segment length {segment_length}"
            )
        if self.compressed_size < segment_length // self.rate:
            raise UserError(
                f"CompressiveAttention.compressed_size = {self.compressed_size} does not hold the "
                f"{segment_length // self.rate} states of one segment (segment length {segment_length}, rate {self.rate})"
            )

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> CompressiveState:
        return CompressiveState(
            hidden=jnp.zeros((batch_size, self.window, dims.embed_dim), dims.dtype),
            valid=jnp.zeros((batch_size, self.window), bool),
            usage=jnp.zeros((batch_size, self.window), jnp.float32),
            compressed=jnp.zeros((batch_size, self.compressed_size, dims.embed_dim), dims.dtype),
            compressed_valid=jnp.zeros((batch_size, self.compressed_size), bool),
        )

    def state_axes(self) -> AxesTree:
        content, flags = ("batch", "length", "embed"), ("batch", "length")
        return CompressiveState(content, flags, flags, content, flags)

    def fresh_state(self) -> CompressiveState:
        return CompressiveState(hidden=None, valid=False, usage=None, compressed=None, compressed_valid=False)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return CompressiveLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Transformer-XL's attention over all that is remembered, and the compression of as many positions as enter.

        Auxiliary losses are a matter of training.
        """
        # T / c windows of c positions each, D -> D: the rate drops out. 'dilated' has two convolutions of width 3 first.
        kernel_widths = {"conv": 1, "dilated": 1 + 2 * 3}.get(self.compressor, 0)
        compression = kernel_widths * matmul_flops(layout.length, dims.embed_dim, dims.embed_dim)
        return relative_attention_flops(dims, layout, self.window + self.compressed_size) + compression

    @classmethod
    def example(cls, segment_length: int) -> Example:
        meaning = f"{segment_length} cached and {segment_length} compressed positions in every layer"
        return Example("compressive", meaning, cls(window=segment_length, compressed_size=segment_length))


class CompressiveLayer(nn.Module):
    """The layer: see `Attention.layer`."""

    attention: CompressiveAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self, x: Activations, segment: Segment, state: CompressiveState
    ) -> tuple[Activations, CompressiveState | None, Report]:
        config, own = self.attention, segment.layout.own
        # [B, W, D] and [B, C, D]
        hidden = hide(state.hidden, state.valid)
        compressed = hide(state.compressed, state.compressed_valid)
        carried = jnp.concatenate([compressed, hidden], axis=1)
        carried_valid = jnp.concatenate([state.compressed_valid, state.valid], axis=1)
        mask = visible_keys(segment, x.shape[1], carried_valid)
        relative = RelativeAttention(self.dims, name="relative")
        # [B, T, D] and [B, N, T, S], S = C + W + T
        y, weights, kv_cache = relative(x, carried, mask, segment)
        if segment.decoding is not None:
            return y, None, Report(kv_cache=kv_cache)

        # Attention that each slot of the memory has received so far, this segment's included.
        # [B, S]
        is_query = segment.is_real[:, None, :, None]
        received = jnp.where(is_query, jax.lax.stop_gradient(weights), 0.0).sum(axis=(1, 2))
        usage = state.usage + received[:, config.compressed_size : carried.shape[1]]
        length = segment.layout.length
        # The oldest segment of the memory [B, T, D], and what it becomes [B, T / rate, D].
        old = hidden[:, :length]
        old_valid = state.valid[:, :length]
        new, new_valid = Compressor(config, self.dims, name="compressor")(old, old_valid, usage[:, :length])
        losses = self._losses(relative, own(x), own(segment.is_real), old, new, old_valid)

        def push(slots: jax.Array, entering: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(jnp.concatenate([slots, entering], axis=1)[:, -slots.shape[1] :])

        new_state = CompressiveState(
            hidden=push(hidden, own(x)),
            valid=push(state.valid, own(segment.is_real)),
            usage=push(usage, jnp.zeros((x.shape[0], length), jnp.float32)),
            compressed=push(compressed, new),
            compressed_valid=push(state.compressed_valid, new_valid),
        )
        return y, new_state, Report(losses=losses)

    def _losses(
        self,
        relative: RelativeAttention,
        x: Activations,
        is_real: Bool[Array, "B T"],
        old: Activations,
        new: Float[Array, "B P D"],
        old_valid: Bool[Array, "B T"],
    ) -> dict[str, Scalar]:
        """Mean square of what compression lost; a row whose oldest segment is empty adds nothing."""
        config = self.attention
        if config.loss == "none" or config.compressor in ("mean", "max", "most_used"):
            return {}
        if config.loss == "attention":
            error = relative.content(x, old) - relative.content(x, new)
            counts = is_real
        else:
            error = Decompressor(config, self.dims, name="decompressor")(new) - old
            counts = old_valid
        # [B, T] by position; padding asks for nothing.
        squares = jnp.mean(jnp.square(error.astype(jnp.float32)).reshape(*x.shape[:2], -1), axis=2)
        squares = jnp.sum(jnp.where(counts, squares, 0.0), axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1)
        has_old = jnp.all(old_valid, axis=1)
        return {f"compression_{config.loss}": config.loss_weight * jnp.mean(jnp.where(has_old, squares, 0.0))}


class Compressor(nn.Module):
    """f_c: [B, T, D] to [B, T / rate, D]."""

    config: CompressiveAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self, old: Activations, valid: Bool[Array, "B T"], usage: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """Compresses; a compressed state is valid if all of its positions are."""
        config = self.config
        if config.compressor == "most_used":
            return _most_used(old, valid, usage, old.shape[1] // config.rate)
        if config.compressor == "dilated":
            initializer = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "embed", None))
            for index, dilation in enumerate((1, 2)):
                convolution = nn.Conv(
                    self.dims.embed_dim,
                    (3,),
                    kernel_dilation=dilation,
                    kernel_init=initializer,
                    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
                    dtype=self.dims.dtype,
                    name=f"dilated_{index}",
                )
                old = old + nn.relu(convolution(old))
        batch_size, length, width = old.shape
        blocks = old.reshape(batch_size, length // config.rate, config.rate, width)
        valid = valid.reshape(batch_size, length // config.rate, config.rate).all(axis=-1)
        if config.compressor == "mean":
            return blocks.mean(axis=2), valid
        if config.compressor == "max":
            return blocks.max(axis=2), valid
        shape = (config.rate, width, width)
        return Einsum("BPCD,CDE->BPE", shape, (None, "embed", None), self.dims.dtype, name="convolution")(blocks), valid


class Decompressor(nn.Module):
    """Reconstructs the old states for the auto-encoding loss: [B, T / rate, D] to [B, T, D]."""

    config: CompressiveAttention
    dims: LayerDims

    @nn.compact
    def __call__(self, new: Float[Array, "B P D"]) -> Activations:
        batch_size, num_states, width = new.shape
        shape = (width, self.config.rate, width)
        blocks = Einsum("BPE,ECD->BPCD", shape, (None, None, "embed"), self.dims.dtype, name="convolution")(new)
        return blocks.reshape(batch_size, num_states * self.config.rate, width)


def _most_used(
    old: Activations, valid: Bool[Array, "B T"], usage: Float[Array, "B T"], num_kept: int
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
    """The positions with the greatest usage, in the order of time."""
    _, kept = jax.lax.top_k(usage, num_kept)
    kept = jnp.sort(kept, axis=1)
    return jnp.take_along_axis(old, kept[:, :, None], axis=1), jnp.take_along_axis(valid, kept, axis=1)
