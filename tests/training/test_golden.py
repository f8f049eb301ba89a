"""Four steps of a small model, number by number: any change of what training computes shows here.

Also where no promise is broken.
"""

from __future__ import annotations

import jax
import numpy as np

from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import Adafactor, InverseSquareRoot
from memorizing.training.program import Program

STEPS = 4
LOCAL = XLAttention(window=8)
EXPERIMENT = Experiment(
    data=RepeatedPassages(vocab_size=32, passage_length=12, num_passages=3),
    model=LMConfig(
        vocab_size=32,
        num_layers=3,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        attention=LOCAL,
        attention_at=((2, KNNAttention(memory_size=16, num_neighbors=4, local=LOCAL)),),
        initial_logit_scale=4.0,
    ),
    batch=BatchConfig(tokens_per_step=4 * 8, segment_length=8),
    optimizer=Adafactor(InverseSquareRoot(warmup_steps=10)),
)

GOLDEN = {
    "loss": [3.968166, 4.120839, 4.05961, 3.792789],
    "gradient_norm": [1.784829, 1.31879, 1.407375, 1.211569],
}

MESSAGE = """
The training step computes something else than it used to. If this commit was not meant to change the model, its initialisation, the optimizer, the order of the data or the
use of random keys, it has a bug: find out what changed before anything else. If it was, say so in the commit's message and update GOLDEN in tests/training/test_golden.py with
what `python tests/training/test_golden.py` prints from the repository's root.

first difference: {name} of step {step} was {expected:.6f} and is {actual:.6f}
"""


def metrics() -> dict[str, list[float]]:
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    rows = EXPERIMENT.batch.num_rows
    with jax.set_mesh(mesh):
        program = Program(EXPERIMENT, mesh)
        state, stream = program.init(), EXPERIMENT.data.train_batches(rows, range(rows), 1, 8, seed=0)
        values = {name: [] for name in GOLDEN}
        for _ in range(STEPS):
            state, step_metrics = program.step(state, next(stream))
            for name in GOLDEN:
                values[name].append(round(float(step_metrics[name]), 6))
    return values


def test_golden_metrics():
    actual = metrics()
    for step in range(STEPS):
        for name, expected in GOLDEN.items():
            # Rounding differs between processors by about 1e-6; a change of the computation by far more.
            if not np.isclose(actual[name][step], expected[step], rtol=2e-5):
                raise AssertionError(
                    MESSAGE.format(name=name, step=step + 1, expected=expected[step], actual=actual[name][step])
                )


if __name__ == "__main__":
    print("\n".join(f'    "{name}": {values},' for name, values in metrics().items()))
