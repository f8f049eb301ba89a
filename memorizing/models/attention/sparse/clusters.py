"""Clusters of vectors, by k-means that runs along with training (Roy et al. 2021, section 4.1).

Each head has centroids of its own. They are no parameters: a step moves them towards the vectors that are nearest to
them. As sums over rows they are the same on every device of a mesh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memorizing.array_typing import RealPositions

# Of the counts (Laplace smoothing): a centroid that nothing is near to keeps its place.
_EPSILON = 1e-5

# Vectors of all heads.
Vectors = Float[Array, "B T N H"]


class Clusters(NamedTuple):
    """Running averages over vectors, for each head and cluster.

    Attributes:
      sums: float32 [N, c, H], of the vectors of a step that are nearest to a centroid.
      counts: float32 [N, c], of their number.
    """

    sums: Float[Array, "N c H"]
    counts: Float[Array, "N c"]

    @property
    def centroids(self) -> Float[Array, "N c H"]:
        """Sums over smoothed counts."""
        total = jnp.sum(self.counts, axis=-1, keepdims=True)
        num_clusters = self.counts.shape[-1]
        smoothed = (self.counts + _EPSILON) / (total + num_clusters * _EPSILON) * total
        return self.sums / smoothed[..., None]


def init(num_heads: int, num_clusters: int, head_dim: int, rng: jax.Array) -> Clusters:
    """Centroids in random directions, of length 1, each as if one vector had been there."""
    directions = jax.random.normal(rng, (num_heads, num_clusters, head_dim))
    sums = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    return Clusters(sums, jnp.ones((num_heads, num_clusters)))


def similarities(clusters: Clusters, vectors: Vectors) -> Float[Array, "B N T c"]:
    """Inner products with every centroid, float32; no gradient."""
    vectors = jax.lax.stop_gradient(vectors).astype(jnp.float32)
    return jnp.einsum("BTNH,NcH->BNTc", vectors, clusters.centroids)


def update(
    clusters: Clusters,
    vectors: Vectors,
    nearest: Int[Array, "B N T"],
    is_real: RealPositions,
    decay: float,
) -> Clusters:
    """The running averages after one more batch of vectors.

    Args:
      clusters: before it.
      vectors: of the batch.
      nearest: the cluster of each.
      is_real: which of them count.
      decay: of the averages.
    """
    vectors = jax.lax.stop_gradient(vectors).astype(jnp.float32)
    # [B, N, T, c]
    belongs = jax.nn.one_hot(nearest, clusters.counts.shape[-1]) * is_real[:, None, :, None]
    sums = jnp.einsum("BNTc,BTNH->NcH", belongs, vectors)
    counts = jnp.sum(belongs, axis=(0, 2))
    return Clusters(
        decay * clusters.sums + (1 - decay) * sums,
        decay * clusters.counts + (1 - decay) * counts,
    )


def distortion(
    clusters: Clusters,
    vectors: Vectors,
    nearest: Int[Array, "B N T"],
    is_real: RealPositions,
) -> Float[Array, ""]:
    """Mean square distance of the real vectors to their centroids; gradient reaches the vectors alone."""
    heads = jnp.arange(vectors.shape[2])[None, :, None]
    # [B, N, T, H]
    centroids = jax.lax.stop_gradient(clusters.centroids)[heads, nearest]
    away = jnp.moveaxis(vectors.astype(jnp.float32), 2, 1) - centroids
    square = jnp.sum(jnp.square(away), axis=-1)
    weight = jnp.broadcast_to(is_real[:, None].astype(jnp.float32), square.shape)
    return jnp.sum(square * weight) / jnp.maximum(jnp.sum(weight), 1.0)
