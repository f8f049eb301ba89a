"""Goes on from a checkpoint for a few steps, without the other parts of a run.

A program of its own on several hosts, a function on one.
"""

from __future__ import annotations

import json
import sys

import jax

from memorizing.config.loading import load_experiment
from memorizing.runtime import distributed
from memorizing.runtime.workdir import resolve
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.program import Program


def run(workdir: str, first: int, last: int, flags: list[str]) -> dict:
    """Restores step `first`, saves step `last`; returns how many rows this process read and the losses in between."""
    experiment, _ = load_experiment(["smoke"], [flag.removeprefix("--gin.") for flag in flags])
    batch, mesh = experiment.batch, experiment.make_mesh()
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        checkpointer = Checkpointer(resolve(workdir))
        state, saved = checkpointer.restore(program.abstract_state, first)
        rows = program.placement.rows
        stream = experiment.data.train_batches(batch.num_rows, rows, 1, batch.segment_length, saved["seed"])
        stream.set_state(saved["stream"])
        losses = []
        for _ in range(first, last):
            state, metrics = program.step(state, program.placement.put(next(stream)))
            losses.append(float(metrics["loss"]))
        checkpointer.save(state, saved | {"stream": stream.get_state()})
        checkpointer.close()
    return {"rows": len(rows), "losses": losses}


if __name__ == "__main__":
    workdir, first, last, *flags = sys.argv[1:]
    distributed.initialize()
    distributed.say(json.dumps(run(workdir, int(first), int(last), flags)))
    distributed.shutdown()
