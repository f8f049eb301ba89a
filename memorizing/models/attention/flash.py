"""The local attention by kernels whose logits never leave the chip, on TPUs from v4 on: when, and on a mesh.

See `memorizing.models.kernels` for what they compute. What is seen by its distance is part of the bias there, so that
no mask is read; what is carried in front of a segment is read where it lies, and gets no gradient.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.models import kernels, positions
from memorizing.models.kernels import LANES, KeysOfTiles
from memorizing.models.masks import DistancesAndKeys, Visible

# Where the kernels are used: on TPUs that have them; anywhere, computed by plain operations, for tests; or nowhere.
KernelKind = Literal["tpu", "interpreted", "none"]

# These have no compiler for kernels.
_TOO_OLD = ("TPU v2", "TPU v3")
# A core of these has less memory of its own.
_SMALL = ("TPU v4",)
# Logits of a head, at least: smaller blocks take no less time than the plain form (`bench tpu --attention`).
_LEAST_HEAD_LOGITS = 1 << 17


def serves(kind: KernelKind, queries: Queries, keys: Keys, num_carried: int = 0) -> bool:
    """Whether the kernels are used for a segment's queries and the keys that they see.

    They are where the mesh that is set is one of TPUs from v4 on and they pay, from 2^17 pairs of a query and a key on;
    where the segment's length is a multiple of 128, what they compute with fits a core's own memory, and heads and rows
    fill the mesh.

    Args:
      kind: where they may be.
      queries, keys: [B, T, N, H] and [B, S, K, H].
      num_carried: of the keys.
    """
    num_rows, num_queries, num_heads, width = queries.shape
    num_keys, num_kv_heads = keys.shape[1:3]
    filled_up = num_keys + _num_missing(num_keys)
    mesh = jax.sharding.get_abstract_mesh()
    pays = has_kernels(mesh) and num_queries * filled_up >= _LEAST_HEAD_LOGITS
    if kind == "none" or (kind == "tpu" and not pays):
        return False
    is_small = not mesh.empty and mesh.abstract_device.device_kind.startswith(_SMALL)
    memory = kernels.SMALL_MEMORY if is_small else kernels.LARGE_MEMORY
    heads_fit = mesh.empty or num_heads % mesh.shape["model"] == num_kv_heads % mesh.shape["model"] == 0
    rows_fit = mesh.empty or num_rows % mesh.shape["data"] == 0
    lengths_fit = num_queries % LANES == 0 and (not num_carried or (num_keys - num_carried) % LANES == 0)
    fits_memory = kernels.memory(num_queries, filled_up, width, queries.dtype) <= memory
    return heads_fit and rows_fit and lengths_fit and fits_memory


def _num_missing(num_keys: int) -> int:
    """Keys in front that make their number a multiple of 128."""
    return -num_keys % LANES


def has_kernels(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether the devices of a mesh are TPUs that have a compiler for them."""
    device = None if mesh.empty else mesh.abstract_device
    return device is not None and device.platform == "tpu" and not device.device_kind.startswith(_TOO_OLD)


def attention(
    kind: KernelKind,
    queries: Queries,
    keys: Keys,
    values: Values,
    scale: HeadScale,
    by_distance: Float[Array, "N R"] | None,
    visible: Visible,
    num_carried: int = 0,
) -> tuple[Queries, Float[Array, "B T N"]]:
    """`local.local_attention` by the kernels, on every shard of the mesh that is set.

    Of a query that sees nothing the values are an average of any keys.

    Returns:
      The values, and the logarithms of the normalisers.
    """
    num_queries, num_heads = queries.shape[1:3]
    if by_distance is None:
        by_distance = jnp.zeros((num_heads, num_queries + keys.shape[1] - 1))
    if num_carried:
        num_carried += _num_missing(keys.shape[1])
    keys, values, by_distance, visible = _filled_up(keys, values, by_distance, visible)
    num_keys = keys.shape[1]

    bias = by_distance * scale[:, None]
    if visible.by_distance is None:
        distances, mask, hidden_keys = None, visible.mask, None
    else:
        distances, seen_keys = visible.by_distance
        bias = jnp.where(distances[None], bias, kernels.FAR)
        mask, hidden_keys = None, jnp.where(seen_keys, 0.0, kernels.FAR)[:, None]

    seen = _keys_of_tiles(distances, num_queries, num_keys)

    own = (keys[:, num_carried:], values[:, num_carried:])
    carried = (keys[:, :num_carried], values[:, :num_carried]) if num_carried else ()

    def of_shard(
        queries: Queries,
        own: tuple[Keys, Values],
        carried: tuple[Keys, Values] | tuple[()],
        scale: HeadScale,
        bias: Float[Array, "N R"],
        mask: Bool[Array, "B T S"] | None,
        hidden_keys: Float[Array, "B 1 S"] | None,
    ) -> tuple[Queries, Float[Array, "B T N"]]:
        by_head = [array.swapaxes(1, 2) for array in (queries, *own)]
        carried_by_head = tuple(jax.lax.stop_gradient(array).swapaxes(1, 2) for array in carried)
        # Here, so that shards exchange the gradient of R numbers a head, not that of a tile.
        tile = positions.wide_tile(bias, num_queries, num_keys)
        out, log_normalizer = kernels.softmax_attention(
            *by_head, carried_by_head, scale, tile, mask, hidden_keys, seen, kind == "interpreted"
        )
        return out.swapaxes(1, 2), log_normalizer.swapaxes(1, 2)

    if not jax.sharding.get_abstract_mesh().empty:
        by_head = P("data", None, "model")
        of_shard = jax.shard_map(
            of_shard,
            in_specs=(by_head, by_head, by_head, P("model"), P("model"), P("data"), P("data")),
            out_specs=(by_head, by_head),
            # A kernel does not say over which axes of the mesh its results vary.
            check_vma=False,
        )
    with jax.named_scope("local_attention"):
        return of_shard(queries, own, carried, scale, bias, mask, hidden_keys)


def _filled_up(
    keys: Keys,
    values: Values,
    by_distance: Float[Array, "N R"],
    visible: Visible,
) -> tuple[Keys, Values, Float[Array, "N R"], Visible]:
    """The same with keys in front that no query sees, so many that their number is a multiple of 128."""
    missing = _num_missing(keys.shape[1])
    if not missing:
        return keys, values, by_distance, visible
    keys, values = (jnp.pad(array, ((0, 0), (missing, 0), (0, 0), (0, 0))) for array in (keys, values))
    # The greatest distances are the last.
    by_distance = jnp.pad(by_distance, ((0, 0), (0, missing)))
    decided = visible.by_distance
    if decided is not None:
        seen_keys = jnp.pad(decided.keys, ((0, 0), (missing, 0)))
        decided = DistancesAndKeys(np.pad(decided.distances, (0, missing)), seen_keys)
    mask = jnp.pad(visible.mask, ((0, 0), (0, 0), (missing, 0)))
    return keys, values, by_distance, Visible(mask, decided)


def _keys_of_tiles(
    distances: Bool[np.ndarray, "R"] | None,
    num_queries: int,
    num_keys: int,
) -> KeysOfTiles:
    """For every tile of 128 queries the first key that one of them sees, and the one behind the last.

    Args:
      distances: that are seen; None where distances do not decide.
      num_queries, num_keys: T, S.
    """
    num_tiles = num_queries // LANES
    if distances is None:
        return ((0, num_keys),) * num_tiles
    # From the greatest distance to the least one: the last query's keys are the first S of them, and those of each
    # query before it begin one later.
    by_key = distances[::-1]
    of_tiles = []
    for behind in range(num_queries - LANES, -1, -LANES):
        rows = [by_key[first : first + num_keys] for first in range(behind, behind + LANES)]
        (seen,) = np.nonzero(np.any(rows, axis=0))
        of_tiles.append((int(seen[0]), int(seen[-1]) + 1))
    return tuple(of_tiles)
