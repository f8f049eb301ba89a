"""Names of layers, and their arrays: of single layers, and of groups whose layers are stacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def layer_name(index: int) -> str:
    """The name of a layer, from its index: in paths, logs and reports."""
    return f"layer_{index:02d}"


def unstack(
    arrays: Mapping[str, Any],
    stacked_layers: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Arrays of single layers by path, from arrays of groups.

    `params/layers_00_07/...` becomes `params/layer_00/...`, `params/layer_01/...` etc.

    Args:
      arrays: by path; of a group of several layers with the layers as the first axis.
      stacked_layers: see `Stack.stacked_layers`.
    """
    single = {}
    for path, array in arrays.items():
        members = list(member_paths(path, stacked_layers))
        of_members = [array] if members == [path] else array
        single.update(zip(members, of_members, strict=True))
    return single


def unstack_paths(
    paths: Iterable[str],
    stacked_layers: Mapping[str, Sequence[int]],
) -> list[str]:
    """`unstack` of paths alone."""
    return [member for path in paths for member in member_paths(path, stacked_layers)]


def member_paths(
    path: str,
    stacked_layers: Mapping[str, Sequence[int]],
) -> Iterator[str]:
    """The paths of the single layers whose arrays the array of this path stacks; the path itself if it stacks none."""
    parts = path.split("/")
    groups = [part for part in parts if part in stacked_layers]
    if not groups:
        yield path
        return
    group = groups[0]
    for index in stacked_layers[group]:
        name = layer_name(index)
        yield "/".join(name if part == group else part for part in parts)


def stack(
    path: str,
    single: Mapping[str, np.ndarray],
    stacked_layers: Mapping[str, Sequence[int]],
) -> np.ndarray:
    """The array of a path, from arrays of single layers. Raises KeyError with the path that is missing."""
    members = [single[member] for member in member_paths(path, stacked_layers)]
    is_stacked = any(part in stacked_layers for part in path.split("/"))
    return np.stack(members) if is_stacked else members[0]
