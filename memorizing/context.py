"""Context: everything a model carries from one segment to the next, as plain pytrees of arrays.

The context of a model is a dict with one entry for each group of layers (and `clock`, the number of segments seen,
which all rows share). Two rules hold for every mechanism, and the functions below rely on nothing else:

* every leaf has the row axis first; a scalar leaf is shared by all rows;
* a mechanism describes a fresh row by a tree of the same structure whose leaves broadcast against the state's, or are
  None where a mask hides the old content. A reset is then one `where` over small leaves: it never touches stored keys
  and values, and their old content, NaN included, cannot come back.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Clock, RealPositions, RowFlags, Tokens, Tree

# A model's context: {"clock": int32 scalar, name of a group of layers: state of the group's mechanism}.
Context = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the positions of a segment are: read tokens, the segment's own tokens, write tokens.

    Without recurrent memory tokens there are only the segment's own.

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
        end = self.num_read + self.length
        return x[:, self.num_read : end]

    def widen(self, is_real: RealPositions) -> RealPositions:
        """The own positions' flags [B, length] as flags of all positions; memory tokens are real."""
        padding = ((0, 0), (self.num_read, self.num_write))
        return jnp.pad(is_real, padding, constant_values=True)


@struct.dataclass
class Inputs:
    """What a model reads in one segment.

    Attributes:
      tokens: int32 [B, T]; in a decode step only the one token of the step, [B, 1].
      is_real: bool [B, T], false after the end of a document.
      start_of_document: bool [B], rows whose context is reset before the segment.
      taught: float32 [B, T], how much each position counts in auxiliary losses about what it has to predict; None for
        equally much.
    """

    tokens: Tokens
    is_real: RealPositions
    start_of_document: RowFlags
    taught: Float[Array, "B T"] | None = None


@struct.dataclass
class Rngs:
    """Random numbers by name: a pure function of seed, step, segment, layer, name and row.

    So rematerialisation, reversible layers, a resumed run and any number of microbatches see the same numbers.

    Attributes:
      key: of a segment of a step, and perhaps of a layer.
      rows: int32 [B], number of each row in the whole batch.
    """

    key: jax.Array
    rows: Int[Array, "B"]

    def of_layer(self, index: int | jax.Array) -> Rngs:
        """The numbers of one layer, counted from 0."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def stream(self, name: str) -> jax.Array:
        """A key that is the same for all rows, for example of the random projections of a hash."""
        number = zlib.crc32(name.encode())
        return jax.random.fold_in(self.key, number)

    def row_streams(self, name: str) -> jax.Array:
        """A key for each row [B], for example of dropout."""
        fold_in_rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        return fold_in_rows(self.stream(name), self.rows)


@struct.dataclass
class Decoding:
    """The state of a segment that is being generated, so that its later tokens are not known yet.

    The prefill reads all positions of the segment but its write tokens; positions whose tokens are not known yet hold
    arbitrary ones, since no earlier position sees them. Each decode step after it replaces one of them.

    Attributes:
      position: int32 scalar, the first position that is read now, counted from the first read token.
      kv_cache: what the layer reported for the earlier positions (`Report.kv_cache`); None for the prefill.
    """

    position: Clock
    kv_cache: Mapping[str, jax.Array] | None = None


@struct.dataclass
class Segment:
    """What a layer knows about the segment besides its activations.

    Attributes:
      is_real: bool [B, T], false after the end of a document.
      layout: what the T positions are.
      decoding: how far the segment has been generated; None for a whole segment. A layer carries nothing on from a
        segment that is not whole: its new state is None.
      rngs: random numbers of this layer; None where nothing is random, as in evaluation.
      tokens: int32 [B, length], the segment's own; in a decode step only the one token of the step, [B, 1].
      clock: int32 scalar, segments processed before this one. A layer without a memory needs neither.
      taught: float32 [B, length], see `Inputs`.
      choices: what the layer chose when it passed this segment before (`Report.choices`); None for the first time.
      num_shown: so many positions that get the most attention from each one are reported, where a mechanism can tell
        (`Report.attended`); 0, as in training: none.
    """

    is_real: RealPositions
    layout: Layout = struct.field(pytree_node=False)
    decoding: Decoding | None = None
    rngs: Rngs | None = None
    tokens: Int[Array, "B _"] | None = None
    clock: Clock | None = None
    taught: Float[Array, "B _"] | None = None
    choices: Mapping[str, jax.Array] | None = None
    num_shown: int = struct.field(pytree_node=False, default=0)

    @property
    def is_decode_step(self) -> bool:
        """Whether the layer reads its state and the earlier positions from the KV cache."""
        return self.decoding is not None and self.decoding.kv_cache is not None

    def tied(self, parameter: jax.Array) -> jax.Array:
        """A parameter from which much is computed, such as a bias for each query and key, to be computed in each layer.

        JAX takes what depends on nothing but parameters out of the loop over segments, computes it for all layers at
        once, and keeps it for the gradient: more than all activations where these are not kept. What is tied depends on
        the segment too.
        """
        tied, _ = jax.lax.optimization_barrier((parameter, self.is_real))
        return tied

    def select(self, table: jax.Array, size: int, axis: int = 0) -> jax.Array:
        """The entries of a table that belong to the positions of the activations.

        Args:
          table: has an axis along which the entries of position i begin at index i.
          size: number of entries to take.
          axis: that axis.
        """
        if self.decoding is None:
            return table
        return jax.lax.dynamic_slice_in_dim(table, self.decoding.position, size, axis)

    def with_kv_cache(self, name: str, new: jax.Array, carried: jax.Array | None = None) -> jax.Array:
        """Keys, or other entries of which each key has one, of all that is seen: [carried; segment], [B, S, ...].

        Entries of tokens that are not known yet are arbitrary.

        Args:
          name: of the entry in the KV cache.
          new: [carried; positions of the activations]; in a decode step only the latter.
          carried: what stands before `new`, if it was not joined with it; in a decode step the cache has it.
        """
        if carried is not None and not self.is_decode_step:
            new = jnp.concatenate([carried, new], axis=1)
        if self.decoding is None:
            return new
        if self.decoding.kv_cache is None:
            # The prefill leaves the write tokens out: here is room for them, as in a whole segment.
            padding = [(0, 0)] * new.ndim
            padding[1] = (0, self.layout.num_write)
            return jnp.pad(new, padding)
        cache = self.decoding.kv_cache[name]
        first = cache.shape[1] - self.layout.size + self.decoding.position
        return jax.lax.dynamic_update_slice_in_dim(cache, new, first, axis=1)

    def chosen(self, name: str, choice: jax.Array) -> jax.Array:
        """The same choice as when the layer passed this segment before, or else this one."""
        return choice if self.choices is None else self.choices[name]

    def with_cached(self, valid: Bool[Array, "B W"]) -> Bool[Array, "B S"]:
        """Which of the keys [cached; segment] hold something."""
        return jnp.concatenate([valid, self.is_real], axis=1)


@struct.dataclass
class Attended:
    """What heads of a layer attended to within a segment, for an inspector.

    Attributes:
      positions: int32 [B, T, N, k], in the segment, the one with the greatest weight first; -1 where there is none.
      weights: float32 [B, T, N, k], of the attention to them.
      groups: int32 [B, T, N, g], numbers of what each position belongs to: buckets, a cluster. Positions that share
        one may see each other.
      group_names: what they are called, g of them.
      heads: the layer's heads that these are, N of them.
    """

    positions: Int[Array, "B T N k"] | Any
    weights: Float[Array, "B T N k"] | Any
    groups: Int[Array, "B T N g"] | Any
    group_names: tuple[str, ...] = struct.field(pytree_node=False)
    heads: range = struct.field(pytree_node=False)


@struct.dataclass
class Report:
    """What a layer returns besides its output, by name.

    Entries that are not used cost nothing: the compiler leaves them out.

    Attributes:
      losses: auxiliary losses, scalars that are added to the training loss.
      metrics: float arrays of any shape for the log; no gradient flows through them.
      kv_cache: of a segment that is not whole, what its next decode step needs of this and the earlier positions.
      retrieved: what the layer's queries found in an external memory, for an inspector: see
        `retrieval.Retrieved`.
      choices: integers that the layer chose without gradient, such as hashes. A layer that is computed again from
        inputs that are equal up to rounding has to choose the same.
      attended: of a layer, what its heads attended to within the segment, `Attended` for each kind of head; of a model
        a dict by layer. Only where the segment asks for it (`Segment.num_shown`) and the mechanism can tell.
    """

    losses: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    kv_cache: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    retrieved: Any = None
    choices: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    attended: Any = ()

    def with_part(self, name: str, part: Report) -> Report:
        """The report of a model with that of one of its parts, whose losses and metrics are called `name/...`.

        The model's `retrieved` and `attended` are dicts by part.
        """
        losses = {f"{name}/{key}": value for key, value in part.losses.items()}
        metrics = {f"{name}/{key}": value for key, value in part.metrics.items()}
        retrieved = {} if part.retrieved is None else {name: part.retrieved}
        attended = {name: part.attended} if part.attended else {}
        return dataclasses.replace(
            self,
            losses={**self.losses, **losses},
            metrics={**self.metrics, **metrics},
            retrieved={**self.retrieved, **retrieved},
            attended={**self.attended, **attended},
        )


def reset_rows(state: Tree, fresh: Tree, start_of_document: RowFlags) -> Tree:
    """Makes the flagged rows fresh and leaves the others bit-equal.

    Args:
      state: leaves with the row axis first.
      fresh: the same structure; each leaf is None (the state's leaf stays) or broadcasts against the state's leaf.
      start_of_document: bool [B].
    """

    def reset(value: Any, leaf: jax.Array) -> jax.Array:
        if value is None:
            return leaf
        # [B, 1, ..., 1]
        rows = start_of_document.reshape((-1,) + (1,) * (leaf.ndim - 1))
        # Not a product with 0 or 1: NaN times 0 is NaN.
        return jnp.where(rows, jnp.asarray(value, leaf.dtype), leaf)

    return jax.tree.map(reset, fresh, state, is_leaf=lambda value: value is None)


def split_rows(tree: Tree, num_parts: int) -> Tree:
    """Splits the row axis into [num_parts, B / num_parts] for a scan over parts; scalar leaves are repeated.

    Part i takes rows i, i + num_parts, ...: when rows are sharded in contiguous blocks, every device keeps a share of
    every part.
    """

    def split(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return jnp.broadcast_to(leaf, (num_parts,))
        num_rows, *rest = leaf.shape
        # [B / num_parts, num_parts, ...]
        strided = leaf.reshape((num_rows // num_parts, num_parts, *rest))
        return strided.swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Tree) -> Tree:
    """Inverse of `split_rows`: what was a scalar is taken from the first part."""

    def join(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return leaf[0]
        num_parts, rows_of_part, *rest = leaf.shape
        # [B / num_parts, num_parts, ...]
        strided = leaf.swapaxes(0, 1)
        return strided.reshape((num_parts * rows_of_part, *rest))

    return jax.tree.map(join, tree)
