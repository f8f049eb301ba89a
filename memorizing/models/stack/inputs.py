"""What a layer is given and gives besides its activations: what all layers of a group share, and what each has."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memorizing.array_typing import Tree
from memorizing.context import Report, Rngs, Segment
from memorizing.models.stack.groups import LayerGroup


class LayerInputs(NamedTuple):
    """What a layer is given besides its activations; of a group, with an axis of layers."""

    params: Tree
    buffers: Tree
    state: Tree
    segment: Segment


class LayerOutputs(NamedTuple):
    """What a layer gives besides its activations; of a group, with an axis of layers."""

    buffers: Tree
    state: Tree
    report: Report


def segment_of_group(segment: Segment, group: LayerGroup) -> Segment:
    """The segment as a group of layers knows it: with its KV cache and its random numbers.

    Both have an axis of layers in front if the group has several.
    """
    decoding = segment.decoding
    if decoding is not None and decoding.kv_cache is not None:
        kv_cache = decoding.kv_cache[group.name]
        decoding = dataclasses.replace(decoding, kv_cache=kv_cache)

    rngs = segment.rngs
    if rngs is not None:
        rngs = _rngs_of_group(rngs, group)
    return dataclasses.replace(segment, decoding=decoding, rngs=rngs)


def _rngs_of_group(rngs: Rngs, group: LayerGroup) -> Rngs:
    """Random numbers that depend on the index of each layer only."""
    if not group.is_stacked:
        return rngs.of_layer(group.layers[0])

    def key_of_layer(index: jax.Array) -> jax.Array:
        return rngs.of_layer(index).key

    # [layers]
    keys = jax.vmap(key_of_layer)(jnp.asarray(group.layers))
    return dataclasses.replace(rngs, key=keys)


class Own(NamedTuple):
    """What each layer of a group has of a segment for itself; None where the segment has none."""

    kv_cache: Any
    key: jax.Array | None


def own_part(segment: Segment) -> Own:
    """The part of a segment that differs from layer to layer."""
    return Own(
        kv_cache=segment.decoding.kv_cache if segment.decoding is not None else None,
        key=segment.rngs.key if segment.rngs is not None else None,
    )


def with_own(segment: Segment, own: Own) -> Segment:
    """The segment with the part that belongs to one layer."""
    decoding = segment.decoding
    if decoding is not None:
        decoding = dataclasses.replace(decoding, kv_cache=own.kv_cache)
    rngs = segment.rngs
    if rngs is not None:
        rngs = dataclasses.replace(rngs, key=own.key)
    return dataclasses.replace(segment, decoding=decoding, rngs=rngs)


def without_own(segment: Segment) -> Segment:
    """The part of a segment that all layers of a group share."""
    return with_own(segment, Own(kv_cache=None, key=None))
