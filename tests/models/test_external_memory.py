"""The external memory: what it holds after any history, what a query reads from it, and where gradients go.

What a user relies on: each row remembers exactly the last M positions of its own document, the segment at hand not
among them, and reads them by content alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mechanisms import apply_model, init_params

from memorizing import context as context_lib
from memorizing.context import Layout, Segment
from memorizing.errors import UserError
from memorizing.models.attention.base import LayerDims, normalize
from memorizing.models.attention.external import MemoryState
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory import external_memory, retrieval
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.search import ApproximateSearch, ExactSearch
from memorizing.runtime.sharding import MeshConfig

B, T, N, H, M = 3, 4, 2, 8, 16
DIMS = LayerDims(8, N, H, 16, 0.0, 1.0, jnp.dtype(jnp.float32))
SCALE = jnp.array([4.0, 8.0])


def segment(is_real: jax.Array) -> Segment:
    """The third segment, of tokens from 0 to 8."""
    tokens = jnp.asarray(np.random.default_rng(9).integers(0, 9, is_real.shape), jnp.int32)
    return Segment(is_real, Layout(T), tokens=tokens, clock=jnp.asarray(2))


# History: FIFO over M slots.


@functools.cache
def replay(memory_size: int):
    """`(starts [S, B], is_real [S, B, T]) -> (keys, values, valid)` before each segment reads.

    The key at a position is its global time, the value minus that.
    """
    config = KNNAttention(memory_size=memory_size)

    def segment(carry: tuple, inputs: tuple) -> tuple:
        state, clock = carry
        start, is_real = inputs
        state = context_lib.reset_rows(config.prepare_state(state, clock), config.fresh_state(), start)
        time = jnp.broadcast_to((clock * T + jnp.arange(T)).astype(jnp.float32)[None, :, None, None], (B, T, N, H))
        last_segment = external_memory.of_segment(time, -time, jnp.zeros((B, T), jnp.int32), is_real)
        return (state.replace(last_segment=last_segment), clock + 1), state.memory

    @jax.jit
    def run(starts: jax.Array, is_real: jax.Array) -> Memory:
        carry = (config.init_state(DIMS, B, T), jnp.zeros((), jnp.int32))
        return jax.lax.scan(segment, carry, (starts, is_real))[1]

    return run


SEGMENTS = 5 * M // T + 3


@pytest.mark.parametrize("memory_size", [M, T], ids=["M = 4T", "M = T"])
@settings(max_examples=25)
@given(
    starts=hnp.arrays(bool, (SEGMENTS, B), elements=st.sampled_from([True, False, False, False, False, False])),
    num_real=hnp.arrays(int, (SEGMENTS, B), elements=st.sampled_from([T, T, T, 0, 1, 3])),
)
def test_holds_the_last_positions_of_the_document_far_past_capacity(
    memory_size: int, starts: np.ndarray, num_real: np.ndarray
):
    """Rows begin and end documents at different times; each is compared with a plain queue of its own."""
    is_real = np.arange(T) < num_real[..., None]
    memory = jax.device_get(replay(memory_size)(starts, is_real))
    queues = [collections.deque(maxlen=memory_size) for _ in range(B)]
    for segment in range(SEGMENTS):
        for row, queue in enumerate(queues):
            if starts[segment, row]:
                queue.clear()
            expected = sorted(time for time in queue if time is not None)
            valid = memory.valid[segment, row]
            for head in range(N):
                keys, values = memory.keys[segment, row, head][valid], memory.values[segment, row, head][valid]
                assert sorted(keys[:, 0]) == expected, f"segment {segment}, row {row}, head {head}"
                np.testing.assert_array_equal(values, -keys)
            # A slot taken by padding is lost for this row, but never read.
            times = range(segment * T, (segment + 1) * T)
            queue.extend(time if real else None for time, real in zip(times, is_real[segment, row], strict=True))


# Reading.


@dataclasses.dataclass(frozen=True)
class HalfBlind(ApproximateSearch):
    """A search that does not see the odd half of what is to be found."""

    def top_k(self, queries: jax.Array, keys: jax.Array, valid: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        scores, slots = ExactSearch().top_k(queries, keys, valid, k)
        return jnp.where(jnp.arange(k) % 2, -jnp.inf, scores), slots


class InSlabs(ExactSearch):
    """As on TPUs."""

    of_heads = ExactSearch.in_slabs


def random_memory(rng: np.random.Generator, num_slots: int = M, dtype: jnp.dtype = jnp.float32) -> Memory:
    """Row 0 full, row 1 with three valid slots, row 2 empty."""
    keys, values = rng.normal(size=(2, B, N, num_slots, H))
    valid = np.zeros((B, num_slots), bool)
    valid[0], valid[1, [2, 5, 11]] = True, True
    tokens = jnp.asarray(rng.integers(0, 9, (B, num_slots)), jnp.int32)
    return Memory(normalize(jnp.asarray(keys, dtype)), jnp.asarray(values, dtype), tokens, jnp.asarray(valid))


def random_queries(rng: np.random.Generator, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return normalize(jnp.asarray(rng.normal(size=(B, T, N, H)), dtype))


@functools.partial(jax.jit, static_argnames="k")
def read(queries: jax.Array, scale: jax.Array, memory: Memory, k: int) -> jax.Array:
    return retrieval.read(queries, scale, memory, k, ExactSearch()).values


@functools.partial(jax.jit, static_argnames="k")
def read_gradient(queries: jax.Array, scale: jax.Array, memory: Memory, k: int) -> tuple:
    return jax.grad(lambda *args: jnp.sum(jnp.sin(read(*args, k=k))), argnums=(0, 1, 2), allow_int=True)(
        queries, scale, memory
    )


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, model=2, memory=2)], ids=["one device", "8 devices"])
def test_what_tpus_read_is_what_others_read(mesh: MeshConfig | None):
    """Values, neighbours and gradients; one row's keys are all the same, which the slabs leave to the blocks."""
    rng, k = np.random.default_rng(0), 2
    # Eighths, of which every sum is exact: the two add in another order, and would round to other scores.
    keys, values = rng.integers(-8, 9, size=(2, 4, N, 96, H)) / 8
    keys[1] = keys[1, 0, 0]
    valid = jnp.asarray(rng.random((4, 96)) < 0.8)
    memory = Memory(
        jnp.asarray(keys, jnp.float32),
        jnp.asarray(values, jnp.float32),
        jnp.zeros((4, 96), jnp.int32),
        valid,
    )
    queries = jnp.asarray(rng.integers(-8, 9, size=(4, T, N, H)) / 8, jnp.float32)

    def results(search: ExactSearch) -> tuple:
        def loss(queries: jax.Array) -> tuple:
            reading = retrieval.read(queries, SCALE, memory, k, search)
            return jnp.sum(jnp.sin(reading.values)), reading.neighbours

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(queries)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh.make_mesh()):
        found = results(InSlabs(slabs=4))
        expected = results(ExactSearch())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    np.testing.assert_array_equal(found[0][1].slots, expected[0][1].slots)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, model=2, memory=2)], ids=["one device", "8 devices"])
def test_the_recall_of_a_search_that_is_not_exact_is_measured(mesh: MeshConfig | None):
    rng, k = np.random.default_rng(0), 4
    keys = normalize(jnp.asarray(rng.normal(size=(4, N, M, H)), jnp.float32))
    queries = normalize(jnp.asarray(rng.normal(size=(4, T, N, H)), jnp.float32))

    @functools.partial(jax.jit, static_argnums=0)
    def recall(search: Any, valid: jax.Array) -> jax.Array:
        return retrieval.read(
            queries, SCALE, Memory(keys, keys, jnp.zeros_like(valid, jnp.int32), valid), k, search
        ).recall

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh.make_mesh()):
        full, empty = jnp.ones((4, M), bool), jnp.zeros((4, M), bool)
        assert recall(HalfBlind(), full) == 0.5
        assert recall(HalfBlind(), empty) == 1
        assert recall(ApproximateSearch(), full) == 1, "exact on CPU"


def test_training_reports_the_recall_of_the_approximate_search():
    def metrics(search: Any) -> dict:
        config = LMConfig(16, 1, 8, N, H, 8, attention=KNNAttention(memory_size=T, num_neighbors=2, search=search))
        params = init_params(config, 1, T, jax.random.key(0))
        tokens = jnp.ones((1, T), jnp.int32)
        context = config.init_context(1, T)
        output = apply_model(config, params, tokens, tokens > 0, jnp.ones(1, bool), context)
        return output.report.metrics

    (recall,) = (value for name, value in metrics(ApproximateSearch()).items() if name.endswith("search_recall"))
    assert recall == 1
    assert not any("recall" in name for name in metrics(ExactSearch()))


def dense(queries: np.ndarray, memory: Memory) -> np.ndarray:
    """Softmax over all valid slots, in float64; zero for a row without any."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, memory.keys, memory.values))
    logits = np.einsum("BTNH,BNMH->BNTM", queries, keys) * np.asarray(SCALE)[None, :, None, None]
    weights = np.exp(logits) * np.asarray(memory.valid)[:, None, None, :]
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return np.einsum("BNTM,BNMH->BTNH", weights, values)


@pytest.mark.parametrize("k", [M, 5 * M], ids=["k = M", "k > M"])
@pytest.mark.parametrize("num_slots", [M, 12], ids=["M = 4T", "M = 3T"])
def test_all_slots_as_neighbours_is_dense_attention(num_slots: int, k: int):
    """Design claim.

    The search only leaves out what has no weight; with every slot among the k it leaves out nothing. Also fewer valid
    slots than k.
    """
    rng = np.random.default_rng(0)
    queries, memory = random_queries(rng), random_memory(rng, num_slots)
    np.testing.assert_allclose(read(queries, SCALE, memory, k=k), dense(queries, memory), rtol=0, atol=2e-6)


def test_bfloat16_memory_is_read_with_float32_sums():
    rng = np.random.default_rng(0)
    queries, memory = random_queries(rng, jnp.bfloat16), random_memory(rng, dtype=jnp.bfloat16)
    output = read(queries, SCALE, memory, k=M)
    assert output.dtype == jnp.bfloat16
    # 2^-8 is the spacing of bfloat16 below 1, the weights and the result are rounded once each.
    np.testing.assert_allclose(output.astype(jnp.float32), dense(queries, memory), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_lies_in_invalid_slots_never_reaches_output_or_gradient(poison: float):
    """An emptied slot keeps its old bits, whatever they are: masked by a product they would come back as NaN."""
    rng = np.random.default_rng(0)
    queries, memory = random_queries(rng), random_memory(rng)
    empty = ~memory.valid[:, None, :, None]
    poisoned = memory.replace(
        keys=jnp.where(empty, poison, memory.keys), values=jnp.where(empty, poison, memory.values)
    )
    for k in (1, 8):
        np.testing.assert_array_equal(read(queries, SCALE, memory, k=k), read(queries, SCALE, poisoned, k=k))
        for clean, dirty in zip(
            read_gradient(queries, SCALE, memory, k=k)[:2],
            read_gradient(queries, SCALE, poisoned, k=k)[:2],
            strict=True,
        ):
            np.testing.assert_array_equal(clean, dirty)
            assert np.isfinite(dirty).all()


# The layer around it.


@dataclasses.dataclass(frozen=True)
class Core:
    """A kNN core with its parameters; the gate's bias is settable."""

    config: KNNAttention = KNNAttention(memory_size=M, num_neighbors=4)

    def inputs(self, seed: int = 0) -> tuple:
        """Queries, keys, values, scale, segment, state: the memory of `random_memory`."""
        rng = np.random.default_rng(seed)
        queries, keys, values = (random_queries(rng) for _ in range(3))
        state = self.config.init_state(DIMS, B, T).replace(memory=random_memory(rng))
        return queries, keys, values, SCALE, segment(jnp.ones((B, T), bool)), state

    def params(self, gate: float = 0.0) -> dict:
        params = nn.unbox(self.config.core(DIMS).init(jax.random.key(0), *self.inputs())["params"])
        return params | {"gate": jnp.full(N, gate)}

    def __call__(self, params: dict, *inputs: object) -> tuple[jax.Array, MemoryState]:
        y, state, _ = self.config.core(DIMS).apply({"params": params}, *inputs)
        return y, state


# sigmoid(100) is 1 in float32: the output is what was read and nothing else.
ONLY_MEMORY = 100.0


@pytest.mark.parametrize("local", [FullAttention(), XLAttention(window=T)], ids=["full", "xl"])
def test_an_empty_memory_contributes_exactly_nothing(local: FullAttention | XLAttention):
    """The output is the local attention, not (1 - g) times it; also with a gate that asks for the memory only."""
    core = Core(KNNAttention(memory_size=M, num_neighbors=4, local=local))
    params, (*inputs, state) = core.params(ONLY_MEMORY), core.inputs()
    y, _ = core(params, *inputs, state)
    local_params = {name: value for name, value in params.items() if name != "gate"}
    y_local, _, _ = local.core(DIMS).apply({"params": local_params}, *inputs, state.local)
    np.testing.assert_array_equal(y[2], y_local[2])
    assert (np.abs(y[:2] - y_local[:2]).max(axis=(1, 2, 3)) > 0).all(), "rows with a memory do not read it"


def test_a_segment_is_read_by_the_next_one_and_never_by_itself():
    """Read before write: what a segment retrieves does not depend on its own keys and values."""
    core = Core()
    params, (queries, keys, values, scale, segment, state) = core.params(ONLY_MEMORY), core.inputs()
    state = state.replace(memory=state.memory.replace(valid=jnp.ones_like(state.memory.valid)))
    _, other_keys, other_values, *_ = core.inputs(seed=1)
    y, after = core(params, queries, keys, values, scale, segment, state)
    other_y, other_after = core(params, queries, other_keys, other_values, scale, segment, state)
    np.testing.assert_array_equal(y, other_y)
    y, other_y = (
        core(params, queries, keys, values, scale, segment, core.config.prepare_state(each, jnp.asarray(7)))[0]
        for each in (after, other_after)
    )
    assert (np.abs(y - other_y).max(axis=(1, 2, 3)) > 1e-3).all(), "the next segment does not see it"


def test_the_gate_mixes_per_head():
    """g near 1 is the memory, g near 0 the local attention, b = 0 the mean of both.

    The paper's form, not its mirror image.
    """
    core, inputs = Core(), Core().inputs()
    memory, local, mean = (core(core.params(gate), *inputs)[0][0] for gate in (ONLY_MEMORY, -ONLY_MEMORY, 0.0))
    np.testing.assert_allclose(mean, (memory + local) / 2, rtol=0, atol=1e-6)
    np.testing.assert_allclose(memory, read(inputs[0], SCALE, inputs[-1].memory, k=4)[0], rtol=0, atol=1e-6)
    mixed, _ = core(core.params() | {"gate": jnp.array([ONLY_MEMORY, -ONLY_MEMORY])}, *inputs)
    np.testing.assert_allclose(mixed[0], np.stack([memory[:, 0], local[:, 1]], axis=1), rtol=0, atol=1e-6)


def test_the_gate_starts_where_it_is_told():
    def gate(initial: float) -> np.ndarray:
        config = LMConfig(16, 1, 8, N, H, 8, attention=KNNAttention(memory_size=T, initial_gate=initial))
        params = init_params(config, 1, T, jax.random.key(0))
        (bias,) = (leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "gate" in str(path))
        return np.asarray(nn.sigmoid(bias))

    np.testing.assert_allclose(gate(0.1), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(gate(0.5), 0.5)
    with pytest.raises(UserError, match=r"KNNAttention.initial_gate = 1"):
        KNNAttention(initial_gate=1)


def test_gradients_reach_queries_scale_and_gate_and_nothing_that_is_stored():
    core = Core()
    queries, keys, values, scale, segment, state = core.inputs()
    floats = (state.memory.keys, state.memory.values)

    @jax.jit
    def gradients(gate: jax.Array) -> tuple:
        def output(gate, queries, scale, keys, values, memory_keys, memory_values):
            memory = state.memory.replace(keys=memory_keys, values=memory_values)
            y, new_state = core(
                core.params() | {"gate": gate}, queries, keys, values, scale, segment, state.replace(memory=memory)
            )
            # Row 0 only: it has a full memory.
            return jnp.sum(jnp.sin(y[0])), sum(
                jnp.sum(leaf) for leaf in (new_state.last_segment.keys, new_state.last_segment.values)
            )

        _, pull_back = jax.vjp(output, gate, queries, scale, keys, values, *floats)
        return pull_back((1.0, 0.0)), pull_back((0.0, 1.0))

    of_output, of_stored = gradients(jnp.zeros(N))
    gate, queries_, scale_, keys_, values_, *stored = of_output
    assert all(np.abs(leaf[0]).min() > 0 for leaf in (gate[None], scale_[None], np.abs(queries_).sum(axis=-1)))
    assert np.any(keys_) and np.any(values_), "through the local attention"
    assert not any(np.any(leaf) for leaf in stored)
    assert not any(np.any(leaf) for leaf in of_stored)
    # With the memory alone nothing is left for the segment's own keys and values.
    _, queries_, scale_, keys_, values_, *stored = gradients(jnp.full(N, ONLY_MEMORY))[0]
    assert np.any(queries_) and np.any(scale_)
    assert not any(np.any(leaf) for leaf in (keys_, values_, *stored))


def test_no_gradient_goes_through_the_choice_of_neighbours():
    """The gradient is that of attention to the retrieved, as if their set were given."""
    rng = np.random.default_rng(0)
    queries, memory, k = random_queries(rng), random_memory(rng), 4
    scores = jnp.einsum("BTNH,BNMH->BNTM", queries, memory.keys)
    chosen = jax.lax.top_k(jnp.where(memory.valid[:, None, None], scores, -jnp.inf), k)[1]

    def attend_to_chosen(queries: jax.Array, scale: jax.Array) -> jax.Array:
        keys, values = (
            jnp.take_along_axis(array[:, :, None], chosen[..., None], axis=3) for array in (memory.keys, memory.values)
        )
        weights = jax.nn.softmax(scale[None, :, None, None] * jnp.einsum("BTNH,BNTKH->BNTK", queries, keys), axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("BNTK,BNTKH->BTNH", weights, values))[0])

    expected = jax.grad(attend_to_chosen, argnums=(0, 1))(queries, SCALE)
    only_row_0 = memory.replace(valid=memory.valid & (jnp.arange(B) == 0)[:, None])
    for actual, wanted in zip(read_gradient(queries, SCALE, only_row_0, k=k), expected, strict=False):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=5e-6)


# The whole model.


def test_a_larger_memory_is_the_same_until_the_smaller_one_forgets():
    """Off by one segment, a leak or a wrong slot would show before or after that point."""
    rng, length, segments = np.random.default_rng(0), T, 7
    tokens = rng.integers(1, 32, (segments, B, length), np.int32)

    def logits(memory_size: int) -> np.ndarray:
        attention = KNNAttention(memory_size=memory_size, num_neighbors=6 * length)
        config = LMConfig(32, 2, 16, 2, 8, 32, attention_at=((1, attention),), initial_logit_scale=4.0)
        params = jax.jit(lambda: init_params(config, B, length, jax.random.key(0)))()
        real, no_start = jnp.ones((B, length), bool), jnp.zeros(B, bool)

        def step(context, tokens):
            output = apply_model(config, params, tokens, real, no_start, context)
            return output.context, output.logits

        return jax.jit(lambda: jax.lax.scan(step, config.init_context(B, length), tokens)[1])()

    small, large = logits(2 * length), logits(4 * length)
    # Before segment j a memory of M has seen j segments and holds the last M / T of them.
    np.testing.assert_allclose(small[:3], large[:3], rtol=0, atol=1e-6)
    assert (np.abs(small[3:] - large[3:]).max(axis=(1, 2, 3)) > 1e-3).all()


def test_forgetting_empties_the_memory_and_keeps_the_cache():
    """The comparison 'with the memory cleared' is about the memory: what the local attention carries stays."""
    local = XLAttention(window=T)
    core = Core(KNNAttention(memory_size=M, num_neighbors=4, local=local))
    params, (*inputs, state) = core.params(), core.inputs()
    _, state = core(params, *inputs, state)
    forgotten = core.config.map_memory(state, external_memory.cleared)
    prepared = core.config.prepare_state(forgotten, jnp.asarray(3))
    assert not prepared.memory.valid.any()
    assert forgotten.local is state.local


def test_permuted_memories_hold_the_same_values_under_other_keys():
    valid = np.arange(12) % 3 > 0
    values = np.where(valid[:, None], np.arange(12.0)[:, None], np.nan)
    content = jnp.asarray(np.broadcast_to(values, (2, 3, 12, 1)))
    tokens = jnp.asarray([np.arange(12)] * 2, jnp.int32)
    memory = Memory(content, content, tokens, jnp.asarray([valid] * 2))
    state = MemoryState(local=(), memory=memory, last_segment=memory)
    permuted = KNNAttention().map_memory(state, external_memory.permuted)
    for part in (permuted.memory, permuted.last_segment):
        np.testing.assert_array_equal(part.keys, memory.keys)
        found = np.asarray(part.values)[:, :, valid]
        # No value of an empty slot, none lost, and most of them elsewhere.
        np.testing.assert_array_equal(np.sort(found, axis=2), np.asarray(memory.values)[:, :, valid])
        assert (found != np.asarray(memory.values)[:, :, valid]).mean() > 0.5
