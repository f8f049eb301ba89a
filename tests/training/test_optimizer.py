"""What AdamW's weight decay is for: matrices by their role, in every mechanism, whatever their rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from mechanisms import LENGTH, ROWS, Mechanism

from memorizing.training import optimizer
from memorizing.training.checkpoint import paths
from memorizing.training.optimizer import AdamW, Cosine
from memorizing.training.state import init_variables


def test_matrices_are_decayed_and_nothing_else(mechanism: Mechanism):
    shapes = jax.eval_shape(lambda: init_variables(mechanism.config, ROWS, LENGTH, jax.random.key(0)))["params"]
    # As the optimizer sees them, layer by layer.
    decayed = paths({layer: optimizer._is_decayed(shapes[layer]) for layer in shapes})
    # Learned positions are vectors of an embedding as well, however many axes they have.
    tables = ("embedder/table", "embedder/output_table", "positions/table")
    assert {path for path in decayed if decayed[path]} == {
        path for path in decayed if path.endswith("/kernel") or path.startswith(tables)
    }
    others = {path.split("/")[-1] for path in decayed if not decayed[path]}
    assert others >= {"scale"}, "the test has nothing to leave alone"


def test_without_a_gradient_an_update_is_the_decay():
    table = jnp.ones((2, 2))
    params = {
        "embedder": {"table": table},
        "layer_00": {"attention": {"bias": {"table": table}, "u": table}, "mlp": {"up": {"kernel": table}}},
    }
    still = jax.tree.map(jnp.zeros_like, params)
    rule = AdamW(Cosine(peak=0.5, warmup_steps=0, decay_steps=10), weight_decay=0.1).build()
    updates = paths(rule.update(still, rule.init(params), params)[0])
    assert {path for path, update in updates.items() if np.any(update)} == {"embedder/table", "layer_00/mlp/up/kernel"}
    assert np.all(updates["embedder/table"] < -0.04)


def test_learned_positions_are_decayed_whatever_their_axes():
    tables = {"table_0": jnp.ones((2, 2)), "table_1": jnp.ones((2, 2))}
    assert optimizer._is_decayed(tables) == {"table_0": True, "table_1": True}
    assert optimizer._is_decayed({"bias": tables}) == {"bias": {"table_0": False, "table_1": False}}
