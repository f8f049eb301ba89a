"""The kernels of the local attention, computed by plain operations, and its plain form, against float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memorizing.context import Layout, Segment
from memorizing.models import kernels, positions
from memorizing.models.attention import flash
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.local import local_attention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.masks import DistancesAndKeys, Visible
from memorizing.runtime.sharding import MeshConfig

# Two rows of 256 queries, 384 keys; four query heads, two key heads.
B, T, S, N, K = 2, 256, 384, 4, 2


@pytest.fixture(scope="module", params=[16, 128], ids=["width 16", "width 128"])
def inputs(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of heads that fill registers, and of others. What float32 rounds off grows with products, which spread alike."""
    width = request.param
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mask = rng.random((B, T, S)) < 0.5
    mask[:, :, 5] = True
    return {
        "queries": normal(B, T, N, width) * (16 / width) ** 0.25,
        "keys": normal(B, S, K, width) * (16 / width) ** 0.25,
        "values": normal(B, S, K, width),
        "scale": jnp.asarray(rng.uniform(0.1, 1.0, N), jnp.float32),
        "by_distance": normal(N, T + S - 1),
        "mask": jnp.asarray(mask),
    }


def exact(inputs: dict[str, Any], num_carried: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """What `attended_and_gradients` gives, by its definition in float64."""
    mask = np.asarray(inputs["mask"])
    distance = np.arange(T)[:, None] + S - T - np.arange(S)[None, :]

    def attend(queries: Any, keys: Any, values: Any, scale: Any, by_distance: Any) -> Any:
        keys, values = (jnp.repeat(array, N // K, axis=2) for array in (keys, values))
        products = jnp.einsum("BTNH,BSNH->BNTS", queries, keys) + by_distance[None, :, distance + T - 1]
        logits = jnp.where(mask[:, None], products * scale[None, :, None, None], -jnp.inf)
        values = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits), values)
        return values, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)

    with jax.enable_x64(True):
        arrays = {name: np.asarray(array, np.float64) for name, array in inputs.items() if name != "mask"}
        attended, pull_back = jax.vjp(lambda arrays: attend(**arrays), arrays)
        (gradients,) = pull_back(cotangents(attended))
        attended, gradients = jax.tree.map(np.array, (attended, gradients))
    for name in ("keys", "values"):
        gradients[name][:, :num_carried] = 0
    return attended, gradients


def cotangents(attended: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape).astype(leaf.dtype), attended
    )


@functools.partial(jax.jit, static_argnames=("kernel", "num_carried"))
def attended_and_gradients(inputs: dict[str, Any], kernel: flash.KernelKind, num_carried: int = 0) -> tuple[Any, Any]:
    inputs = dict(inputs)
    mask = inputs.pop("mask")
    names = list(inputs)

    def attend(*arrays: jax.Array) -> Any:
        given = dict(zip(names, arrays, strict=True))
        return local_attention(**given, visible=Visible(mask), kernel=kernel, num_carried=num_carried)

    attended, pull_back = jax.vjp(attend, *inputs.values())
    return attended, dict(zip(names, pull_back(cotangents(attended)), strict=True))


def expect_equal(found: Any, expected: Any, share: float) -> None:
    """Equal to within a share of the greatest value."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=share * np.abs(other).max())


@pytest.mark.parametrize("num_carried", [0, S - T])
@pytest.mark.parametrize("block_logits", [1 << 20, 1 << 16, 1], ids=["one block", "two blocks", "blocks of 128"])
def test_values_normalisers_and_gradients_are_those_of_float64(
    inputs: dict[str, Any], block_logits: int, num_carried: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", block_logits)
    attended_and_gradients.clear_cache()
    found = attended_and_gradients(inputs, "interpreted", num_carried)
    expect_equal(found, exact(inputs, num_carried), 1e-5)


def test_the_plain_form_is_that_of_float64(inputs: dict[str, Any]):
    num_carried = S - T
    attended, gradients = attended_and_gradients(inputs, "none", num_carried)
    expect_equal((attended, gradients), exact(inputs, num_carried), 1e-5)


@pytest.mark.parametrize("kernel", ["interpreted", "none"])
def test_what_is_carried_gets_no_gradient(inputs: dict[str, Any], kernel: flash.KernelKind):
    num_carried = S - T
    _, gradients = attended_and_gradients(inputs, kernel, num_carried)
    for name in ("keys", "values"):
        assert not gradients[name][:, :num_carried].any()


def test_bfloat16_is_rounded_where_the_plain_form_rounds(inputs: dict[str, Any]):
    half = {name: array.astype(jnp.bfloat16) for name, array in inputs.items() if array.ndim == 4}
    attended_and_gradients.clear_cache()
    found = attended_and_gradients(inputs | half, "interpreted")
    expect_equal(found, attended_and_gradients(inputs | half, "none"), 2e-2)
    assert found[0].values.dtype == jnp.bfloat16


def test_without_a_bias(inputs: dict[str, Any]):
    given = inputs | {"by_distance": None, "visible": Visible(inputs["mask"])}
    given.pop("mask")
    found, expected = (local_attention(**given, kernel=kernel) for kernel in ("interpreted", "none"))
    expect_equal(found, expected, 1e-5)


@pytest.mark.parametrize("by_distance", [False, True], ids=["mask", "distance"])
def test_texts_side_by_side_attend_as_each_does_alone(
    inputs: dict[str, Any], by_distance: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", 1 << 16)
    distances = positions.distances(T, S) >= 0

    def attend(queries: jax.Array, mask: jax.Array) -> Any:
        given = {name: array for name, array in inputs.items() if name != "mask"} | {"queries": queries}
        visible = Visible(mask, DistancesAndKeys(distances, mask[:, 0]) if by_distance else None)
        return local_attention(**given, visible=visible, kernel="interpreted")

    texts = jnp.stack([inputs["queries"], 2 * inputs["queries"]]), jnp.stack([inputs["mask"], inputs["mask"][::-1]])
    together = jax.jit(jax.vmap(attend))(*texts)
    for index in range(2):
        alone = attend(*(array[index] for array in texts))
        expect_equal(jax.tree.map(lambda leaf, index=index: leaf[index], together), alone, 1e-6)


MECHANISMS = {
    "full": FullAttention(),
    "cache": XLAttention(window=256),
    "window": XLAttention(window=128, same_length=True),
    "a window of no whole registers": XLAttention(window=100, same_length=True),
    "first positions": XLAttention(window=128, num_sinks=4),
    "first positions and a window": XLAttention(window=128, num_sinks=4, same_length=True),
}


@pytest.mark.parametrize(
    "layout",
    [Layout(T), Layout(T, bidirectional=True), Layout(T - 8, 4, 4)],
    ids=["causal", "both ways", "memory tokens"],
)
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_see_the_same_with_kernels(name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch):
    """Three segments of two documents, of which one ends in the second."""
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", 1 << 16)
    served = []
    by_kernels = flash.attention
    monkeypatch.setattr(flash, "attention", lambda *args: served.append(args[6].by_distance) or by_kernels(*args))
    mechanism = MECHANISMS[name]
    rng = np.random.default_rng(0)
    params = {"params": {"bias": {"table": jnp.asarray(rng.normal(size=(N, mechanism.num_buckets)), jnp.float32)}}}
    lengths = np.array([3 * layout.length, 2 * layout.length - 100])
    places = np.arange(3 * layout.length).reshape(3, 1, layout.length)
    is_real = jnp.asarray(places < lengths[None, :, None])
    queries = jnp.asarray(rng.normal(size=(3, B, T, N, 16)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 3, B, T, K, 16)), jnp.float32)
    scale = jnp.arange(1.0, N + 1) / N

    def values_and_gradients(kernel: flash.KernelKind) -> Any:
        dims = LayerDims(16 * N, N, 16, 32, 0.0, 1.0, jnp.dtype(jnp.float32), num_kv_heads=K, attention_kernel=kernel)
        core = mechanism.core(dims)

        @jax.jit
        def of_segments(params: Any, scale: jax.Array, *arrays: jax.Array) -> Any:
            state = mechanism.init_state(dims, B, layout.length)
            outputs = []
            for index, (*of_segment, own_real) in enumerate(zip(*arrays, is_real, strict=True)):
                segment = Segment(layout.widen(own_real), layout, clock=jnp.asarray(index))
                out, state, _ = core.apply(params, *of_segment, scale, segment, state)
                # What a position that holds nothing gives is arbitrary.
                outputs.append(jnp.where(segment.is_real[:, :, None, None], out, 0))
            return jnp.stack(outputs)

        attended, pull_back = jax.vjp(of_segments, params, scale, queries, keys, values)
        return attended, pull_back(cotangents(attended))

    expected = values_and_gradients("none")
    assert not served
    expect_equal(values_and_gradients("interpreted"), expected, 2e-5)
    assert len(served) == 3
    has_mask = bool(layout.num_read) or name == "first positions and a window"
    assert all((by_distance is None) == has_mask for by_distance in served)


def test_what_no_query_sees_changes_nothing_and_gets_no_gradient(inputs: dict[str, Any]):
    hidden = inputs | {"mask": inputs["mask"].at[:, :, 100].set(False)}
    attended, gradients = attended_and_gradients(hidden, "interpreted")
    changed = hidden | {name: hidden[name].at[:, 100].add(1e3) for name in ("keys", "values")}
    np.testing.assert_array_equal(attended.values, attended_and_gradients(changed, "interpreted")[0].values)
    for name in ("keys", "values"):
        assert not gradients[name][:, 100].any()


def mesh_of(data: int, model: int, memory: int) -> jax.sharding.Mesh:
    return MeshConfig(data=data, model=model, memory=memory).make_mesh(jax.devices()[: data * model * memory])


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1), (2, 2, 2)], ids=["data", "model", "all"])
def test_sharded_equals_unsharded(inputs: dict[str, Any], axes: tuple[int, int, int]):
    expected = exact(inputs)
    mesh = mesh_of(*axes)
    specs = {4: P("data", None, "model"), 3: P("data"), 2: P("model"), 1: P("model")}
    with jax.set_mesh(mesh):
        on_mesh = {name: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for name, x in inputs.items()}
        attended_and_gradients.clear_cache()
        expect_equal(attended_and_gradients(on_mesh, "interpreted"), expected, 1e-5)


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1), (2, 2, 2)], ids=["data", "model", "all"])
def test_what_distance_and_key_decide_is_the_same_sharded(inputs: dict[str, Any], axes: tuple[int, int, int]):
    @functools.partial(jax.jit, static_argnames="on_mesh")
    def attend(inputs: dict[str, Any], on_mesh: bool) -> Any:
        inputs = dict(inputs)
        mask = inputs.pop("mask")
        visible = Visible(mask, DistancesAndKeys(positions.distances(T, S) >= 0, mask[:, 0]))
        return local_attention(**inputs, visible=visible, kernel="interpreted")

    expected = attend(inputs, on_mesh=False)
    mesh = mesh_of(*axes)
    specs = {4: P("data", None, "model"), 3: P("data"), 2: P("model"), 1: P("model")}
    with jax.set_mesh(mesh):
        on_mesh = {name: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for name, x in inputs.items()}
        expect_equal(attend(on_mesh, on_mesh=True), expected, 1e-6)


@pytest.mark.parametrize(
    "window,num_keys,expected",
    [
        (None, 512, ((0, 128), (0, 256), (0, 384), (0, 512))),
        (None, 768, ((0, 384), (0, 512), (0, 640), (0, 768))),
        (100, 768, ((157, 384), (285, 512), (413, 640), (541, 768))),
    ],
)
def test_keys_that_no_query_of_a_tile_sees_are_left_out(window: int | None, num_keys: int, expected: tuple):
    distances = positions.distances(512, num_keys)
    seen = (distances >= 0) & (distances < (window or num_keys))
    assert flash._keys_of_tiles(seen, 512, num_keys) == expected
    assert flash._keys_of_tiles(None, 512, num_keys) == ((0, num_keys),) * 4


def test_kernels_are_used_where_they_can_be():
    def serves(kind: flash.KernelKind, num_queries: int, num_keys: int, num_heads: int = 4) -> bool:
        queries, keys = (jnp.zeros((2, n, num_heads, 8)) for n in (num_queries, num_keys))
        return flash.serves(kind, queries, keys)

    assert serves("interpreted", 512, 1024)
    assert not serves("none", 512, 1024)
    assert not serves("tpu", 512, 1024), "no mesh of TPUs is set"
    assert not serves("interpreted", 1, 1024), "a step of generation"
    assert serves("interpreted", 512, 1000), "filled up to 1,024 keys"
    assert not serves("interpreted", 500, 1000)
    assert serves("interpreted", 2048, 4096)
    assert not serves("interpreted", 2048, 16384), "its logits and its bias do not fit into the core"
    assert not serves("interpreted", 512, 16384 + 512), "nor do those of a long window"
    mesh = mesh_of(1, 2, 1)
    with jax.set_mesh(mesh):
        assert serves("interpreted", 512, 1024)
        assert not serves("interpreted", 512, 1024, num_heads=3)
        assert not serves("tpu", 512, 1024), "a mesh of CPUs"


@pytest.mark.parametrize(
    "kind,has_kernels",
    [("TPU v2", False), ("TPU v3", False), ("TPU v4", True), ("TPU v5 lite", True), ("TPU v6", True)],
)
def test_kernels_are_for_the_generations_that_have_a_compiler_for_them(kind: str, has_kernels: bool):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "model", "memory"), abstract_device=device)
    queries = jnp.zeros((2, 512, 4, 8))
    with jax.sharding.use_abstract_mesh(mesh):
        assert flash.serves("tpu", queries, queries) == has_kernels
        # Blocks in which they do not pay.
        assert not flash.serves("tpu", queries[:, :128], queries[:, :256])
        # More than the cores of v4 have memory for.
        long = jnp.zeros((1, 2048, 1, 128))
        assert flash.serves("tpu", long[:, :1024], long) == (has_kernels and kind != "TPU v4")
