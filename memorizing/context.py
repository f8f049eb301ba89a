"""Context: everything a model carries from one segment to the next, as plain pytrees of arrays.

The context of a model is a dict with one entry a layer group (and `clock`, the number of segments seen, which all rows share). What holds for every mechanism, and is all
that the functions below rely on:

* every leaf has the row axis first; a scalar leaf is shared by all rows;
* a mechanism says what a fresh row looks like by a tree of the same structure whose leaves broadcast against the state's, or are None where a mask hides the old content.
  A reset is then one `where` over small leaves: it never touches stored keys and values, and whatever they hold, NaN included, cannot come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from memorizing.array_typing import Clock, RealPositions, RowFlags, Tree

# A model's context: {"clock": int32 scalar, layer group name: state of that group's mechanism}.
Context = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the positions of a segment are: read tokens, then the segment's own tokens, then write tokens. Without recurrent tokens there are only the segment's own.

    Attributes:
      length: the segment's own tokens.
      num_read, num_write: recurrent memory tokens before and after them.
      bidirectional: whether every position sees every other.
      memory_sees_cache: whether recurrent tokens see the keys cached from before the segment.
    """

    length: int
    num_read: int = 0
    num_write: int = 0
    bidirectional: bool = False
    memory_sees_cache: bool = True

    @property
    def size(self) -> int:
        """Positions that pass through the layers: T, in the shapes of layers."""
        return self.num_read + self.length + self.num_write

    def own(self, x: jax.Array) -> jax.Array:
        """The segment's own positions of an array [B, T, ...]."""
        return x[:, self.num_read : self.num_read + self.length]

    def widen(self, is_real: RealPositions) -> RealPositions:
        """The own positions' flags [B, length] as flags of all positions; memory tokens are real."""
        return jnp.pad(is_real, ((0, 0), (self.num_read, self.num_write)), constant_values=True)


@struct.dataclass
class Slice:
    """Consecutive positions of an open segment: one whose later tokens are not known yet, because they are being written.

    The first slice of a segment holds all its positions but the write tokens, those whose tokens are not known yet included: no earlier position sees them. Each of the
    slices after it replaces some of them.

    Attributes:
      position: int32 scalar, the first of the positions, read tokens counted.
      kept: what the layer reported of the slices before (`Report.kept`); None for the first slice.
    """

    position: Clock
    kept: Mapping[str, jax.Array] | None = None


@struct.dataclass
class Segment:
    """What a layer knows of the segment besides its activations.

    Attributes:
      is_real: bool [B, T], false at padding after the end of a document.
      layout: what the T positions are.
      slice: which of the positions the activations are; None for all. A layer carries nothing on from a slice: its new state is None.
    """

    is_real: RealPositions
    layout: Layout = struct.field(pytree_node=False)
    slice: Slice | None = None

    @property
    def continues(self) -> bool:
        """Whether the layer finds what it needs of its state and of earlier positions in what it has kept."""
        return self.slice is not None and self.slice.kept is not None

    def cut(self, table: jax.Array, size: int, axis: int = 0) -> jax.Array:
        """The `size` entries that belong to the activations' positions, of a table in which each position's begin one after those of the position before it."""
        return table if self.slice is None else jax.lax.dynamic_slice_in_dim(table, self.slice.position, size, axis)

    def extend(self, name: str, new: jax.Array) -> jax.Array:
        """Keys, or what else there is one of a key, of everything that is seen: [carried; segment], [B, S, ...]. What is not known yet is arbitrary.

        Args:
          name: under which the layer keeps them while the segment is open.
          new: [carried; activations' positions], or only the latter if the segment continues.
        """
        if self.slice is None:
            return new
        if self.slice.kept is None:
            return jnp.pad(new, [(0, 0), (0, self.layout.num_write)] + [(0, 0)] * (new.ndim - 2))
        kept = self.slice.kept[name]
        first = kept.shape[1] - self.layout.size + self.slice.position
        return jax.lax.dynamic_update_slice_in_dim(kept, new, first, axis=1)

    def with_cached(self, valid: Bool[Array, "B W"]) -> Bool[Array, "B S"]:
        """Which of the keys [cached; segment] hold something."""
        return jnp.concatenate([valid, self.is_real], axis=1)


@struct.dataclass
class Report:
    """What a layer tells besides its output, by name.

    Attributes:
      losses: auxiliary losses, scalars that are added to the training loss.
      metrics: float arrays of any shape for the log; no gradient flows through them.
      kept: of a slice, what the next slice of the segment needs of this and the earlier ones: keys and values.
    """

    losses: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    kept: Mapping[str, jax.Array] = struct.field(default_factory=dict)


def reset_rows(state: Tree, fresh: Tree, start_of_document: RowFlags) -> Tree:
    """Makes the flagged rows fresh and leaves the others bit-equal.

    Args:
      state: leaves with the row axis first.
      fresh: the same structure; each leaf is None (left as it is) or broadcasts against the state's leaf, row axis included.
      start_of_document: bool [B].
    """

    def reset(value: Any, leaf: jax.Array) -> jax.Array:
        if value is None:
            return leaf
        rows = start_of_document.reshape((-1,) + (1,) * (leaf.ndim - 1))
        # Not a product with 0 or 1: NaN times 0 is NaN.
        return jnp.where(rows, jnp.asarray(value, leaf.dtype), leaf)

    return jax.tree.map(reset, fresh, state, is_leaf=lambda value: value is None)


def split_rows(tree: Tree, num_parts: int) -> Tree:
    """Splits the row axis into [num_parts, B / num_parts] for a scan over parts; scalar leaves are repeated.

    Part i takes rows i, i + num_parts, ...: when rows are sharded in contiguous blocks, every device keeps a share of every part.
    """

    def split(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return jnp.broadcast_to(leaf, (num_parts,))
        return leaf.reshape((leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:])).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Tree) -> Tree:
    """Inverse of `split_rows`: what was a scalar is taken from the first part."""

    def join(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return leaf[0]
        return leaf.swapaxes(0, 1).reshape((leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))

    return jax.tree.map(join, tree)
