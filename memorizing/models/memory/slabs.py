"""Exact top-k as TPUs do it fast: groups of slots, each with its best score, are chosen level by level.

A memory is cut into *slabs*, equal ranges of consecutive slots, and a group has one slot of each slab. So the greatest
scores of all groups are an elementwise maximum of slabs, which a TPU takes while it writes the scores, in one pass over
the keys; a maximum of neighbours would have the scores read back. Queries lie beside each other, slots below, so that
sorts and gathers need no transposed copies.

The k best slots lie in the k best groups, unless many groups are equally good: which of them has the lower slot is not
known. So some more groups are chosen, and where even the worst of these equals the k-th, the search says that it is not
certain.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from memorizing.models.memory.blocks import PRECISION, largest_divisor, pad_neighbours
from memorizing.models.memory.placement import Placement

# Groups that are chosen beyond k: while fewer are equal to the k-th best, no slot is overlooked. A TPU's tile is 8.
_SPARE = 8
# Groups of a level that make one of the next, at most.
_FAN = 8


class Found(NamedTuple):
    """What a search found for each head.

    Attributes:
      scores: float32, in descending order, -inf where there is no neighbour.
      indices: int32, slots; of equal scores the lower one comes first.
      is_certain: whether these are the k best; else their scores are, but a lower slot may have an equal one.
    """

    scores: Float[Array, "heads T K"]
    indices: Int[Array, "heads T K"]
    is_certain: Bool[Array, "heads"]


class Nearest(NamedTuple):
    """The best of some slots or groups for each query, the nearest first.

    Attributes:
      distances: float32, the negative scores; inf where there is none.
      numbers: int32, of the slots or groups.
      is_certain: whether no other one is as near as the k-th and has a lower number.
    """

    distances: Float[Array, "n T"]
    numbers: Int[Array, "n T"]
    is_certain: Bool[Array, ""]


def top_k(
    queries: Float[Array, "heads T H"],
    keys: Float[Array, "heads M H"],
    valid: Bool[Array, "rows M"],
    k: int,
    num_slabs: int,
    most_scores: int,
    placement: Placement | None = None,
) -> Found:
    """The k best slots of each query, head after head.

    Args:
      queries, keys: of the heads of one row after those of the other.
      valid: slots that are not are never found.
      k: how many.
      num_slabs: slabs of a part of the memory, at most.
      most_scores: scores that are written at a time, at most: queries times the slots of a part. Written in larger
        pieces, they are read back for the maxima.
      placement: where keys stand, if they are to be turned.
    """
    num_heads, num_queries, width = queries.shape
    num_slots = keys.shape[1]
    num_rows = len(valid)
    part_slots = largest_divisor(num_slots, max(1, most_scores // num_queries))
    num_parts = num_slots // part_slots
    slabs = largest_divisor(part_slots, num_slabs)

    # In this shape before the loop: the product reads such a slice where it lies, any other is copied out first.
    part_keys = keys.reshape(num_heads * num_parts, slabs, -1, width)
    part_valid = valid.reshape(num_rows, num_parts, slabs, -1)

    def search_part(numbered: tuple[Int[Array, ""], Float[Array, "S G H"]]) -> Nearest:
        number, keys = numbered
        head = number // num_parts
        row = head // (num_heads // num_rows)
        part = number % num_parts
        if placement is not None:
            keys = placement.rotary.turn(keys, placement.of_slots.reshape(part_valid.shape[1:])[part])
        nearest = _nearest(queries[head], keys, part_valid[row, part], k)
        return nearest._replace(numbers=part * part_slots + nearest.numbers)

    nearest = jax.lax.map(search_part, (jnp.arange(num_heads * num_parts), part_keys))
    # [heads, parts * k, T]
    by_head = (num_heads, -1, num_queries)
    distances = nearest.distances.reshape(by_head)
    slots = nearest.numbers.reshape(by_head)
    if num_parts > 1:
        distances, slots = jax.lax.sort((distances, slots), dimension=1, num_keys=2, is_stable=False)
    scores, indices = pad_neighbours(-distances[:, :k].swapaxes(1, 2), slots[:, :k].swapaxes(1, 2), k)
    return Found(scores, indices, jnp.all(nearest.is_certain.reshape(num_heads, num_parts), axis=1))


def _nearest(
    queries: Float[Array, "T H"],
    keys: Float[Array, "S G H"],
    valid: Bool[Array, "S G"],
    k: int,
) -> Nearest:
    """The k nearest slots, or all if there are fewer. Slots and groups are numbered slab after slab."""
    levels = _levels(_distances(queries, keys, valid), k)
    # The first level is one group of all.
    everything = levels[0].reshape(-1, len(queries))
    nearest = Nearest(everything, jax.lax.broadcasted_iota(jnp.int32, everything.shape, 0), jnp.array(True))
    for members in levels[1:]:
        groups = _best(nearest, k, k + _SPARE)
        nearest = _members(members, groups)
    # Slots are told apart by their numbers.
    best = _best(nearest, k, k)
    return best._replace(is_certain=nearest.is_certain)


def _distances(
    queries: Float[Array, "T H"],
    keys: Float[Array, "S G H"],
    valid: Bool[Array, "S G"],
) -> Float[Array, "S G T"]:
    """-(query . key), inf for empty slots."""
    # Queries are negated, not the products, of which there are many.
    distances = jnp.einsum(
        "SGH,TH->SGT",
        keys,
        -queries,
        precision=PRECISION,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(valid[:, :, None], distances, jnp.inf)


def _levels(distances: Float[Array, "S G T"], k: int) -> list[Float[Array, "fan n T"]]:
    """Distances of slots, of their groups, of groups of these, and so on: the fewest first.

    Each but the first is given as the members of the groups of the level before it.
    """
    levels = [distances]
    while True:
        fan, num_groups, _ = levels[0].shape
        if fan == 1 or num_groups <= k + _SPARE:
            return levels
        nearest = levels[0].min(axis=0)
        fan = largest_divisor(num_groups, _FAN)
        levels.insert(0, nearest.reshape(fan, num_groups // fan, -1))


def _best(found: Nearest, k: int, count: int) -> Nearest:
    """The nearest `count` of those found, of equally near ones those with the lower numbers."""
    everything = jax.lax.sort((found.distances, found.numbers), dimension=0, num_keys=2, is_stable=False)
    # Left to itself XLA copies what is sorted into another order.
    distances, numbers = [with_layout_constraint(leaf, Layout((0, 1))) for leaf in everything]
    distances = distances[:count]
    if count < len(found.distances):
        kth = distances[k - 1]
        holds_all = (kth < distances[-1]) | (kth == jnp.inf)
        return Nearest(distances, numbers[:count], found.is_certain & jnp.all(holds_all))
    return Nearest(distances, numbers[:count], found.is_certain)


def _members(members: Float[Array, "fan n T"], groups: Nearest) -> Nearest:
    """All members of some groups."""
    fan, num_groups, num_queries = members.shape
    first = jnp.arange(fan, dtype=jnp.int32) * num_groups
    # [fan * count, T]
    numbers = (first[:, None, None] + groups.numbers[None]).reshape(-1, num_queries)
    distances = jnp.take_along_axis(
        members.reshape(-1, num_queries),
        numbers,
        axis=0,
        mode="promise_in_bounds",
    )
    return Nearest(distances, numbers, groups.is_certain)
