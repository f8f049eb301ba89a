"""Positions: relative ones as pure functions, and learned absolute ones.

T5's buckets (Raffel et al. 2020, section 2.1), Transformer-XL's sinusoids and its shift (Dai et al. 2019, appendix B),
Reformer's axial embedding (Kitaev et al. 2020, appendix D).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memorizing.errors import UserError
from memorizing.models.layers import parameter

# A TPU moves whole registers when data move by a multiple of so many places.
_TPU_LANES = 128


def distances(num_queries: int, num_keys: int) -> Int[np.ndarray, "R"]:
    """All distances, in tokens, from a query back to a key: from -(T - 1), a later key, to S - 1; R = S + T - 1.

    The keys end where the queries end.
    """
    last_query = num_queries - 1
    return np.arange(-last_query, num_keys)


def check_buckets(owner: str, num_buckets: int, max_distance: int) -> None:
    """Raises UserError where buckets and distances do not fit: the first half of the buckets have a distance each."""
    if max_distance <= num_buckets // 2:
        raise UserError(
            f"{owner}.max_distance = {max_distance}: more than half of {owner}.num_buckets = {num_buckets}, each of which "
            "stands for one distance"
        )


def t5_buckets(
    distances: Int[np.ndarray, "*shape"],
    num_buckets: int,
    max_distance: int,
    bidirectional: bool = False,
) -> Int[np.ndarray, "*shape"]:
    """Maps distances back in tokens to buckets.

    There is one bucket for each distance up to half the number of buckets. The other half grows logarithmically up to
    `max_distance`; the last bucket also takes everything beyond it.

    Args:
      distances: query position minus key position.
      num_buckets: size of the table.
      max_distance: distance, in tokens, from which on all keys share the last bucket.
      bidirectional: whether later keys have half of the buckets to themselves; else they share the bucket of distance
        0.

    Returns:
      int32 array with values in [0, num_buckets).
    """
    if bidirectional:
        half = num_buckets // 2
        first_bucket = np.where(distances < 0, half, 0)
        by_length = t5_buckets(np.abs(distances), half, max_distance)
        return first_bucket.astype(np.int32) + by_length

    num_exact = num_buckets // 2
    num_logarithmic = num_buckets - num_exact
    last_bucket = num_buckets - 1
    distances = np.maximum(distances, 0)

    # From 0 at the first logarithmic bucket to 1 at the greatest distance.
    relative = np.maximum(distances, num_exact) / num_exact
    fraction = np.log(relative) / np.log(max_distance / num_exact)
    steps = (fraction * num_logarithmic).astype(np.int32)
    logarithmic = np.minimum(num_exact + steps, last_bucket)

    is_exact = distances < num_exact
    buckets = np.where(is_exact, distances, logarithmic)
    return buckets.astype(np.int32)


def by_key(by_distance: Float[Array, "*rows T R"], num_keys: int) -> Float[Array, "*rows T S"]:
    """Turns values by distance into values by key.

    The value of query t for key s is its value for the distance from query t back to key s. The result is built by
    reshaping (the shift of Transformer-XL, appendix B), not by a gather, which accelerators do badly.

    Args:
      by_distance: each query's values in the order of `distances`, R = S + T - 1.
      num_keys: S.
    """
    *rows, num_queries, num_distances = by_distance.shape
    first = num_queries - 1
    last = first + num_queries * num_distances

    # Query t needs its reversed values moved left by T - 1 - t. With one value more in each row, [*rows, T, R + 1], the
    # same memory read as rows of R, from value T - 1 on, has every row moved as far as it has to be.
    no_padding = [(0, 0)] * (by_distance.ndim - 1)
    padded = jnp.pad(by_distance[..., ::-1], [*no_padding, (0, 1)])
    sequence = padded.reshape(*rows, -1)
    # [*rows, T, R]
    moved = sequence[..., first:last].reshape(*rows, num_queries, num_distances)
    return moved[..., :num_keys]


def same_by_key(
    by_distance: Float[Array, "*rows R"],
    num_queries: int,
    num_keys: int,
) -> Float[Array, "*rows T S"]:
    """`by_key` for values that are the same for all queries.

    Args:
      by_distance: in the order of `distances`, R = S + T - 1.
      num_queries, num_keys: T, S.
    """
    # The values of a query are those of the query `tile` rows before it, moved `tile` places to the right. So one tile
    # of queries is built, wide enough that the others are slices of it.
    tile = _TPU_LANES if num_queries % _TPU_LANES == 0 else num_queries
    last_tile = num_queries - tile

    *rows, num_distances = by_distance.shape
    # [*rows, tile, R]
    of_tile = jnp.broadcast_to(by_distance[..., None, :], (*rows, tile, num_distances))
    # [*rows, tile, S + T - tile]
    wide = by_key(of_tile, last_tile + num_keys)

    tiles = []
    for first_query in range(0, num_queries, tile):
        first = last_tile - first_query
        tiles.append(wide[..., first : first + num_keys])
    return jnp.concatenate(tiles, axis=-2)


def sinusoids(positions: Int[np.ndarray, "R"], width: int) -> Float[Array, "R D"]:
    """Sines and cosines of the positions, not learned (Vaswani et al. 2017).

    The `width / 2` wavelengths go from 2 pi to 10000 * 2 pi.
    """
    exponents = np.arange(0, width, 2) / width
    frequencies = 10_000.0**-exponents
    # [R, D / 2]
    angles = positions[:, None] * frequencies[None, :]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves[:, :width]


class AxialPositions(nn.Module):
    """A learned vector of each position of a segment, put together from a part for each axis.

    With sizes (n, m) position i * m + j has the i-th vector of the first table beside the j-th of the second: n + m
    vectors instead of n * m. With one size it is a plain learned embedding.

    Attributes:
      sizes: of the axes; their product is the number of positions.
      embed_dim: D, which the axes share equally.
      dtype: of the result.
    """

    sizes: tuple[int, ...]
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, first: int | jax.Array, num_positions: int) -> Float[Array, "T D"]:
        """The vectors of consecutive positions, from the first one on."""
        width = self.embed_dim // len(self.sizes)
        parts = []
        for axis, size in enumerate(self.sizes):
            initializer = nn.initializers.normal(stddev=1.0)
            table = parameter(self, f"axis_{axis}", initializer, (size, width), (None, "embed"))
            # [n, m, ..., width]
            shape = tuple(size if other == axis else 1 for other in range(len(self.sizes)))
            parts.append(jnp.broadcast_to(table.reshape(*shape, width), (*self.sizes, width)))
        every = jnp.concatenate(parts, axis=-1).reshape(math.prod(self.sizes), self.embed_dim)
        own = jax.lax.dynamic_slice_in_dim(every, first, num_positions)
        return own.astype(self.dtype)
