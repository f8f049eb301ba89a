"""Several processes as one run: how they find each other, wait for each other, and which of them prints and writes.

The environment says who takes part, the same way under every launcher:

  MEMORIZING_COORDINATOR        host:port at which process 0 listens
  MEMORIZING_NUM_PROCESSES      how many processes there are
  MEMORIZING_PROCESS_ID         which one this is, from 0
  MEMORIZING_DISTRIBUTED=1      instead of these three: the platform knows them (TPU pods, Slurm, Open MPI)
  MEMORIZING_CPU_DEVICES        devices that each process makes of its CPU
  MEMORIZING_HEARTBEAT_SECONDS  seconds of silence after which a process is taken for dead (default 60)

If none of them is set, the process is alone.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from memorizing.errors import UserError

COORDINATOR = "MEMORIZING_COORDINATOR"
NUM_PROCESSES = "MEMORIZING_NUM_PROCESSES"
PROCESS_ID = "MEMORIZING_PROCESS_ID"
DISTRIBUTED = "MEMORIZING_DISTRIBUTED"
CPU_DEVICES = "MEMORIZING_CPU_DEVICES"
HEARTBEAT_SECONDS = "MEMORIZING_HEARTBEAT_SECONDS"

# How long a process waits for the others to end well.
_SHUTDOWN_SECONDS = 120
# How long a process waits for the others to reach a place where all meet: one of them may be making a token cache.
_MEETING_MILLISECONDS = 24 * 3600 * 1000

_POSTS = "memorizing/posts/"

_meetings = itertools.count()

T = TypeVar("T")


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Makes the devices and joins the other processes that the environment names.

    Has to be called before JAX is first asked for devices.

    Raises:
      UserError: a variable is missing or wrong; the message names it.
      jax.errors.JaxRuntimeError: the others were not there in time.
    """
    if CPU_DEVICES in environment:
        jax.config.update("jax_num_cpu_devices", _number(environment, CPU_DEVICES, 1))
    arguments: dict[str, Any] = {}
    address = environment.get(COORDINATOR)
    if address:
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"{COORDINATOR}={address}: expected the host and port of process 0, such as 10.0.0.2:8476")
        count = _number(environment, NUM_PROCESSES, 1)
        index = _number(environment, PROCESS_ID, 0)
        if index >= count:
            raise UserError(f"{PROCESS_ID}={index}: of {NUM_PROCESSES}={count} processes the last is {count - 1}")
        arguments = {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            # Otherwise JAX would ask the platform for what is not set.
            "cluster_detection_method": "deactivate",
        }
    elif environment.get(DISTRIBUTED, "0") in ("", "0"):
        return
    # Its handler would take SIGTERM away from `stopping`, and the checkpoint library would ask it at steps of its own.
    jax.config.update("jax_enable_preemption_service", False)
    with_default = {HEARTBEAT_SECONDS: "60", **environment}
    jax.distributed.initialize(
        heartbeat_timeout_seconds=_number(with_default, HEARTBEAT_SECONDS, 1),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        **arguments,
    )


def shutdown() -> None:
    """Leaves the other processes once all of them are done. Does nothing if the process is alone."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_primary() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return process_id() == 0


def process_id() -> int:
    """Which of the processes this is. Unlike `jax.process_index` it needs no devices."""
    return _state().process_id


def num_processes() -> int:
    """How many processes there are. Unlike `jax.process_count` it needs no devices."""
    return _state().num_processes


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_primary():
        print(text, flush=True)


def from_primary(value: bool) -> bool:
    """The first process's value, in all processes."""
    if num_processes() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def meet() -> None:
    """Waits until all processes are here. All have to call it the same number of times."""
    if num_processes() > 1:
        _client().wait_at_barrier(f"memorizing/meeting/{next(_meetings)}", _MEETING_MILLISECONDS)


def primary_first(make: Callable[[], T]) -> T:
    """Calls `make` in every process, in the first process before the others, and returns its result.

    So the others find what the first process has written to the disk.
    """
    if not is_primary():
        meet()
        return make()
    made = make()
    meet()
    return made


def post(name: str, text: str) -> None:
    """Leaves a text under a name, for all processes to read. Does nothing if the process is alone."""
    if jax.distributed.is_initialized():
        _client().key_value_set(f"{_POSTS}{name}", text, allow_overwrite=True)


def posted(prefix: str) -> dict[str, str]:
    """What processes have posted under names that begin with `prefix` and a slash, by the rest of the name.

    Empty where the coordinator cannot be reached.
    """
    if not jax.distributed.is_initialized():
        return {}
    folder = f"{_POSTS}{prefix}/"
    try:
        found = _client().key_value_dir_get(folder)
    except jax.errors.JaxRuntimeError:
        return {}
    return {name.removeprefix(folder): text for name, text in found}


def _state() -> Any:
    # JAX has no public name for its key-value store.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client


def _number(environment: Mapping[str, str], name: str, smallest: int) -> int:
    """The value of a variable. Raises UserError unless it is a whole number of at least `smallest`."""
    text = environment.get(name, "")
    if not re.fullmatch(r"\d+", text) or int(text) < smallest:
        given = f"{name}={text}" if text else f"{name} is not set"
        raise UserError(f"{given}: expected a whole number, at least {smallest}")
    return int(text)
