"""Sharding must not change what is computed: every mesh, rule and saving of memory gives the run of one device.

Equal to rounding, on eight fake devices. The model has everything that is sharded in a way of its own: a Transformer-XL
cache in stacked layers, an external memory, rows that begin documents at different times and end them with padding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memorizing.batch import Batch
from memorizing.errors import UserError
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import sharding
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import Adafactor, AdamW, Cosine
from memorizing.training.program import Program
from memorizing.training.state import TrainState

ROWS, LENGTH, VOCAB, STEPS = 8, 4, 32, 7
XL = XLAttention(window=LENGTH)
MODEL = LMConfig(
    vocab_size=VOCAB,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    attention=XL,
    # One segment a shard where the memory is sharded into 4; the steps below fill it and wrap around.
    attention_at=((2, KNNAttention(memory_size=4 * LENGTH, num_neighbors=6, local=XL)),),
    initial_logit_scale=4.0,
)
EXPERIMENT = Experiment(
    data=RepeatedPassages(vocab_size=VOCAB),
    model=MODEL,
    batch=BatchConfig(tokens_per_step=ROWS * LENGTH, segment_length=LENGTH),
    optimizer=Adafactor(learning_rate=Cosine(peak=0.01, warmup_steps=1, decay_steps=100)),
)


def batches() -> list[Batch]:
    """Random documents; each row begins one at a time of its own and ends it with padding."""
    rng = np.random.default_rng(0)
    result = []
    for step in range(STEPS):
        tokens = rng.integers(1, VOCAB, (ROWS, 1, LENGTH), np.int32)
        targets = rng.integers(1, VOCAB, (ROWS, 1, LENGTH), np.int32)
        start = ((np.arange(ROWS) + step) % 4 == 0)[:, None]
        is_real = np.ones(targets.shape, bool)
        is_real[np.roll(start[:, 0], -1), :, LENGTH - 2 :] = False
        result.append(Batch(tokens, targets, is_real.astype(np.float32), is_real, start))
    return result


@pytest.fixture(scope="module")
def initial_state() -> TrainState:
    """On the host: every run starts from the same bits."""
    return jax.device_get(Program(EXPERIMENT, MeshConfig().make_mesh(jax.devices()[:1])).init())


def run(
    experiment: Experiment, num_devices: int, initial_state: TrainState
) -> tuple[TrainState, list[float], Program, dict[str, np.ndarray]]:
    """The state after all batches, the losses, the program, and what the last step tells of look-ups."""
    mesh = experiment.mesh.make_mesh(jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        place = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
        state, losses = jax.device_put(initial_state, place), []
        for batch in batches():
            state, metrics = program.step(state, jax.device_put(batch, program.rows))
            losses.append(float(metrics["loss"]))
    look_ups = {name: value for name, value in jax.device_get(metrics).items() if name.startswith("layer_02")}
    return jax.device_get(state), losses, program, look_ups


@pytest.fixture(scope="module")
def alone(initial_state: TrainState) -> tuple:
    return run(EXPERIMENT, 1, initial_state)


def changed(name: str, **fields: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **{name: dataclasses.replace(getattr(EXPERIMENT, name), **fields)})


@pytest.mark.parametrize(
    ("experiment", "num_devices"),
    [
        pytest.param(changed("mesh", data=8), 8, id="data 8"),
        pytest.param(changed("mesh", data=4, model=2), 8, id="data 4 x model 2"),
        pytest.param(changed("mesh", data=2, memory=4), 8, id="data 2 x memory 4"),
        pytest.param(changed("mesh", data=4, model=2, parameters="fsdp"), 8, id="fsdp 4 x model 2"),
        pytest.param(changed("mesh", data=4, model=2, optimizer="sharded"), 8, id="sharded optimizer, 4 x model 2"),
        pytest.param(changed("batch", num_microbatches=2), 2, id="2 microbatches on data 2"),
        pytest.param(changed("model", remat="layer"), 1, id="remat"),
    ],
)
def test_equals_the_run_of_one_device(
    experiment: Experiment, num_devices: int, initial_state: TrainState, alone: tuple
):
    state, losses, *_ = run(experiment, num_devices, initial_state)
    np.testing.assert_allclose(losses, alone[1], rtol=0, atol=1e-5)
    assert min(np.abs(np.diff(losses))) > 1e-3, "nothing was trained"
    actual, expected = paths(state), paths(alone[0])
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        # Seven updates, each some hundred roundings of 1e-7 away.
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-4, atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, memory=4), pytest.param(MeshConfig(data=4, model=2), marks=pytest.mark.nightly)]
)
def test_look_ups_are_taught_and_counted_alike_on_a_mesh(mesh: MeshConfig):
    """Every slot is a neighbour: which of two alike is the last one to be found would depend on rounding."""
    attention = KNNAttention(4 * LENGTH, 4 * LENGTH, XL, stored_value="next", retrieval_loss=0.1)
    experiment = changed("model", attention_at=((2, attention),))
    initial = jax.device_get(Program(experiment, MeshConfig().make_mesh(jax.devices()[:1])).init())
    state, losses, _, look_ups = run(experiment, 1, initial)
    assert look_ups["layer_02/retrieval_loss"] > 0 and "layer_02/hit_share" in look_ups
    on_mesh = dataclasses.replace(experiment, mesh=mesh)
    sharded, sharded_losses, _, sharded_look_ups = run(on_mesh, 8, initial)
    np.testing.assert_allclose(sharded_losses, losses, rtol=0, atol=1e-5)
    for name, value in look_ups.items():
        np.testing.assert_allclose(sharded_look_ups[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    for path, leaf in paths(state.context).items():
        np.testing.assert_allclose(paths(sharded.context)[path], leaf, rtol=1e-4, atol=2e-5, err_msg=path)


def test_several_segments_a_step_equal_as_many_forward_passes():
    """U segments in one step carry the context from each to the next as U steps do."""
    still = AdamW(learning_rate=Cosine(peak=0.0, final=0.0))
    one = dataclasses.replace(EXPERIMENT, optimizer=still)
    two = dataclasses.replace(one, batch=BatchConfig(2 * ROWS * LENGTH, LENGTH, num_segments=2))
    mesh, pair = MeshConfig().make_mesh(jax.devices()[:1]), batches()[:2]
    with jax.set_mesh(mesh):
        steps, together = Program(one, mesh), Program(two, mesh)
        state = steps.init()
        # A copy, since a step is given its state to overwrite.
        joined = Batch(*(np.concatenate(fields, axis=1) for fields in zip(*pair, strict=True)))
        other, metrics = together.step(jax.tree.map(jnp.copy, state), joined)
        losses, weights = [], []
        for batch in pair:
            state, step_metrics = steps.step(state, batch)
            losses.append(step_metrics["loss"])
            weights.append(step_metrics["loss_weight"])
    np.testing.assert_allclose(metrics["loss"], np.dot(losses, weights) / np.sum(weights), rtol=1e-5)
    for path, leaf in paths(state.context).items():
        np.testing.assert_allclose(paths(other.context)[path], leaf, rtol=0, atol=1e-5, err_msg=path)


def test_the_memory_is_never_gathered(initial_state: TrainState):
    """Shards exchange scores and sums: no collective moves as much as one device's share of the stored keys."""
    slots = 512
    attention = KNNAttention(memory_size=slots, num_neighbors=4, local=XL)
    model = dataclasses.replace(MODEL, attention_at=((2, attention),))
    experiment = dataclasses.replace(changed("mesh", data=2, memory=4), model=model)
    mesh = experiment.make_mesh()
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        abstract_batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=program.rows), batches()[0]
        )
        text = program.step.lower(program.abstract_state, abstract_batch).compile().as_text()
    local_keys = (ROWS // 2) * MODEL.num_heads * (slots // 4) * MODEL.head_dim
    collectives = re.findall(
        r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    moved = [
        math.prod(int(size) for size in dims.split(",") if size)
        for result, _ in collectives
        for dims in re.findall(r"\w+\[([\d,]*)\]", result)
    ]
    assert "all-gather" in {kind for _, kind in collectives}, "the test does not see the exchange of scores"
    assert max(moved) < local_keys


def test_optimizer_state_lies_where_its_parameters_lie():
    """FSDP saves nothing if the moments stay whole."""
    mesh = MeshConfig(data=4, model=2).make_mesh()
    experiment = dataclasses.replace(changed("mesh", data=4, model=2, parameters="fsdp"), optimizer=AdamW())
    abstract = Program(experiment, mesh).abstract_state
    params = paths(abstract.params)
    assert params["layers_00_01/mlp/up/kernel"].sharding.spec == P(None, "data", "model")
    moments = 0
    for path, leaf in paths(abstract.opt_state).items():
        # 1/layers_00_01/0/mu/mlp/up/kernel: in the chain, of this group, in the rule's own chain, the first moment,
        # of this parameter.
        if moment := re.fullmatch(r"\d+/(\w+)/\d+/(?:mu|nu)/(.+)", path):
            moments += 1
            assert leaf.sharding == params[f"{moment[1]}/{moment[2]}"].sharding, path
    assert moments == 2 * len(params), "the test does not see both moments"


@pytest.mark.parametrize("optimizer", [Adafactor(), AdamW()], ids=["Adafactor", "AdamW"])
@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_a_sharded_optimizer_holds_its_share(optimizer: Adafactor | AdamW, parameters: str):
    """ZeRO-1: whatever is as large as a parameter is held by each device of a row of the mesh in part."""
    mesh_config = changed("mesh", data=4, model=2, parameters=parameters, optimizer="sharded").mesh
    mesh = mesh_config.make_mesh()
    abstract = Program(dataclasses.replace(EXPERIMENT, optimizer=optimizer, mesh=mesh_config), mesh).abstract_state
    state = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in state)
    assert held < sum(leaf.size for leaf in state) / mesh.shape["data"]
    if parameters == "replicated":
        assert all("data" not in leaf.sharding.spec for leaf in jax.tree.leaves(abstract.params))


def test_a_dimension_that_is_shared_already_stays():
    mesh = MeshConfig(data=4, model=2).make_mesh()

    def over_data(*spec: str | None, shape: tuple[int, ...]) -> P:
        return sharding.over_data(jax.sharding.NamedSharding(mesh, P(*spec)), shape).spec

    assert over_data(shape=(8, 16)) == P(None, "data"), "the largest"
    assert over_data(None, "model", shape=(8, 16)) == P("data", "model")
    assert over_data("data", None, shape=(8, 16)) == P("data", None), "shared over data already"
    assert over_data(shape=(3, 6)) == P(), "nothing that 4 devices divide"
    assert over_data("model", shape=(8, 4, 6)) == P("model", "data", None)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=3), MeshConfig(model=16), MeshConfig(data=2, model=2), MeshConfig(data=0)]
)
def test_a_mesh_that_does_not_fill_the_devices_is_told(mesh: MeshConfig):
    with pytest.raises(UserError, match=r"MeshConfig.*8 devices"):
        mesh.make_mesh()


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (dataclasses.replace(changed("mesh", data=8), batch=BatchConfig(4 * LENGTH, LENGTH)), "rows"),
        (changed("mesh", data=2, model=4), "LMConfig.num_heads"),
        (changed("mesh", data=1, memory=8), "KNNAttention.memory_size"),
    ],
)
def test_an_experiment_that_does_not_fit_its_mesh_is_told(experiment: Experiment, message: str):
    with pytest.raises(UserError, match=message):
        experiment.make_mesh()


def test_two_dimensions_on_one_mesh_axis_are_a_bug():
    mesh = MeshConfig(data=4, model=2).make_mesh()
    with pytest.raises(ValueError, match="cannot shard two dimensions"):
        sharding.named_sharding(mesh, ("heads", "mlp"), (4, 4), sharding.REPLICATED_PARAMETERS)


@pytest.mark.parametrize("optimizer", [Adafactor(), AdamW()], ids=["Adafactor", "AdamW"])
def test_a_stack_is_updated_as_its_layers_would_be(optimizer: Adafactor | AdamW):
    """Which layers are scanned together matters for compile time only.

    Adafactor's factors, clipping and parameter scale must not depend on it.
    """
    rng = np.random.default_rng(0)

    def tree() -> list[dict]:
        # Layers of very different size, so that a scale taken over the stack would be another one.
        return [
            {"kernel": 10.0**layer * rng.normal(size=(130, 140)), "scale": rng.normal(size=7)} for layer in range(2)
        ]

    def stacked(layers: list[dict]) -> dict:
        return {
            "layers_00_01": jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(leaf) for leaf in leaves]), *layers)
        }

    def single(layers: list[dict]) -> dict:
        return {f"layer_{index:02d}": jax.tree.map(jnp.float32, layer) for index, layer in enumerate(layers)}

    rule, layers, gradients = optimizer.build({"layers_00_01"}), tree(), [tree() for _ in range(3)]
    results = []
    for arrange in (stacked, single):
        params = arrange(layers)
        state = rule.init(params)
        for gradient in gradients:
            updates, state = rule.update(arrange(gradient), state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    for index in range(2):
        for name, leaf in results[1][f"layer_{index:02d}"].items():
            np.testing.assert_allclose(
                results[0]["layers_00_01"][name][index], leaf, rtol=1e-5, err_msg=f"{index} {name}"
            )


# Rows of several processes.


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_the_rows_of_a_process_are_consecutive():
    """However the network orders the devices: on some TPU slices those of a process are far apart."""
    devices = [Device(index, process) for index, process in enumerate([0, 1, 0, 1, 2, 2, 3, 3])]
    mesh = MeshConfig().make_mesh(devices)
    assert [device.process_index for device in mesh.devices.flat] == [0, 0, 1, 1, 2, 2, 3, 3]
    # A shard of rows may lie on several processes; none is taken apart.
    mesh = MeshConfig(data=4, memory=2).make_mesh(devices)
    assert [[device.id for device in part.flat] for part in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, memory=4), MeshConfig(data=1, model=8)])
def test_placed_rows_are_the_rows(config: MeshConfig):
    placement = sharding.RowPlacement(config.make_mesh(), ROWS)
    assert placement.rows == range(ROWS), "one process has all"
    host = {"tokens": np.arange(ROWS * 3).reshape(ROWS, 3), "start": np.arange(ROWS) % 2 == 0}
    placed = placement.put(host)
    for name, array in host.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == placement.sharding
