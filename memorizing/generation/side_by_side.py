"""Texts that are written at once: a decode step draws a token of each of them, and several steps are one program.

The texts do not know of each other. Each stands in a segment, at a position and in a memory of its own, is drawn with
settings of its own, and comes and goes when it likes. The step is that of one row, mapped over a fixed number of
places, so that it is one program whoever takes part: the weights pass once for all of them. Whole segments are read row
by row, by the programs of `Decoder`: what a text leaves in a memory is the same bit for bit as if it had been alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from memorizing.array_typing import Tree
from memorizing.context import Context
from memorizing.evaluation.reading import Pace
from memorizing.generation.decoding import TextDecoder
from memorizing.generation.programs import (
    MOST_TOKENS,
    Decoder,
    KVCache,
    OpenSegment,
    Weights,
    decode_step,
    decode_steps,
)
from memorizing.generation.sampling import SamplingArrays
from memorizing.models.lm_config import LMConfig


class Writer(NamedTuple):
    """A text that is being written.

    Attributes:
      text: one row.
      sampling: how its tokens are drawn.
      num_tokens: how many are still to be written, at least one.
    """

    text: TextDecoder
    sampling: SamplingArrays
    num_tokens: int


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
        self._pace = Pace(MOST_TOKENS)
        # By place, the context and the prefilled KV cache of the segment that is open there.
        self._opened: dict[int, tuple[Context, KVCache]] = {}
        # Of all places, leaves [R, ...]; from the first text on, whose arrays say what they are.
        self._contexts: Context | None = None
        self._kv_caches: KVCache | None = None

    def draw(self, writers: Mapping[int, Writer], at_most: int = MOST_TOKENS) -> dict[int, np.ndarray]:
        """Draws the next tokens of every writer, as many for all of them: no segment ends, and nobody has enough.

        Each of them takes by `TextDecoder.accept` what it wants of them, from the first one on, or leaves.

        Args:
          writers: by place, from 0 to R - 1; at least one.
          at_most: tokens of each.

        Returns:
          By place its tokens, int32 [tokens, 1].
        """
        segments = {place: writer.text.open_segment() for place, writer in writers.items()}
        opened = {place: (writers[place].text.context, segment.kv_cache) for place, segment in segments.items()}
        for place, one in opened.items():
            before = self._opened.get(place)
            if before is None or any(now is not then for now, then in zip(one, before, strict=True)):
                self._put(place, *one)
        self._opened = opened
        # What an empty place reads and draws is nobody's.
        inputs = np.zeros((self.num_places, 1), np.int32)
        index, position = np.zeros((2, self.num_places), np.int32)
        some_place = next(iter(writers))
        samplings = [writers[some_place].sampling] * self.num_places
        for place, segment in segments.items():
            inputs[place] = segment.inputs
            index[place], position[place] = segment.index, segment.position
            samplings[place] = writers[place].sampling
        assert self._kv_caches is not None, "put above"
        everything = OpenSegment(inputs, index, position, self._kv_caches)
        wanted = (min(writer.num_tokens, writer.text.room) for writer in writers.values())
        num_tokens = min(self._pace.number, at_most, *wanted)
        self._pace.start()
        tokens, everything = _programs(self._decoder).steps(
            self._weights, self._contexts, everything, _stacked(samplings), np.int32(num_tokens)
        )
        self._kv_caches = everything.kv_cache
        drawn = np.asarray(tokens)[..., :num_tokens]
        self._pace.has_passed(num_tokens)
        return {place: drawn[place].T for place in writers}

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
      steps: `(weights, contexts, open segments, samplings, num_tokens) -> (tokens [R, 1, MOST_TOKENS], open segments)`,
        `Decoder.decode` at every place, all leaves [R, ...]; the open segments are donated.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.repeat = decoder.compiled(_repeated, static_argnums=0)
        self.replace = decoder.compiled(_replaced, donate_argnums=0)
        steps = functools.partial(_steps, decoder.config, decoder.segment_length)
        self.steps = decoder.compiled(steps, donate_argnums=2)


# Compiled once a process, as what a decoder is.
_programs = functools.lru_cache(maxsize=8)(Programs)


def _steps(
    config: LMConfig,
    segment_length: int,
    weights: Weights,
    contexts: Context,
    segments: OpenSegment,
    samplings: SamplingArrays,
    num_tokens: Int[Array, ""],
) -> tuple[Int[Array, "R 1 MOST_TOKENS"], OpenSegment]:
    settings = SamplingArrays(temperature=0, top_k=0, top_p=0, allowed=None, seed=0)
    of_one = functools.partial(decode_step, config, segment_length, weights)
    of_all = jax.vmap(of_one, in_axes=(0, 0, settings))
    return decode_steps(lambda segments: of_all(contexts, segments, samplings), segments, num_tokens)


def _stacked(samplings: list[SamplingArrays]) -> SamplingArrays:
    """Settings of every place, [R]; which tokens may be drawn at all is the same everywhere, [V]."""
    stacked = SamplingArrays(*(np.stack(values) for values in zip(*samplings, strict=True)))
    return stacked._replace(allowed=samplings[0].allowed)


def _repeated(num_places: int, one: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_places, *leaf.shape)), one)


def _replaced(everything: Tree, one: Tree, place: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda leaves, leaf: leaves.at[place].set(leaf), everything, one)
