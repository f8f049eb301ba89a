"""How repeated layers are computed: in a scan, and what of them again for the gradient, instead of being stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from memorizing.array_typing import Activations, Tree
from memorizing.models.memory.retrieval import NEIGHBOURS

RematKind = Literal["none", "layer", "dots"]


@dataclasses.dataclass(frozen=True)
class Remat:
    """What is computed again for the gradient.

    Attributes:
      kind: 'none'; 'layer', all but the search of a memory; or 'dots', all but that search and products with
        parameters.
      every: layers of a scan, counted in repetitions of the pattern, of which only the inputs of the first are stored
        (Chen et al. 2016). Those of one such block are computed again together.
      unroll: repetitions of the pattern that a scan makes at a time. Each is a copy of the program, which takes longer
        to compile. With as many as there are, no scan is left: what layers store for the gradient is not copied into
        arrays of all layers, and back.
    """

    kind: RematKind = "none"
    every: int = 1
    unroll: int = 1

    def of_layer(self, layer: Callable, is_scanned: bool) -> Callable:
        """The same layer, computed again for its gradient, unless its block is."""
        is_in_block = is_scanned and self.every > 1
        return layer if self.kind == "none" or is_in_block else self._recomputed(layer, is_scanned)

    def scan(self, body: Callable, x: Activations, scanned: Tree) -> tuple[Activations, Tree]:
        """`jax.lax.scan` that stores the inputs of every `every`-th repetition only; the last block may be shorter."""
        if self.kind == "none" or self.every == 1:
            return self._repeat(body, x, scanned)
        num_repetitions = _length(scanned)
        num_blocks = num_repetitions // self.every
        num_in_blocks = num_blocks * self.every

        def pass_block(x: Activations, of_block: Tree) -> tuple[Activations, Tree]:
            return self._repeat(body, x, of_block)

        def in_blocks(leaf: jax.Array) -> jax.Array:
            return leaf[:num_in_blocks].reshape(num_blocks, self.every, *leaf.shape[1:])

        pass_block = self._recomputed(pass_block, is_scanned=True)
        parts = []
        if num_blocks:
            x, outputs = jax.lax.scan(pass_block, x, jax.tree.map(in_blocks, scanned))
            parts.append(jax.tree.map(lambda leaf: leaf.reshape(num_in_blocks, *leaf.shape[2:]), outputs))
        if num_in_blocks < num_repetitions:
            rest = jax.tree.map(lambda leaf: leaf[num_in_blocks:], scanned)
            x, outputs = pass_block(x, rest)
            parts.append(outputs)
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def _repeat(self, body: Callable, x: Activations, scanned: Tree) -> tuple[Activations, Tree]:
        """`jax.lax.scan`, or as many copies of the program."""
        if self.unroll < _length(scanned):
            return jax.lax.scan(body, x, scanned, unroll=self.unroll)
        return _copies(body, x, scanned)

    def _recomputed(self, function: Callable, is_scanned: bool) -> Callable:
        """The same function, whose activations are computed again for its gradient, but for what `kind` stores."""
        policies = jax.checkpoint_policies
        policy = policies.save_only_these_names(NEIGHBOURS)
        if self.kind == "dots":
            policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
        # prevent_cse is not needed inside a loop, and would only slow it down.
        is_in_loop = is_scanned and self.unroll == 1
        return jax.checkpoint(function, policy=policy, prevent_cse=not is_in_loop)


def _copies(body: Callable, x: Activations, scanned: Tree) -> tuple[Activations, Tree]:
    """`jax.lax.scan` as copies of the program, whose activations are not stacked for the gradient."""
    leaves, structure = jax.tree.flatten(scanned)
    # The gradient of a split is one concatenation.
    by_leaf = [[part.squeeze(0) for part in jax.lax.split(leaf, [1] * len(leaf))] for leaf in leaves]
    outputs = []
    for of_repetition in zip(*by_leaf, strict=True):
        x, output = body(x, structure.unflatten(of_repetition))
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _length(scanned: Tree) -> int:
    """Repetitions in front of every array."""
    return jax.tree.leaves(scanned)[0].shape[0]
