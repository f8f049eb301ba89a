"""Layers that are passed together: groups, whose arrays are stacked, and runs, through which one scan passes."""

from __future__ import annotations

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """Which mechanism each of L layers has, and which layers are passed together.

    Attributes:
      num_layers: L.
      pattern: mechanisms of the layers, over and over.
      exceptions: pairs of a layer index, from 0, and its mechanism instead.
      product_keys_at: indices of the layers with a memory in the place of their MLP.
    """

    num_layers: int
    pattern: tuple[Attention, ...]
    exceptions: tuple[tuple[int, Attention], ...] = ()
    product_keys_at: tuple[int, ...] = ()

    @functools.cached_property
    def mechanisms(self) -> tuple[Attention, ...]:
        """The mechanism of each layer."""
        exceptions = dict(self.exceptions)
        period = len(self.pattern)
        mechanisms = []
        for index in range(self.num_layers):
            regular = self.pattern[index % period]
            mechanisms.append(exceptions.get(index, regular))
        return tuple(mechanisms)

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs from the first layer to the last."""
        runs = []
        first = 0
        while first < self.num_layers:
            run = self._run_from(first)
            runs.append(run)
            first += sum(len(group.layers) for group in run.groups)
        return tuple(runs)

    def _run_from(self, first: int) -> Run:
        """The layers from the first one on, as long as their pattern repeats; that layer alone if it does not."""
        period = len(self.pattern)
        block = self.mechanisms[first : first + period]
        is_stackable = all(mechanism.stackable for mechanism in block)
        has_product_keys = [index in self.product_keys_at for index in range(self.num_layers)]

        end = first + period
        while (
            is_stackable
            and self.mechanisms[end : end + period] == block
            and has_product_keys[end : end + period] == has_product_keys[first : first + period]
        ):
            end += period
        if end == first + period:
            alone = LayerGroup(block[0], range(first, first + 1))
            return Run((alone,))

        groups = []
        for place, mechanism in enumerate(block):
            layers = range(first + place, end, period)
            groups.append(LayerGroup(mechanism, layers))
        return Run(tuple(groups))

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of all runs."""
        return tuple(group for run in self.runs for group in run.groups)

    @property
    def stacked_layers(self) -> dict[str, tuple[int, ...]]:
        """The layers' indices of every group of several layers, by its name."""
        return {group.name: tuple(group.layers) for group in self.groups if group.is_stacked}
