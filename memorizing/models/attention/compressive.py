"""The Compressive Transformer of Rae et al. (2020): what leaves Transformer-XL's memory is compressed, and stays."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import Activations, AxesTree, Scalar
from memorizing.context import Layout, Report, Segment
from memorizing.errors import Count, CountOrNone, Factor, UserError
from memorizing.models.attention.base import Attention, Example, LayerDims, matmul_flops
from memorizing.models.attention.local import hide, push, visible_keys
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

    hidden: Float[Array, "B W D"] | Any
    valid: Bool[Array, "B W"] | Any
    usage: Float[Array, "B W"] | Any
    compressed: Float[Array, "B C D"] | Any
    compressed_valid: Bool[Array, "B C"] | Any


@dataclasses.dataclass(frozen=True)
class CompressiveAttention(Attention):
    """Attends to [compressed memory; memory; segment] with Transformer-XL's relative positions.

    The oldest segment leaves the memory as `segment / rate` compressed states. Only the auxiliary loss trains the
    compressor, and it trains nothing else (section 3.2).

    Attributes:
      window: W, positions in the memory; a multiple of the segment length.
      compressed_size: C, compressed states.
      rate: positions that become one compressed state; divides the segment length.
      compressor: 'mean', 'max', 'conv' (kernel and stride are the rate), 'dilated' (two dilated convolutions before
        'conv'), or 'most_used' (the positions that were attended to most stay as they are, the others are dropped).
      loss: 'attention' (reconstructs what the layer reads from the old states), 'autoencoding' (the old states
        themselves) or 'none'.
      loss_weight: factor of the auxiliary loss.
    """

    can_decode: ClassVar[bool] = True

    window: Count = 512
    compressed_size: CountOrNone = 512
    rate: Count = 4
    compressor: Literal["mean", "max", "conv", "dilated", "most_used"] = "conv"
    loss: Literal["attention", "autoencoding", "none"] = "attention"
    loss_weight: Factor = 1.0

    def check(self, segment_length: int) -> None:
        if self.window % segment_length or self.window < 1:
            raise UserError(
                f"CompressiveAttention.window = {self.window} is not a multiple of the segment length {segment_length}"
            )
        if self.rate < 1 or segment_length % self.rate:
            raise UserError(
                f"CompressiveAttention.rate = {self.rate} does not divide the segment length {segment_length}"
            )
        num_states = segment_length // self.rate
        if self.compressed_size < num_states:
            raise UserError(
                f"CompressiveAttention.compressed_size = {self.compressed_size} does not hold the {num_states} states "
                f"of one segment (segment length {segment_length}, rate {self.rate})"
            )

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> CompressiveState:
        memory = (batch_size, self.window)
        compressed_memory = (batch_size, self.compressed_size)
        return CompressiveState(
            hidden=jnp.zeros((*memory, dims.embed_dim), dims.dtype),
            valid=jnp.zeros(memory, bool),
            usage=jnp.zeros(memory, jnp.float32),
            compressed=jnp.zeros((*compressed_memory, dims.embed_dim), dims.dtype),
            compressed_valid=jnp.zeros(compressed_memory, bool),
        )

    def state_axes(self) -> AxesTree:
        content = ("batch", "length", "embed")
        of_slots = ("batch", "length")
        return CompressiveState(
            hidden=content,
            valid=of_slots,
            usage=of_slots,
            compressed=content,
            compressed_valid=of_slots,
        )

    def fresh_state(self) -> CompressiveState:
        return CompressiveState(
            hidden=None,
            valid=False,
            usage=None,
            compressed=None,
            compressed_valid=False,
        )

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return CompressiveLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Transformer-XL's attention to both memories, and the compression of as many positions as enter.

        Auxiliary losses are not part of it: they are computed in training only.
        """
        num_carried = self.window + self.compressed_size
        attention = relative_attention_flops(dims, layout, num_carried)
        # T / c windows of c positions each, D -> D: the rate drops out. 'dilated' begins with two convolutions of width
        # 3.
        kernel_widths = {"conv": 1, "dilated": 1 + 2 * 3}.get(self.compressor, 0)
        compression = kernel_widths * matmul_flops(layout.length, dims.embed_dim, dims.embed_dim)
        return attention + compression

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
        self,
        x: Activations,
        segment: Segment,
        state: CompressiveState,
    ) -> tuple[Activations, CompressiveState | None, Report]:
        config = self.attention
        # [B, W, D]
        hidden = hide(state.hidden, state.valid)
        # [B, C, D]
        compressed = hide(state.compressed, state.compressed_valid)
        # [B, C + W, D]
        carried = jnp.concatenate([compressed, hidden], axis=1)
        carried_valid = jnp.concatenate([state.compressed_valid, state.valid], axis=1)

        # [B, T, S], S = C + W + T
        mask = visible_keys(segment, x.shape[1], carried_valid)
        relative = RelativeAttention(self.dims, name="relative")
        y, weights, kv_cache = relative(x, carried, mask, segment)
        if segment.decoding is not None:
            return y, None, Report(kv_cache=kv_cache)

        # [B, W], the attention that each slot of the memory has received so far, this segment's included.
        received = _received(weights, segment)
        usage = state.usage + received[:, config.compressed_size : carried.shape[1]]

        # The oldest segment of the memory [B, T, D], and its compressed states [B, P, D], P = T / rate.
        length = segment.layout.length
        old = hidden[:, :length]
        old_valid = state.valid[:, :length]
        compressor = Compressor(config, self.dims, name="compressor")
        new, new_valid = compressor(old, old_valid, usage[:, :length])

        own_x = segment.layout.own(x)
        is_real = segment.layout.own(segment.is_real)
        losses = self._losses(relative, own_x, is_real, old, new, old_valid)
        new_state = CompressiveState(
            hidden=push(hidden, own_x),
            valid=push(state.valid, is_real),
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
        has_parameters = config.compressor in ("conv", "dilated")
        if config.loss == "none" or not has_parameters:
            return {}
        if config.loss == "attention":
            error = relative.content(x, old) - relative.content(x, new)
            counts = is_real
        else:
            decompressor = Decompressor(config, self.dims, name="decompressor")
            error = decompressor(new) - old
            counts = old_valid

        # [B, T], by position; padding asks for nothing.
        squares = jnp.square(error.astype(jnp.float32))
        squares = jnp.mean(squares.reshape(*x.shape[:2], -1), axis=2)
        # [B], by row.
        total = jnp.sum(jnp.where(counts, squares, 0.0), axis=1)
        mean = total / jnp.maximum(jnp.sum(counts, axis=1), 1)
        has_old = jnp.all(old_valid, axis=1)
        loss = jnp.mean(jnp.where(has_old, mean, 0.0))
        return {f"compression_{config.loss}": config.loss_weight * loss}


class Compressor(nn.Module):
    """f_c: [B, T, D] to [B, T / rate, D]."""

    config: CompressiveAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        old: Activations,
        valid: Bool[Array, "B T"],
        usage: Float[Array, "B T"],
    ) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """Compresses; a compressed state is valid if all of its positions are."""
        config = self.config
        batch_size, length, width = old.shape
        num_states = length // config.rate
        if config.compressor == "most_used":
            return _most_used(old, valid, usage, num_states)
        if config.compressor == "dilated":
            old = self._dilated(old)

        # [B, P, rate, D]
        blocks = old.reshape(batch_size, num_states, config.rate, width)
        blocks_valid = valid.reshape(batch_size, num_states, config.rate)
        new_valid = blocks_valid.all(axis=-1)
        if config.compressor == "mean":
            return blocks.mean(axis=2), new_valid
        if config.compressor == "max":
            return blocks.max(axis=2), new_valid
        convolution = Einsum(
            "BPCD,CDE->BPE",
            shape=(config.rate, width, width),
            axes=(None, "embed", None),
            dtype=self.dims.dtype,
            name="convolution",
        )
        return convolution(blocks), new_valid

    def _dilated(self, old: Activations) -> Activations:
        """Two dilated convolutions of width 3, with residuals."""
        kernel_init = nn.initializers.lecun_normal()
        bias_init = nn.initializers.zeros
        for index, dilation in enumerate((1, 2)):
            convolution = nn.Conv(
                self.dims.embed_dim,
                kernel_size=(3,),
                kernel_dilation=dilation,
                kernel_init=nn.with_logical_partitioning(kernel_init, (None, "embed", None)),
                bias_init=nn.with_logical_partitioning(bias_init, (None,)),
                dtype=self.dims.dtype,
                name=f"dilated_{index}",
            )
            old = old + nn.relu(convolution(old))
        return old


class Decompressor(nn.Module):
    """Reconstructs the old states for the auto-encoding loss: [B, T / rate, D] to [B, T, D]."""

    config: CompressiveAttention
    dims: LayerDims

    @nn.compact
    def __call__(self, new: Float[Array, "B P D"]) -> Activations:
        rate = self.config.rate
        batch_size, num_states, width = new.shape
        convolution = Einsum(
            "BPE,ECD->BPCD",
            shape=(width, rate, width),
            axes=(None, None, "embed"),
            dtype=self.dims.dtype,
            name="convolution",
        )
        # [B, P, rate, D]
        blocks = convolution(new)
        return blocks.reshape(batch_size, num_states * rate, width)


def _received(weights: Float[Array, "B N T S"], segment: Segment) -> Float[Array, "B S"]:
    """The attention that each key receives from the segment, summed over heads and queries; without gradient."""
    is_query = segment.is_real[:, None, :, None]
    weights = jax.lax.stop_gradient(weights)
    of_queries = jnp.where(is_query, weights, 0.0)
    return of_queries.sum(axis=(1, 2))


def _most_used(
    old: Activations,
    valid: Bool[Array, "B T"],
    usage: Float[Array, "B T"],
    num_states: int,
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
    """The positions with the greatest usage, in the order of time."""
    _, chosen = jax.lax.top_k(usage, num_states)
    # [B, P]
    chosen = jnp.sort(chosen, axis=1)
    new = jnp.take_along_axis(old, chosen[:, :, None], axis=1)
    new_valid = jnp.take_along_axis(valid, chosen, axis=1)
    return new, new_valid
