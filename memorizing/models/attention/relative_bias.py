"""T5's relative bias (Raffel et al. 2020): a number learned for each head and bucket of distances, added to logits."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memorizing.context import Segment
from memorizing.models import positions
from memorizing.models.attention.base import LayerDims
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
    ) -> Float[Array, "N T S"]:
        """The bias of each query for each key; the queries are all positions of the segment, or some of them."""
        layout = segment.layout
        distances = positions.distances(layout.size, num_keys)
        buckets = positions.t5_buckets(
            distances,
            self.num_buckets,
            self.max_distance,
            layout.bidirectional,
        )
        # [N, R], R = S + T - 1
        num_distances = num_queries + num_keys - 1
        by_distance = segment.select(self.table[:, buckets], num_distances, axis=1)
        return positions.same_by_key(by_distance, num_queries, num_keys)


def position_bias(
    dims: LayerDims,
    num_buckets: int,
    max_distance: int,
    segment: Segment,
    num_queries: int,
    num_keys: int,
) -> Float[Array, "N T S"] | None:
    """The bias of the logits for the positions of queries and keys.

    To be called in a module: its submodule `bias` has the parameters.

    Args:
      dims: of the layer; `positions` says which bias.
      num_buckets, max_distance: of T5's bias; the distance is in tokens.
      segment: whose positions, or some of them, the queries are.
      num_queries, num_keys: T, S.
    """
    if dims.positions != "t5":
        return None
    bias = T5Bias(dims.num_heads, num_buckets, max_distance, name="bias")
    return bias(segment, num_queries, num_keys)


def distance_bias(
    dims: LayerDims,
    num_buckets: int,
    max_distance: int,
) -> Callable[[Int[np.ndarray, "*shape"]], Float[Array, "N *shape"]]:
    """The bias of the logits as a function of distances back in tokens, where not all queries meet all keys.

    To be called in a module: its submodule `bias` has the parameters, the same as those of `position_bias`.

    Args:
      dims, num_buckets, max_distance: as for `position_bias`; without positions the bias is 0.
    """
    if dims.positions != "t5":
        return lambda distances: jnp.zeros((dims.num_heads, *distances.shape))
    bias = T5Bias(dims.num_heads, num_buckets, max_distance, name="bias")
    return bias.at
