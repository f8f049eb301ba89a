"""Retrieval alone: the searches of this package beside faiss and PyTorch, time and recall.

1024 queries in each of 4 heads, every head with keys of its own; the 32 best of 8192 and of 65536 keys of width 64.
Keys lie in clusters on the unit sphere, and queries are keys with noise. Recall is against the neighbours in float64.
HNSW's time is that of the search; building the index and adding a segment to it are reported beside it. The bare
product is that of all queries and keys of a head in one piece, of which each query keeps the greatest score.

  pip install 'memorizing[bench]'       faiss-cpu and torch; without them their rows are left out
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memorizing.benchmarks import measure
from memorizing.commands import experiment_flags
from memorizing.errors import MOST, Range, UserError
from memorizing.models.memory.blocks import scores_of
from memorizing.models.memory.search import ApproximateSearch, ExactSearch
from memorizing.runtime import tables

QUERIES = 1024
HEADS = 4
K = 32
PRODUCT = "bare product"
# Searches all heads and returns the slots, [N, T, k].
Found = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--slots", default="8192,65536", metavar="M,...", help="memory sizes (default: %(default)s)")
    parser.add_argument(
        "--head_dim", type=Range(1, 2**16).of(int), default=64, metavar="H", help="width of keys (default: %(default)s)"
    )
    parser.add_argument(
        "--filled",
        type=Range(0, 1).of(float),
        default=1.0,
        metavar="SHARE",
        help="share of the slots that hold a key, the first ones; the others' searches have no more (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the keys and queries of this package's searches (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=Range(1, MOST).of(int), default=9, metavar="N", help="runs of each (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table for each memory size, and returns the figures."""
    if bindings:
        raise UserError(f"bench search takes no bindings, but was given --gin.{bindings[0]}")
    measure.at_least("--head_dim", options.head_dim, 1)
    experiment_flags.use_devices(HEADS)
    results = {}
    for num_slots in measure.sizes("--slots", options.slots, least=K):
        queries, keys = (
            vectors.astype(options.dtype).astype(np.float32) for vectors in random_vectors(num_slots, options.head_dim)
        )
        filled = keys[:, : max(K, round(options.filled * num_slots))]
        searches = ours(queries, keys, filled.shape[1], options.dtype) | theirs(queries, filled)
        seconds = measure.interleaved({name: search for name, (search, _) in searches.items()}, options.rounds)
        true = true_neighbours(queries, filled)
        # Where torch is missing ratios are to the exact search.
        base = seconds.get("torch matmul + topk", seconds["exact"])
        results[num_slots] = {
            name: {
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "quartiles": [1e3 * value for value in measure.quartiles(seconds[name])],
                "ratio": measure.ratio(seconds[name], base),
                "recall": None if name == PRODUCT else recall(np.asarray(search()), true),
                "note": note,
            }
            for name, (search, note) in searches.items()
        }
        of_slots = f"{filled.shape[1]} keys of width {options.head_dim} in {num_slots} slots"
        print(f"\n{of_slots}\n{_table(results[num_slots])}", flush=True)
    return results


def random_vectors(num_slots: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries [N, T, H] and keys [N, M, H], float32 of norm 1."""
    rng = np.random.default_rng(0)
    # [N, 1]
    head = np.arange(HEADS)[:, None]
    # [N, clusters, H]
    centres = rng.normal(size=(HEADS, 64, width))
    # [N, M]
    cluster = rng.integers(0, 64, (HEADS, num_slots))
    # [N, M, H]
    keys = _unit(centres[head, cluster] + 0.5 * rng.normal(size=(HEADS, num_slots, width)))
    # [N, T, H]
    noise = rng.normal(size=(HEADS, QUERIES, width)) / np.sqrt(width)
    slot = rng.integers(0, num_slots, (HEADS, QUERIES))
    queries = _unit(keys[head, slot] + 0.5 * noise)
    return queries, keys


def true_neighbours(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Slots of the k best in float64, int [N, T, k], in no order."""
    found = []
    for head_queries, head_keys in zip(queries, keys, strict=True):
        # [T, M]
        scores = head_queries.astype(np.float64) @ head_keys.astype(np.float64).T
        best = np.argpartition(-scores, K, axis=-1)
        found.append(best[:, :K])
    return np.stack(found)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true neighbours that were found."""
    # [N, T, k found, k true]
    is_same = found[..., :, None] == true[..., None, :]
    return float(is_same.any(axis=-2).mean())


def ours(queries: np.ndarray, keys: np.ndarray, num_filled: int, dtype: str) -> dict[str, tuple[Found, str]]:
    """This package's searches as a layer runs them, in one program, and the product that they have to make.

    Heads are sharded over the devices (on a CPU its cores); on each device one head is searched after the other.
    """
    num_devices = math.gcd(HEADS, jax.device_count())
    mesh = jax.make_mesh((num_devices,), ("model",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec("model")
    on_devices = jax.device_put((queries.astype(dtype), keys.astype(dtype)), NamedSharding(mesh, heads))

    def program(of_heads: Callable[[jax.Array, jax.Array], jax.Array]) -> Found:
        compiled = jax.jit(jax.shard_map(of_heads, mesh=mesh, in_specs=heads, out_specs=heads))
        return lambda: jax.block_until_ready(compiled(*on_devices))

    def found(search: ExactSearch | ApproximateSearch) -> Found:
        def search_heads(queries: jax.Array, keys: jax.Array) -> jax.Array:
            valid = (jnp.arange(keys.shape[1]) < num_filled)[None]
            return search.of_heads(queries, keys, valid, K).indices

        return program(search_heads)

    def product(queries: jax.Array, keys: jax.Array) -> jax.Array:
        # A head after the other, as the searches do.
        return jax.lax.map(
            lambda head: scores_of(*head, jnp.ones(head[1].shape[0], bool)).max(axis=-1), (queries, keys)
        )

    return {
        "exact": (found(ExactSearch()), ""),
        "approximate": (found(ApproximateSearch()), "off TPUs the exact one"),
        PRODUCT: (program(product), "no search"),
    }


def theirs(queries: np.ndarray, keys: np.ndarray) -> dict[str, tuple[Found, str]]:
    """The libraries' searches, as far as they are installed."""
    searches: dict[str, tuple[Found, str]] = {}
    try:
        import torch
    except ImportError:
        print("torch is not installed: pip install 'memorizing[bench]'")
    else:
        torch_queries = torch.from_numpy(queries)
        torch_keys = torch.from_numpy(keys)

        def torch_search() -> np.ndarray:
            found = []
            for head_queries, head_keys in zip(torch_queries, torch_keys, strict=True):
                scores = head_queries @ head_keys.T
                found.append(torch.topk(scores, K).indices.numpy())
            return np.stack(found)

        searches["torch matmul + topk"] = (torch_search, "")
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: pip install 'memorizing[bench]'")
        return searches
    width = keys.shape[-1]
    kinds = {
        "faiss exact": lambda: faiss.IndexFlatIP(width),
        "faiss HNSW, ef 16": lambda: _hnsw(faiss, width, 16),
        "faiss HNSW, ef 128": lambda: _hnsw(faiss, width, 128),
    }
    for name, make in kinds.items():
        indexes = [make() for _ in keys]
        segment = 256
        start = time.perf_counter()
        for index, head_keys in zip(indexes, keys, strict=True):
            index.add(head_keys[:-segment])
        built = time.perf_counter()
        for index, head_keys in zip(indexes, keys, strict=True):
            index.add(head_keys[-segment:])
        added = time.perf_counter()

        def faiss_search(indexes: list[Any] = indexes) -> np.ndarray:
            found = []
            for index, head_queries in zip(indexes, queries, strict=True):
                _, slots = index.search(head_queries, K)
                found.append(slots)
            return np.stack(found)

        note = f"built in {built - start:.1f} s, 256 keys added in {1e3 * (added - built):.0f} ms"
        searches[name] = (faiss_search, note if "HNSW" in name else "")
    return searches


def _hnsw(faiss: Any, width: int, ef: int) -> Any:
    # 15 links, as the PyTorch package of the Memorizing Transformer.
    index = faiss.IndexHNSWFlat(width, 15, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = ef
    return index


def _unit(array: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(array, axis=-1, keepdims=True)
    return (array / norms).astype(np.float32)


def _table(result: dict[str, dict[str, Any]]) -> str:
    rows = [["", "median", "quartiles", "ratio", "recall", ""]]
    for name, row in result.items():
        first, third = row["quartiles"]
        quartiles = f"{first:,.0f}-{third:,.0f}"
        rows.append(
            [
                name,
                f"{row['milliseconds']:,.0f} ms",
                quartiles,
                f"{row['ratio']:.2f}",
                "-" if row["recall"] is None else f"{row['recall']:.3f}",
                row["note"],
            ]
        )
    return tables.align(rows)
