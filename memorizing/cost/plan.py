"""What a training step will need on TPUs: the real step, compiled by the real TPU compiler, on a machine without TPUs.

It takes libtpu, the extra `tpu`. Memory is the compiler's own account. Times are estimates: see `pricing`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memorizing.array_typing import Tree
from memorizing.batch import Batch
from memorizing.cost import compiled_cost, pricing
from memorizing.cost.accelerators import Accelerator, accelerator, training_flops
from memorizing.cost.compiled_cost import Traffic
from memorizing.errors import UserError
from memorizing.models.attention.base import matmul_flops
from memorizing.models.lm_config import LMConfig
from memorizing.training.experiment import Experiment
from memorizing.training.program import Program
from memorizing.training.state import TrainState

# The scope of the external memory in a program.
_MEMORY = "external_memory"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a slice of TPUs.

    Attributes:
      topology, num_slices: as given.
      device_kind, num_devices: what JAX sees; on v3 a device is a core.
      num_rows, tokens_per_step: of the whole step.
      rows_per_device: which devices that share a layer or a memory have in common.
      compile_seconds: on this machine.
      hbm: bytes on one device by kind.
      hbm_total, hbm_limit: the compiler's account of all of it, and what a device has.
      model_flops, memory_flops: of a step, without what is recomputed; the second is what the external memory adds.
      seconds, memory_seconds: estimates for the step, and for what the external memory takes of it.
      moving_seconds: what `moves` take of `seconds`, at the bandwidth of the device's memory.
      rare_seconds: what comes on top where the memories of all heads hold many slots that are equally good.
      collectives, moves: by kind, for one device and step; collectives are not in `seconds`. Moves are gathers,
        scatters and sorts, and what the compiler cannot tell.
      advice: what to change where the step does not fit.
    """

    topology: str
    num_slices: int
    device_kind: str
    num_devices: int
    num_rows: int
    tokens_per_step: int
    rows_per_device: int
    compile_seconds: float
    hbm: dict[str, int]
    hbm_total: int
    hbm_limit: int
    model_flops: float
    memory_flops: float
    seconds: float
    memory_seconds: float
    moving_seconds: float
    rare_seconds: float
    collectives: dict[str, Traffic]
    moves: dict[str, Traffic]
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.hbm_total <= self.hbm_limit

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, an estimate: FLOPs without those of the memory, over the time of the whole step."""
        chip = chip_of(self.topology, self.device_kind)
        peak = chip.peak_flops / chip.devices_per_chip * self.num_devices
        return self.model_flops / (self.seconds * peak)


class DoesNotFit(UserError):
    """The compiler found no program that a device has room for."""

    def __init__(self, topology: str, reason: str, advice: list[str]):
        # The error begins with its status.
        _, _, message = reason.splitlines()[0].partition(": ")
        lines = [f"the step does not fit {topology}: {message}"]
        if advice:
            lines += ["what would help, the largest gain first:", *advice]
        super().__init__("\n  ".join(lines))


def plan(experiment: Experiment, topology: str, num_slices: int = 1) -> Plan:
    """Compiles the training step of an experiment for a slice of TPUs.

    Args:
      experiment: what to train. Its data is not opened.
      topology: generation and shape of the slice as the compiler calls it, such as 'v3:4x4' or 'v5e:4x8'.
      num_slices: equal slices, joined by the data center's network.

    Raises:
      UserError: libtpu is missing, there is no such topology, or the experiment does not suit its devices.
      DoesNotFit: the step needs so much more memory than a device has that the compiler gives no program. With a
        little more it does, and the plan says so.
    """
    devices = slice_devices(topology, num_slices)
    device_kind = devices[0].device_kind
    chip = chip_of(topology, device_kind)
    mesh = experiment.make_mesh(devices)
    batch = experiment.batch
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        # [B, U, T]
        shape = (batch.num_rows, batch.num_segments, batch.segment_length)
        abstract_batch = _abstract_batch(program, shape)
        start = time.perf_counter()
        lowered = program.step.lower(program.abstract_state, abstract_batch)
    arguments = _arguments(experiment, program.abstract_state, abstract_batch)
    try:
        compiled = lowered.compile(pricing.COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        # At least a device full of temporaries.
        advice = _advice(experiment, devices, arguments | {"temporaries": chip.hbm_bytes})
        raise DoesNotFit(topology, str(error), advice) from error
    compile_seconds = time.perf_counter() - start
    hbm, total = _hbm(arguments, compiled.memory_analysis())
    tokens_per_step = batch.tokens_at(1)
    model_flops, memory_flops = training_flops(experiment.model, batch.segment_length)
    model_flops *= tokens_per_step
    memory_flops *= tokens_per_step
    step = pricing.read(compiled)
    product = 0.0
    if step.has_unpriced_product:
        product = _product_seconds(experiment, program.abstract_state, memory_flops / len(devices), devices[0], chip)
    of_memory = [instruction for instruction in step.usual if _MEMORY in instruction.op_name]
    return Plan(
        topology=topology,
        num_slices=num_slices,
        device_kind=device_kind,
        num_devices=len(devices),
        num_rows=batch.num_rows,
        tokens_per_step=tokens_per_step,
        rows_per_device=batch.num_rows // mesh.shape["data"],
        compile_seconds=compile_seconds,
        hbm=hbm,
        hbm_total=total,
        hbm_limit=chip.hbm_bytes,
        model_flops=model_flops,
        memory_flops=memory_flops,
        seconds=pricing.seconds(step.usual, chip) + product,
        memory_seconds=pricing.seconds(of_memory, chip) + product,
        moving_seconds=pricing.moving_seconds(step.usual, chip),
        rare_seconds=pricing.seconds(step.rare, chip),
        collectives=compiled_cost.collectives(step.usual),
        moves=compiled_cost.moves(step.usual),
        advice=_advice(experiment, devices, hbm) if total > chip.hbm_bytes else [],
    )


def slice_devices(topology: str, num_slices: int) -> list[Any]:
    """The devices of a slice that need not exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a slice of TPUs needs the TPU compiler: pip install 'memorizing[tpu]'")
    # Otherwise the library asks the machine what TPU it is, and says at length that it is none.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v3-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    os.environ |= {name: value for name, value in quiet.items() if name not in os.environ}
    from jax.experimental import topologies

    options: dict[str, Any] = {} if num_slices == 1 else {"num_slices": num_slices}
    if topology.startswith("v4"):
        # As on a real v4, where the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    try:
        with _stderr_to_nowhere():
            devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # What the compiler raises depends on what is wrong.
        reason = str(error).splitlines()[0]
        if "lockfile" in reason:
            raise UserError(
                "another process uses the TPU compiler, or one that was killed has left its lock: wait for it, or "
                f"delete the file that is named here ({reason})"
            ) from None
        raise UserError(
            f"topology {topology!r}: {reason}; expected a generation and the shape of a slice, "
            "such as v3:4x4, v4:2x2x4, v5e:4x8, v5p:2x2x4 or v6e:4x8"
        ) from error
    return list(devices)


def chip_of(topology: str, device_kind: str) -> Accelerator:
    """The chip of a slice. Raises UserError if its clock and memory are not known."""
    chip = accelerator(device_kind)
    if chip is None or not chip.clock:
        raise UserError(f"topology {topology!r}: clock and memory of {device_kind} are not known here")
    return chip


@contextlib.contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """Silences what a library writes to the file descriptor."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _abstract_batch(program: Program, shape: tuple[int, int, int]) -> Batch:
    """Shapes, dtypes and shardings of a batch [B, U, T]."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=program.rows)

    return Batch(
        tokens=array(shape, jnp.int32),
        targets=array(shape, jnp.int32),
        loss_weights=array(shape, jnp.float32),
        is_real=array(shape, jnp.bool_),
        start_of_document=array(shape[:2], jnp.bool_),
    )


def _product_seconds(experiment: Experiment, state: TrainState, flops: float, device: Any, chip: Accelerator) -> float:
    """Seconds of so many FLOPs of a search's matrix products, by those of one head of the largest memory."""
    memories = jax.tree.leaves(experiment.model.memories(state.context))
    largest = max(memories, key=lambda leaf: leaf.size)
    *_, num_slots, width = largest.sharding.shard_shape(largest.shape)
    num_queries = experiment.batch.segment_length
    of_head = pricing.product_seconds(num_queries, num_slots, width, largest.dtype, device, chip)
    return of_head * flops / matmul_flops(num_queries, num_slots, width)


def _arguments(experiment: Experiment, state: TrainState, batch: Batch) -> dict[str, int]:
    """Bytes of a step's arguments on one device by kind, as their shapes say."""
    memory = _device_bytes(experiment.model.memories(state.context))
    return {
        "parameters": _device_bytes((state.params, state.buffers)),
        "optimizer": _device_bytes(state.opt_state),
        "external memory": memory,
        "caches and other context": _device_bytes(state.context) - memory,
        "batch": _device_bytes(batch),
    }


def _hbm(arguments: dict[str, int], memory: Any) -> tuple[dict[str, int], int]:
    """Bytes on one device by kind, and all of them by the compiler's account.

    Results lie where donated arguments were, and do not count again.
    """
    kinds = arguments | {
        "padding of these": max(memory.argument_size_in_bytes - sum(arguments.values()), 0),
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + results + kinds["temporaries"] + kinds["program"]
    return kinds, total


def _device_bytes(tree: Tree) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf.dtype.itemsize * math.prod(shape)
    return total


class _Change(NamedTuple):
    """A change of an experiment that would save memory.

    Attributes:
      advice: what to tell the user.
      make: makes the changed experiment; it may raise UserError.
      gain: a guess at the bytes that the change saves on a device.
    """

    advice: str
    make: Callable[[], Experiment]
    gain: int


def _advice(experiment: Experiment, devices: list[Any], hbm: dict[str, int]) -> list[str]:
    """What to change, the largest gain first; nothing that the experiment has already or that it would refuse."""
    model = experiment.model
    weights = hbm["parameters"] + hbm["optimizer"]
    memory = hbm["external memory"]
    temporaries = hbm["temporaries"]
    fewer_tokens = experiment.batch.tokens_per_step // 2
    half_the_slots = model.memory_size // 2
    more_microbatches = 2 * experiment.batch.num_microbatches

    def changed(part: str, **settings: Any) -> Callable[[], Experiment]:
        """The experiment with other settings of one of its parts."""
        return lambda: dataclasses.replace(
            experiment, **{part: dataclasses.replace(getattr(experiment, part), **settings)}
        )

    changes = [
        _Change(
            "--gin_file=meshes/fsdp after the run's own: share the parameters and the optimizer over the devices",
            changed("mesh", parameters="fsdp"),
            weights,
        ),
        _Change(
            "--gin.LMConfig.dtype=bfloat16: half the memory and the activations",
            changed("model", dtype="bfloat16"),
            (memory + temporaries) // 2,
        ),
        _Change(
            f"--gin.BatchConfig.tokens_per_step={fewer_tokens}: half the rows, or a larger slice",
            changed("batch", tokens_per_step=fewer_tokens),
            (memory + temporaries) // 3,
        ),
    ]
    if model.residuals == "plain":
        changes.append(
            _Change(
                "--gin.LMConfig.remat=layer: compute the activations again for the gradient",
                changed("model", remat="layer"),
                temporaries // 2,
            )
        )
    if model.has_memory:
        changes.append(
            _Change(
                f"--gin.{_memory_name(model)}.memory_size={half_the_slots}: half the slots",
                lambda: dataclasses.replace(experiment, model=model.with_memory_size(half_the_slots)),
                memory // 2,
            )
        )
    else:
        # The rows of a microbatch are copied out of the context and back: of a memory that would be gigabytes.
        changes.append(
            _Change(
                f"--gin.BatchConfig.num_microbatches={more_microbatches}: half the rows at a time",
                changed("batch", num_microbatches=more_microbatches),
                temporaries // 3,
            )
        )
    possible = [change for change in changes if _is_new(change, experiment, devices)]
    possible.sort(key=lambda change: change.gain, reverse=True)
    return [change.advice for change in possible]


def _memory_name(model: LMConfig) -> str:
    """What gin calls the mechanism that has the memory."""
    names = (type(group.attention).__name__ for group in model.groups if group.attention.memory_size)
    return next(names, "ContinuousCache")


def _is_new(change: _Change, experiment: Experiment, devices: list[Any]) -> bool:
    """Whether a change is possible and makes a difference."""
    try:
        changed = change.make()
        changed.make_mesh(devices)
    except UserError:
        return False
    return changed != experiment
