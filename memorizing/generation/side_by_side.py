"""Texts that are written at once: one decode step draws a token of each of them.

The texts do not know of each other. Each stands in a segment, at a position and in a memory of its own, is drawn with
settings of its own, and comes and goes when it likes. The step is that of one row, mapped over a fixed number of
places, so that it is one program whoever takes part: the weights pass once for all of them. Whole segments are read row
by row, by the programs of `Decoder`: what a text leaves in a memory is the same bit for bit as if it had been alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from memorizing.array_typing import Tree
from memorizing.context import Context
from memorizing.generation.decoding import Decoder, KVCache, TextDecoder, Weights, decode_step
from memorizing.generation.sampling import SamplingArrays
from memorizing.models.lm_config import LMConfig


class Writer(NamedTuple):
    """A text that is being written.

    Attributes:
      text: one row.
      sampling: how its tokens are drawn.
    """

    text: TextDecoder
    sampling: SamplingArrays


class SideBySide:
    """A fixed number of places, each for a text that is being written.

    Attributes:
      num_places: how many: R.
    """

    def __init__(self, decoder: Decoder, weights: Weights, num_places: int) -> None:
        """
        Args:
          decoder, weights: of the model.
          num_places: texts that are written at once: R.
        """
        self.num_places = num_places
        self._decoder, self._weights = decoder, weights
        # By place, the prefilled KV cache of the segment that is open there.
        self._opened: dict[int, KVCache] = {}
        # Of all places, leaves [R, ...]; from the first text on, whose arrays say what they are.
        self._contexts: Context | None = None
        self._kv_caches: KVCache | None = None

    def draw(self, writers: Mapping[int, Writer]) -> dict[int, np.ndarray]:
        """Draws the next token of every writer.

        Each of them takes it by `TextDecoder.accept(token)`, or leaves.

        Args:
          writers: by place, from 0 to R - 1; at least one.

        Returns:
          By place a token, int32 [1].
        """
        steps = {place: writer.text.next_step() for place, writer in writers.items()}
        for place, step in steps.items():
            if self._opened.get(place) is not step.kv_cache:
                self._put(place, step.context, step.kv_cache)
        self._opened = {place: step.kv_cache for place, step in steps.items()}
        # What an empty place reads and draws is nobody's.
        inputs = np.zeros((self.num_places, 1), np.int32)
        index, position = np.zeros((2, self.num_places), np.int32)
        some_place = next(iter(writers))
        samplings = [writers[some_place].sampling] * self.num_places
        for place, step in steps.items():
            inputs[place] = np.asarray(step.inputs)
            index[place], position[place] = step.index, step.position
            samplings[place] = writers[place].sampling
        tokens, self._kv_caches = _programs(self._decoder).step(
            *self._weights, inputs, index, self._kv_caches, self._contexts, position, _stacked(samplings)
        )
        drawn = np.asarray(tokens)
        return {place: drawn[place] for place in writers}

    def _put(self, place: int, context: Context, kv_cache: KVCache) -> None:
        """Copies an open segment, and the context before it, to its place."""
        programs, one = _programs(self._decoder), (context, kv_cache)
        if self._contexts is None:
            everything = programs.repeat(self.num_places, one)
        else:
            everything = programs.replace((self._contexts, self._kv_caches), one, np.int32(place))
        self._contexts, self._kv_caches = everything


class Programs:
    """What a decoder compiles to for texts that are written at once.

    Attributes:
      repeat: `(R, tree) -> tree`, the same at every place.
      replace: `(tree of all places, tree, place) -> tree of all places`; the first is donated.
      step: `(params, buffers, inputs [R, 1], index [R], KV caches, contexts, position [R], samplings) -> (tokens
        [R, 1], KV caches)`, `Decoder.decode` at every place; the KV caches are donated.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.repeat = decoder.compiled(_repeated, static_argnums=0)
        self.replace = decoder.compiled(_replaced, donate_argnums=0)
        step = functools.partial(_step, decoder.config, decoder.segment_length)
        self.step = decoder.compiled(step, donate_argnums=4)


# Compiled once a process, as what a decoder is.
_programs = functools.lru_cache(maxsize=8)(Programs)


def _step(
    config: LMConfig,
    segment_length: int,
    params: Tree,
    buffers: Tree,
    inputs: Int[Array, "R 1"],
    index: Int[Array, "R"],
    kv_caches: KVCache,
    contexts: Context,
    position: Int[Array, "R"],
    samplings: SamplingArrays,
) -> tuple[Int[Array, "R 1"], KVCache]:
    def of_one(*arguments: Any) -> tuple[Int[Array, "1"], KVCache]:
        drawn, kv_cache = decode_step(config, segment_length, params, buffers, *arguments)
        return drawn.tokens, kv_cache

    settings = SamplingArrays(temperature=0, top_k=0, top_p=0, allowed=None, seed=0)
    return jax.vmap(of_one, in_axes=(0, 0, 0, 0, 0, settings))(inputs, index, kv_caches, contexts, position, samplings)


def _stacked(samplings: list[SamplingArrays]) -> SamplingArrays:
    """Settings of every place, [R]; which tokens may be drawn at all is the same everywhere, [V]."""
    stacked = SamplingArrays(*(np.stack(values) for values in zip(*samplings, strict=True)))
    return stacked._replace(allowed=samplings[0].allowed)


def _repeated(num_places: int, one: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_places, *leaf.shape)), one)


def _replaced(everything: Tree, one: Tree, place: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda leaves, leaf: leaves.at[place].set(leaf), everything, one)
