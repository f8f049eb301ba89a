"""The Routing Transformer (Roy et al. 2021): positions attend within clusters of their content.

Some heads attend locally. The others route: query and key are one vector of length 1, and a position sees earlier ones
of its cluster, wherever in the segment they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Activations, AxesTree, Clock, Tree
from memorizing.context import Attended, Layout, Report, Segment
from memorizing.errors import Count, CountOrNone, Factor, Share, UserError, Width
from memorizing.models import partial_softmax
from memorizing.models.attention.base import (
    Attention,
    Example,
    LayerDims,
    attend_flops,
    logit_scale,
    matmul_flops,
    normalize,
    project_from_heads,
    project_to_heads,
)
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.sparse import buckets, clusters, dense
from memorizing.models.attention.sparse.buckets import Pairs
from memorizing.models.attention.sparse.clusters import Clusters
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.memory.retrieval import NEIGHBOURS


@dataclasses.dataclass(frozen=True)
class RoutingAttention(BiasedAttention):
    """Local heads beside routing heads, whose positions attend within clusters by k-means.

    As published, every centroid takes the w positions of the segment that are most similar to it. So later positions
    compete with earlier ones for a place: what a position sees never contains a later one, but which earlier ones it
    sees depends on them. A position may be in several clusters, and gets the average, or in none, and gets 0.
    With `strictly_causal` a position is in the cluster of its nearest centroid, and sees the last w positions of it up
    to itself: nothing depends on what comes later, so that it can also be decoded.

    Attributes:
      num_clusters: centroids of each head.
      cluster_size: w, in positions.
      num_local_heads: of the N heads; None for half of them.
      local: the mechanism of the local heads, one with a `core`. The layer carries what it carries.
      strictly_causal: whether a position's cluster is its own choice.
      random_projection: whether vectors are turned by a random orthonormal matrix before they are clustered.
      decay: of the running averages that make the centroids; with 1 they stay where they began.
      commitment: weight of the loss that draws vectors to their centroids.
      num_buckets, max_distance: see `BiasedAttention`.
    """

    tells_attention: ClassVar[bool] = True
    takes_memory_tokens: ClassVar[bool] = False
    decoding_advice: ClassVar[str] = (
        ", since later tokens compete with earlier ones for a place in a cluster; set "
        "RoutingAttention.strictly_causal = True in training and generation, and local heads that can decode"
    )

    num_clusters: Width = 16
    cluster_size: Count = 64
    num_local_heads: CountOrNone | None = None
    local: Attention = SparseAttention(sees="first", stride=64)
    strictly_causal: bool = False
    random_projection: bool = False
    decay: Share = 0.999
    commitment: Factor = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_clusters", "cluster_size"):
            if getattr(self, name) < 1:
                raise UserError(f"RoutingAttention.{name} = {getattr(self, name)}: at least 1")
        if self.num_local_heads is not None and self.num_local_heads < 0:
            raise UserError(f"RoutingAttention.num_local_heads = {self.num_local_heads}: at least 0")
        if not 0 <= self.decay <= 1:
            raise UserError(f"RoutingAttention.decay = {self.decay}: from 0 to 1")
        if type(self.local).core is Attention.core or self.local.memory_size:
            raise UserError(
                f"RoutingAttention.local = @{type(self.local).__name__}(): expected attention over keys and values "
                "without an external memory, such as @SparseAttention(), @XLAttention() or @FullAttention()"
            )

    @property
    def can_decode(self) -> bool:
        """Whether no position depends on later ones, and the local heads can decode."""
        return self.strictly_causal and self.local.can_decode

    @property
    def caches_segment_only(self) -> bool:
        """Whether the local heads do."""
        return self.local.caches_segment_only

    def check(self, segment_length: int) -> None:
        size = self.cluster_size
        if size > segment_length:
            raise UserError(
                f"RoutingAttention.cluster_size = {size} is more than the segment length {segment_length}: at most that"
            )
        if self.strictly_causal and segment_length % size:
            raise UserError(
                f"RoutingAttention.cluster_size = {size} does not divide the segment length {segment_length}, as "
                "RoutingAttention.strictly_causal asks for: choose another one"
            )
        self.local.check(segment_length)

    def split(self, dims: LayerDims) -> tuple[LayerDims, LayerDims]:
        """The sizes of the local heads and of the routing heads.

        Raises:
          UserError: no head is left to route.
        """
        num_local = dims.num_heads // 2 if self.num_local_heads is None else self.num_local_heads
        if num_local >= dims.num_heads:
            raise UserError(
                f"RoutingAttention.num_local_heads = {num_local} of {dims.num_heads} heads: at least one has to route"
            )
        num_routing = dims.num_heads - num_local
        return dataclasses.replace(dims, num_heads=num_local), dataclasses.replace(dims, num_heads=num_routing)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> Tree:
        local_dims, _ = self.split(dims)
        return self.local.init_state(local_dims, batch_size, segment_length)

    def state_axes(self) -> AxesTree:
        return self.local.state_axes()

    def fresh_state(self) -> Tree:
        return self.local.fresh_state()

    def prepare_state(self, state: Tree, clock: Clock) -> Tree:
        return self.local.prepare_state(state, clock)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return RoutingLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Projections, the local heads, similarities to the centroids, and attention within clusters."""
        local_dims, routing_dims = self.split(dims)
        length = layout.size
        local = self.local.flops(local_dims, layout)
        projections = matmul_flops(length, dims.embed_dim, 3 * routing_dims.width)
        route = matmul_flops(length, routing_dims.width, self.num_clusters)
        if self.strictly_causal:
            attend = attend_flops(routing_dims, length, 2 * self.cluster_size)
        else:
            attend = attend_flops(routing_dims, self.num_clusters * self.cluster_size, self.cluster_size)
        return local + projections + route + attend

    @classmethod
    def example(cls, segment_length: int) -> Example:
        # About the root of the segment's length, and a divisor of it.
        size = next(size for size in range(int(segment_length**0.5), 0, -1) if segment_length % size == 0)
        routing = cls(
            num_clusters=segment_length // size, cluster_size=size, local=SparseAttention("strided", "first", size)
        )
        meaning = (
            f"nothing carried; half of the heads see the last {size} positions, the others {routing.num_clusters} "
            f"clusters of {size}, in every layer"
        )
        return Example("routing", meaning, routing)


class RoutingLayer(nn.Module):
    """See `Attention.layer`."""

    attention: RoutingAttention
    dims: LayerDims

    @nn.compact
    def __call__(self, x: Activations, segment: Segment, state: Tree) -> tuple[Activations, Tree, Report]:
        config = self.attention
        dims = self.dims
        local_dims, routing_dims = config.split(dims)
        num_local = local_dims.num_heads

        # [B, T, N, H]; a routing head's query is its key.
        queries = project_to_heads(dims, "query")(x)
        values = project_to_heads(dims, "value")(x)
        # Routing heads' vectors of length 1 stand for layer-normalised ones: without a learned scale it is sqrt(H).
        scale = logit_scale(self, dims, fixed=dims.head_dim**0.5)
        attended = []
        report = Report()
        if num_local:
            keys = project_to_heads(local_dims, "key")(x)
            local_queries = queries[:, :, :num_local]
            if dims.qk_norm == "l2":
                local_queries, keys = normalize(local_queries), normalize(keys)
            local_scale = scale[:num_local] if dims.qk_norm == "l2" else jnp.full(num_local, dims.head_dim**-0.5)
            core = config.local.core(local_dims, name="local")
            y, state, report = core(local_queries, keys, values[:, :, :num_local], local_scale, segment, state)
            attended.append(y)

        vectors = normalize(queries[:, :, num_local:])
        route = Routing(config, routing_dims, name="routing")
        y, routing_report = route(vectors, values[:, :, num_local:], scale[num_local:], segment)
        attended.append(y)
        # Behind the local heads.
        told = [each.replace(heads=range(num_local, dims.num_heads)) for each in routing_report.attended]

        y = project_from_heads(dims)(jnp.concatenate(attended, axis=2))
        report = dataclasses.replace(
            report,
            losses={**report.losses, **routing_report.losses},
            metrics={**report.metrics, **routing_report.metrics},
            kv_cache={**report.kv_cache, **routing_report.kv_cache},
            choices={**report.choices, **routing_report.choices},
            attended=(*report.attended, *told),
        )
        return y, None if segment.decoding is not None else state, report


class Routing(nn.Module):
    """The routing heads, between projections.

    The centroids are a buffer: training changes them, and nothing else does.
    """

    attention: RoutingAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        vectors: Float[Array, "B T N H"],
        values: Float[Array, "B T N H"],
        scale: Float[Array, "N"],
        segment: Segment,
    ) -> tuple[Float[Array, "B T N H"], Report]:
        """Attention of the routing heads.

        Args:
          vectors: of length 1, queries and keys at once.
          values, scale: as of other heads.
          segment: of the positions.
        """
        config = self.attention
        dims = self.dims
        begin = functools.partial(clusters.init, dims.num_heads, config.num_clusters, dims.head_dim)
        sums = self.variable("buffers", "sums", lambda: begin(self.make_rng("params")).sums)
        counts = self.variable("buffers", "counts", lambda: begin(self.make_rng("params")).counts)
        running = Clusters(sums.value, counts.value)
        turned = vectors
        if config.random_projection:
            orthogonal = functools.partial(jax.random.orthogonal, n=dims.head_dim, shape=(dims.num_heads,))
            turn = self.variable("buffers", "turn", lambda: orthogonal(self.make_rng("params")))
            turned = jnp.einsum("BTNH,NHJ->BTNJ", vectors, turn.value.astype(vectors.dtype))
        bias = config.distance_bias(dims)

        # [B, N, T, c]
        similar = clusters.similarities(running, turned)
        nearest = checkpoint_name(jnp.argmax(similar, axis=-1), NEIGHBOURS)
        nearest = segment.chosen("nearest", nearest)
        if segment.decoding is not None:
            return self._decode(vectors, values, nearest, scale, bias, segment)

        by_distance = bias(np.arange(vectors.shape[1]))
        choices = {"nearest": nearest}
        if config.strictly_causal:
            y = _last_of_cluster(config, vectors, values, nearest, scale, by_distance, segment.is_real)
            is_routed = jnp.broadcast_to(segment.is_real[:, None], nearest.shape)
        else:
            choices["members"] = segment.chosen("members", _members(config, similar, segment.is_real))
            y, is_routed = _balanced(choices["members"], vectors, values, scale, by_distance, segment.is_real)

        if self.is_mutable_collection("buffers") and not self.is_initializing():
            sums.value, counts.value = clusters.update(running, turned, nearest, segment.is_real, config.decay)
        report = self._report(running, turned, nearest, is_routed, segment)
        if segment.num_shown:
            attended = _attended(config, vectors, choices, scale, by_distance, segment)
            report = dataclasses.replace(report, attended=(attended,))
        return y, dataclasses.replace(report, choices=choices)

    def _decode(
        self,
        vectors: Float[Array, "B T N H"],
        values: Float[Array, "B T N H"],
        nearest: Int[Array, "B N T"],
        scale: Float[Array, "N"],
        bias: Any,
        segment: Segment,
    ) -> tuple[Float[Array, "B T N H"], Report]:
        """A segment that is being generated: the prefill, or one position against the KV cache."""
        config = self.attention
        keys = segment.with_kv_cache("routing_keys", vectors)
        values = segment.with_kv_cache("routing_values", values)
        # [B, S, N]
        chosen = segment.with_kv_cache("routing_clusters", nearest.swapaxes(1, 2))
        report = Report(kv_cache={"routing_keys": keys, "routing_values": values, "routing_clusters": chosen})
        by_distance = bias(np.arange(keys.shape[1]))
        if not segment.is_decode_step:
            y = _last_of_cluster(config, vectors, values, nearest, scale, by_distance, segment.is_real)
            return y, report

        assert segment.decoding is not None, "a decode step"
        query = segment.decoding.position
        visible = buckets.last_of_bucket(nearest[..., 0], chosen.swapaxes(1, 2), query, config.cluster_size)
        logits = dense.logits(vectors, keys, by_distance, scale, query[None])
        return dense.attend(logits, visible[:, :, None], values), report

    def _report(
        self,
        before: Clusters,
        vectors: Float[Array, "B T N H"],
        nearest: Int[Array, "B N T"],
        is_routed: Bool[Array, "B N T"],
        segment: Segment,
    ) -> Report:
        """The commitment loss, and how the clusters are used."""
        is_real = segment.is_real
        distortion = clusters.distortion(before, vectors, nearest, is_real)
        num_real = jnp.maximum(jnp.sum(is_real) * nearest.shape[1], 1)
        routed = jnp.sum(is_routed & is_real[:, None]) / num_real
        total = jnp.maximum(jnp.sum(before.counts, axis=-1, keepdims=True), 1e-9)
        metrics = {
            "distortion": jax.lax.stop_gradient(distortion),
            "routed": routed,
            "largest_cluster": jnp.max(before.counts / total, axis=-1),
        }
        return Report(losses={"commitment": self.attention.commitment * distortion}, metrics=metrics)


def _last_of_cluster(
    config: RoutingAttention,
    vectors: Float[Array, "B T N H"],
    values: Float[Array, "B T N H"],
    nearest: Int[Array, "B N T"],
    scale: Float[Array, "N"],
    by_distance: Float[Array, "N S"],
    is_real: Bool[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Every position sees the last w of the cluster of its nearest centroid."""

    def logits_of(products: Float[Array, "B N m C S"], pairs: Pairs) -> Float[Array, "B N m C S"]:
        return buckets.biased(products, by_distance, pairs.query, pairs.key, scale)

    ordered = buckets.sort(nearest, is_real, config.num_clusters)
    pairs = buckets.pairs(ordered, config.cluster_size, strictly_causal=True)
    y = buckets.attend(vectors, vectors, values, ordered, pairs, logits_of).values
    return jnp.moveaxis(y, 1, 2)


def _members(
    config: RoutingAttention,
    similar: Float[Array, "B N T c"],
    is_real: Bool[Array, "B T"],
) -> Int[Array, "B N c w"]:
    """The w positions that are most similar to each centroid, by time; what is not real comes last, if at all."""
    ranked = jnp.where(is_real[:, None, None], similar.swapaxes(2, 3), -jnp.inf)
    _, members = jax.lax.top_k(ranked, config.cluster_size)
    return checkpoint_name(jnp.sort(members, axis=-1), NEIGHBOURS)


def _balanced(
    members: Int[Array, "B N c w"],
    vectors: Float[Array, "B T N H"],
    values: Float[Array, "B T N H"],
    scale: Float[Array, "N"],
    by_distance: Float[Array, "N S"],
    is_real: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Bool[Array, "B N T"]]:
    """Attention within the clusters; and whether a position is in any of them."""
    num_rows, length, num_heads, head_dim = vectors.shape
    flat = members.reshape(num_rows, num_heads, -1)
    is_member_real = jnp.take_along_axis(is_real[:, None], flat, axis=-1).reshape(members.shape)

    def gather(x: Float[Array, "B T N H"]) -> Float[Array, "B N c w H"]:
        chosen = jnp.take_along_axis(jnp.moveaxis(x, 2, 1), flat[..., None], axis=2)
        return chosen.reshape(*members.shape, head_dim)

    of_cluster = gather(vectors)
    visible = members[..., :, None] >= members[..., None, :]
    visible &= is_member_real[..., None, :]
    products = jnp.einsum("BNcwH,BNcsH->BNcws", of_cluster, of_cluster, preferred_element_type=jnp.float32)
    logits = buckets.biased(products, by_distance, members, members, scale)
    y = partial_softmax.attend(logits, visible, gather(values)).values

    # Back to their positions: the average over a position's clusters, 0 of one that is in none.
    y = jnp.where(is_member_real[..., None], y, 0).reshape(num_rows, num_heads, -1, head_dim)
    rows = jnp.arange(num_rows)[:, None, None]
    heads = jnp.arange(num_heads)[None, :, None]
    summed = jnp.zeros((num_rows, num_heads, length, head_dim), y.dtype).at[rows, heads, flat].add(y)
    is_member = is_member_real.reshape(flat.shape).astype(jnp.float32)
    times = jnp.zeros((num_rows, num_heads, length)).at[rows, heads, flat].add(is_member)
    averaged = summed / jnp.maximum(times, 1)[..., None].astype(y.dtype)
    return jnp.moveaxis(averaged, 1, 2), times > 0


def _attended(
    config: RoutingAttention,
    vectors: Float[Array, "B T N H"],
    choices: Mapping[str, Array],
    scale: Float[Array, "N"],
    by_distance: Float[Array, "N S"],
    segment: Segment,
) -> Attended:
    """What the routing heads attended to, for an inspector; a position belongs to the nearest cluster."""
    _, length, num_heads, _ = vectors.shape
    nearest = choices["nearest"]

    def of_last_of_cluster(query: Int[Array, "t"]) -> Float[Array, "B N t S"]:
        ordered = buckets.sort(nearest, segment.is_real, config.num_clusters)
        visible = buckets.meets(ordered, query, config.cluster_size, strictly_causal=True)
        return dense.softmax(dense.logits(vectors[:, query], vectors, by_distance, scale, query), visible)

    def of_balanced(query: Int[Array, "t"]) -> Float[Array, "B N t S"]:
        # [B, N, c, S]
        is_member = jnp.any(jax.nn.one_hot(choices["members"], length, dtype=bool), axis=3)
        is_member &= segment.is_real[:, None, None]
        is_earlier = query[:, None] >= jnp.arange(length)[None, :]
        logits = dense.logits(vectors[:, query], vectors, by_distance, scale, query)

        def add_cluster(total: Float[Array, "B N t S"], members: Bool[Array, "B N S"]) -> tuple:
            visible = members[:, :, query, None] & members[:, :, None, :] & is_earlier[None, None]
            return total + dense.softmax(logits, visible), None

        total, _ = jax.lax.scan(add_cluster, jnp.zeros(logits.shape), jnp.moveaxis(is_member, 2, 0))
        # The average over a query's clusters.
        times = jnp.sum(is_member[..., query], axis=2)
        return total / jnp.maximum(times, 1)[..., None]

    weights = of_last_of_cluster if config.strictly_causal else of_balanced
    groups = nearest.swapaxes(1, 2)[..., None]
    return dense.strongest(weights, length, segment.num_shown, groups, ("cluster",), range(num_heads))
