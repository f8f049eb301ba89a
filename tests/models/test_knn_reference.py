"""The kNN layer against its equations, written out once more in float64 with loops and no library of ours.

Forward, and every gradient by finite differences.

Wu et al. 2022, section 3, in numbers. For head n and query t, with unit queries and keys and the per-head scale s:

  local    softmax over visible j <= t of s (q_t . k_j + bias(distance)), times v_j; the Transformer-XL cache comes
  before the segment
  memory   softmax over the k slots with the greatest q_t . K_m of s (q_t . K_m), times V_m; no bias
  output   g * memory + (1 - g) * local, g = sigmoid(b), where the row's memory holds anything; else local
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.context import Layout, Segment
from memorizing.models.attention.base import LayerDims, normalize
from memorizing.models.attention.external import MemoryState
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention, XLState
from memorizing.models.memory.external_memory import Memory

B, T, D, N, H, M, K, W = 3, 4, 6, 2, 4, 12, 3, 6
BUCKETS, MAX_DISTANCE = 6, 8
DIMS = LayerDims(D, N, H, 8, 0.0, 1.0, jnp.dtype(jnp.float32))

Params = dict[str, np.ndarray]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum() + 1e-6)


def bucket(distance: int) -> int:
    """T5.

    Distances below BUCKETS / 2 have their own bucket, larger ones share logarithmic ones, from MAX_DISTANCE on the
    last.
    """
    exact = BUCKETS // 2
    if distance < exact:
        return distance
    return min(
        BUCKETS - 1, exact + int(math.log(distance / exact) / math.log(MAX_DISTANCE / exact) * (BUCKETS - exact))
    )


def attend(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum() @ values


class Reference:
    """The layer for one input and one carried state.

    The neighbours are found once, for the given parameters: the search has no gradient.
    """

    def __init__(self, x: np.ndarray, is_real: np.ndarray, state: MemoryState, params: Params) -> None:
        self.x, self.is_real = x, is_real
        memory = state.memory
        self.memory_keys, self.memory_values, self.valid = (
            np.asarray(array, dtype)
            for array, dtype in zip((memory.keys, memory.values, memory.valid), (float, float, bool), strict=True)
        )
        self.cache = state.local
        self.neighbours = {
            (b, n, t): self.nearest(b, n, unit(x[b, t] @ params["query"][:, n]))
            for b in range(B)
            for n in range(N)
            for t in range(T)
        }

    def nearest(self, b: int, n: int, query: np.ndarray) -> list[int]:
        slots = np.flatnonzero(self.valid[b])
        scores = self.memory_keys[b, n, slots] @ query
        order = np.argsort(-scores)
        if len(slots) > K:
            assert scores[order[K - 1]] - scores[order[K]] > 1e-5, (
                "the choice of neighbours hangs on rounding: take another seed"
            )
        return list(slots[order[:K]])

    def __call__(self, params: Params) -> np.ndarray:
        y = np.zeros((B, T, D))
        for b in range(B):
            for n in range(N):
                keys = [unit(self.x[b, t] @ params["key"][:, n]) for t in range(T)]
                values = [self.x[b, t] @ params["value"][:, n] for t in range(T)]
                for t in range(T):
                    query, scale = unit(self.x[b, t] @ params["query"][:, n]), abs(params["scale"][n])
                    head = self.local(b, n, t, query, keys, values, scale, params["bias"][n])
                    if self.valid[b].any():
                        slots = self.neighbours[b, n, t]
                        found = attend(scale * self.memory_keys[b, n, slots] @ query, self.memory_values[b, n, slots])
                        g = 1 / (1 + math.exp(-params["gate"][n]))
                        head = g * found + (1 - g) * head
                    y[b, t] += head @ params["output"][n]
        return y

    def local(self, b, n, t, query, keys, values, scale, bias) -> np.ndarray:
        # Every visible key with its distance back from the query.
        visible = [(t - j, keys[j], values[j]) for j in range(t + 1) if self.is_real[b, j] or j == t]
        if isinstance(self.cache, XLState):
            cached = zip(self.cache.keys[b, :, n], self.cache.values[b, :, n], self.cache.valid[b], strict=True)
            visible += [
                (t + W - w, np.asarray(key, float), np.asarray(value, float))
                for w, (key, value, valid) in enumerate(cached)
                if valid
            ]
        logits = [scale * (query @ key + bias[bucket(distance)]) for distance, key, _ in visible]
        return attend(np.array(logits), np.array([value for _, _, value in visible]))


def segment(is_real: np.ndarray) -> Segment:
    tokens = jnp.zeros(is_real.shape, jnp.int32)
    return Segment(jnp.asarray(is_real), Layout(T), tokens=tokens, clock=jnp.zeros((), jnp.int32))


LOCALS = {
    "full": FullAttention(num_buckets=BUCKETS, max_distance=MAX_DISTANCE),
    "xl": XLAttention(window=W, num_buckets=BUCKETS, max_distance=MAX_DISTANCE),
}


@pytest.fixture(params=LOCALS)
def case(request: pytest.FixtureRequest) -> tuple:
    """The layer, its parameters as numpy, its inputs.

    Row 0 has a full memory, row 1 two slots (fewer than k) and a padded end, row 2 has nothing yet.
    """
    rng = np.random.default_rng(3)
    attention = KNNAttention(memory_size=M, num_neighbors=K, local=LOCALS[request.param])

    def stored(slots: int, num_valid: tuple[int, int, int]) -> tuple:
        keys, values = rng.normal(size=(2, B, slots, N, H))
        valid = np.stack([rng.permutation(slots) < number for number in num_valid])
        return normalize(jnp.asarray(keys, jnp.float32)), jnp.asarray(values, jnp.float32), jnp.asarray(valid)

    keys, values, valid = stored(M, (M, 2, 0))
    memory = Memory(keys.swapaxes(1, 2), values.swapaxes(1, 2), jnp.zeros((B, M), jnp.int32), valid)
    state = attention.init_state(DIMS, B, T).replace(memory=memory)
    if request.param == "xl":
        state = state.replace(local=XLState(*stored(W, (W, 3, 0))))
    params = {
        "query": rng.normal(size=(D, N, H)),
        "key": rng.normal(size=(D, N, H)),
        "value": rng.normal(size=(D, N, H)),
        "output": rng.normal(size=(N, H, D)),
        # A negative scale counts by its size.
        "scale": np.array([2.5, -1.5]),
        "bias": rng.normal(size=(N, BUCKETS)),
        "gate": np.array([0.7, -0.4]),
    }
    x = rng.normal(size=(B, T, D))
    is_real = np.arange(T)[None, :] < np.array([T, 3, T])[:, None]
    return attention.layer(DIMS), params, x, is_real, state


def as_flax(params: Params) -> dict:
    kernels = {name: {"kernel": params[name]} for name in ("query", "key", "value", "output")}
    core = {"bias": {"table": params["bias"]}, "gate": params["gate"]}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), kernels | {"scale": params["scale"], "core": core})


def as_numpy(tree: dict) -> Params:
    """Inverse of `as_flax`."""
    kernels = {name: np.asarray(tree[name]["kernel"]) for name in ("query", "key", "value", "output")}
    core = {"bias": np.asarray(tree["core"]["bias"]["table"]), "gate": np.asarray(tree["core"]["gate"])}
    return kernels | core | {"scale": np.asarray(tree["scale"])}


def test_the_parameters_are_these_and_no_others(case: tuple):
    layer, params, x, is_real, state = case
    made = nn.unbox(layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), segment(is_real), state))
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, as_flax(params))


def test_forward(case: tuple):
    layer, params, x, is_real, state = case
    y, _, _ = layer.apply({"params": as_flax(params)}, jnp.asarray(x, jnp.float32), segment(is_real), state)
    np.testing.assert_allclose(y, Reference(x, is_real, state, params)(params), rtol=0, atol=1e-5)


def test_gradients(case: tuple):
    """Every single derivative of a scalar of the output, against central differences of the reference.

    Error O(step^2), about 1e-9 here.
    """
    layer, params, x, is_real, state = case
    weights = np.random.default_rng(4).normal(size=(B, T, D))

    def loss(params: dict) -> jax.Array:
        y, _, _ = layer.apply({"params": params}, jnp.asarray(x, jnp.float32), segment(is_real), state)
        return jnp.sum(y * jnp.asarray(weights, jnp.float32))

    gradient = as_numpy(jax.jit(jax.grad(loss))(as_flax(params)))
    reference, step = Reference(x, is_real, state, params), 1e-4
    for name, value in params.items():
        expected = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            up, down = ({**params, name: value.copy()} for _ in range(2))
            up[name][index] += step
            down[name][index] -= step
            expected[index] = np.sum((reference(up) - reference(down)) * weights) / (2 * step)
        assert np.abs(expected).max() > 0.1, name
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=3e-5, err_msg=name)
