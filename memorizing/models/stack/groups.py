"""Layers that are passed together: groups, whose arrays are stacked, and runs, through which one scan passes."""

from __future__ import annotations

from typing import NamedTuple

from memorizing.models.attention.base import Attention
from memorizing.models.stack.arrays import layer_name


class LayerGroup(NamedTuple):
    """Layers with the same mechanism whose parameters and states lie in the same arrays.

    Attributes:
      attention: their mechanism.
      layers: their indices.
    """

    attention: Attention
    layers: range

    @property
    def name(self) -> str:
        """The name of the group's entry in trees of parameters, buffers and states."""
        first = self.layers[0]
        if not self.is_stacked:
            return layer_name(first)
        last = self.layers[-1]
        step = self.layers.step
        suffix = f"_by_{step}" if step > 1 else ""
        return f"layers_{first:02d}_{last:02d}{suffix}"

    @property
    def is_stacked(self) -> bool:
        """Whether it has several layers: their arrays then have an axis of layers."""
        return len(self.layers) > 1


class Run(NamedTuple):
    """Groups through which one scan passes, a layer of each in every repetition; or a layer that stands alone."""

    groups: tuple[LayerGroup, ...]

    @property
    def is_scanned(self) -> bool:
        """Whether its layers repeat."""
        return self.groups[0].is_stacked

    @property
    def name(self) -> str:
        """The names of its groups."""
        return "_".join(group.name for group in self.groups)
