"""Positions as pure functions.

T5's buckets (Raffel et al. 2020, section 2.1), Transformer-XL's sinusoids and its shift (Dai et al. 2019, appendix B),
rotary positions (Su et al. 2021).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memorizing.errors import Count, FactorAboveZero, Share, UserError

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

    # A single bucket, half of two, takes all.
    num_exact = max(num_buckets // 2, 1)
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
    tile = tile_length(num_queries)
    wide = wide_tile(by_distance, num_queries, num_keys)
    tiles = []
    for first_query in range(0, num_queries, tile):
        first = first_of_tile(first_query, num_queries)
        tiles.append(wide[..., first : first + num_keys])
    return jnp.concatenate(tiles, axis=-2)


def wide_tile(
    by_distance: Float[Array, "*rows R"],
    num_queries: int,
    num_keys: int,
) -> Float[Array, "*rows tile wide"]:
    """Values of a few queries, wide enough that those of all others are slices of it: see `first_of_tile`.

    The values of a query are those of the query `tile` rows before it, moved `tile` places to the right.

    Args:
      by_distance, num_queries, num_keys: see `same_by_key`.
    """
    tile = tile_length(num_queries)
    *rows, num_distances = by_distance.shape
    # [*rows, tile, R]
    of_tile = jnp.broadcast_to(by_distance[..., None, :], (*rows, tile, num_distances))
    return by_key(of_tile, num_keys + num_queries - tile)


def tile_length(num_queries: int) -> int:
    """Queries of a tile."""
    return _TPU_LANES if num_queries % _TPU_LANES == 0 else num_queries


def first_of_tile(first_query: Any, num_queries: int) -> Any:
    """Where in a wide tile the keys of the tile begin whose first query is this one, a number or int32."""
    return num_queries - tile_length(num_queries) - first_query


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


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with their position.

    Element i of a head is paired with element i + d / 2 of its first d (the layout of Hugging Face checkpoints), and
    the pair is turned by position * frequency of i. A product of query and key depends on their distance alone, so that
    positions may be counted from anywhere.

    Attributes:
      theta: frequency of pair i is theta ** (-2 i / d).
      share: d as a share of the width of a head H; the other elements are not turned.
      scaling: 'linear' divides all frequencies by `factor`; 'llama3' those alone whose wavelength is long against
        `original_length`, as Llama 3.1 does.
      factor: of the scaling.
      low_factor, high_factor: of 'llama3': wavelengths above original_length / low_factor are scaled, those below
        original_length / high_factor are not, and between them partly.
      original_length: of 'llama3': positions of the training before.
    """

    theta: FactorAboveZero = 10_000.0
    share: Share = 1.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: FactorAboveZero = 1.0
    low_factor: FactorAboveZero = 1.0
    high_factor: FactorAboveZero = 4.0
    original_length: Count = 8192

    def __post_init__(self) -> None:
        if self.low_factor >= self.high_factor:
            raise UserError(
                f"Rotary.low_factor = {self.low_factor}: has to be below Rotary.high_factor = {self.high_factor}"
            )

    def check(self, head_dim: int) -> None:
        """Raises UserError where the elements of a head that are turned are not pairs."""
        num_turned = self._num_turned(head_dim)
        if num_turned < 2 or num_turned % 2:
            raise UserError(
                f"Rotary.share = {self.share} of LMConfig.head_dim = {head_dim}: {num_turned} elements are turned, which "
                "has to be an even number above 0"
            )

    def turn(self, x: Float[Array, "*shape H"], positions: Int[Array, "*#shape"]) -> Float[Array, "*shape H"]:
        """Queries or keys at their positions, computed in float32.

        Args:
          x: each [H].
          positions: of each, with as many axes.
        """
        frequencies = self.frequencies(x.shape[-1])
        num_pairs = len(frequencies)
        # [*shape, d / 2]
        by_pair = frequencies.reshape((1,) * positions.ndim + (num_pairs,))
        angles = positions.astype(jnp.float32)[..., None] * by_pair
        cosines = jnp.cos(angles)
        sines = jnp.sin(angles)

        wide = x.astype(jnp.float32)
        first = wide[..., :num_pairs]
        second = wide[..., num_pairs : 2 * num_pairs]
        rest = wide[..., 2 * num_pairs :]
        turned_first = first * cosines - second * sines
        turned_second = second * cosines + first * sines
        turned = jnp.concatenate([turned_first, turned_second, rest], axis=-1)
        return turned.astype(x.dtype)

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "pairs"]:
        """Angle of each pair from one position to the next, float32."""
        num_turned = self._num_turned(head_dim)
        exponents = np.arange(0, num_turned, 2) / num_turned
        frequencies = self.theta**-exponents
        return self._scaled(frequencies).astype(np.float32)

    def _num_turned(self, head_dim: int) -> int:
        """Elements of a head that are turned: d."""
        return int(self.share * head_dim)

    def _scaled(self, frequencies: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
        if self.scaling == "none":
            return frequencies
        scaled = frequencies / self.factor
        if self.scaling == "linear":
            return scaled
        # How often a pair turns round in the original length.
        turns = self.original_length * frequencies / (2 * np.pi)
        kept = (turns - self.low_factor) / (self.high_factor - self.low_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * scaled + kept * frequencies


# Of a model. The layers of 't5' add a bias learned for each bucket of distances; 'none' leaves the order to the mask.
Positions = Literal["t5", "none"] | Rotary
# Of a layer that has others than its model: see `LayerDims.with_positions`.
LayerPositions = Literal["t5", "none"] | Rotary | None
