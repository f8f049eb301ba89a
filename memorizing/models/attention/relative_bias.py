"""T5's relative bias (Raffel et al. 2020): a number learned for each head and bucket of distances, added to logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memorizing.context import Segment
from memorizing.errors import Count, Range
from memorizing.models import positions
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.layers import parameter


class T5Bias(nn.Module):
    """A learned bias for each head and bucket of distances (Raffel et al. 2020)."""

    num_heads: int
    num_buckets: int
    max_distance: int

    def setup(self) -> None:
        self.table = parameter(
            self,
            "table",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            shape=(self.num_heads, self.num_buckets),
            axes=("heads", None),
        )

    def at(self, distances: Int[np.ndarray, "*shape"]) -> Float[Array, "N *shape"]:
        """The bias at some distances back, in tokens."""
        buckets = positions.t5_buckets(distances, self.num_buckets, self.max_distance)
        return self.table[:, buckets]

    def __call__(
        self,
        segment: Segment,
        num_queries: int,
        num_keys: int,
    ) -> Float[Array, "N R"]:
        """The bias by distance, in the order of `positions.distances`, R = S + T - 1.

        The queries are all positions of the segment, or some of them.
        """
        layout = segment.layout
        distances = positions.distances(layout.size, num_keys)
        buckets = positions.t5_buckets(
            distances,
            self.num_buckets,
            self.max_distance,
            layout.bidirectional,
        )
        num_distances = num_queries + num_keys - 1
        return segment.select(segment.tied(self.table)[:, buckets], num_distances, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedAttention(Attention):
    """A mechanism whose logits have T5's bias, where the positions of its layers are 't5'.

    Attributes:
      num_buckets: of distances.
      max_distance: in tokens, from which on all keys share the last bucket.
    """

    num_buckets: Annotated[int, Range(2, 2**16)] = 32
    max_distance: Count = 128

    def __post_init__(self) -> None:
        positions.check_buckets(type(self).__name__, self.num_buckets, self.max_distance)

    def position_bias(
        self,
        dims: LayerDims,
        segment: Segment,
        num_queries: int,
        num_keys: int,
    ) -> Float[Array, "N R"] | None:
        """The bias of the logits by the distance of query and key: see `T5Bias`.

        To be called in a module: its submodule `bias` has the parameters.

        Args:
          dims: of the layer; `positions` says which bias.
          segment: whose positions, or some of them, the queries are.
          num_queries, num_keys: T, S.
        """
        return self._bias(dims)(segment, num_queries, num_keys) if dims.positions == "t5" else None

    def distance_bias(self, dims: LayerDims) -> Callable[[Int[np.ndarray, "*shape"]], Float[Array, "N *shape"]]:
        """The bias of the logits as a function of distances back in tokens, where not all queries meet all keys.

        To be called in a module: its submodule `bias` has the parameters, the same as those of `position_bias`.

        Args:
          dims: of the layer; without positions the bias is 0.
        """
        if dims.positions == "t5":
            return self._bias(dims).at
        return lambda distances: jnp.zeros((dims.num_heads, *distances.shape))

    def _bias(self, dims: LayerDims) -> T5Bias:
        return T5Bias(dims.num_heads, self.num_buckets, self.max_distance, name="bias")
