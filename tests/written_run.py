"""The folder of a run as `train` leaves it, written by the library's own writers and without a step of training."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from etils import epath

from memorizing.runtime.events import EventLog
from memorizing.runtime.metrics import MetricWriter
from memorizing.runtime.workdir import CHECKPOINTS, EVENTS, EXPERIMENT, checkpoint_record, write_config, write_record

CONFIG = """\
import memorizing.data.gin_registry

# Macros:
# ==============================================================================
SIZE = {size}
STEPS = 40

# Parameters for KNNAttention:
# ==============================================================================
KNNAttention.memory_size = %SIZE

# Parameters for LoopConfig:
# ==============================================================================
LoopConfig.num_steps = %STEPS
LoopConfig.profile_steps = \\
    (3,
     4)
"""
HEADS = 2


def write(folder: pathlib.Path | epath.Path, size: int = 2048, steps: int = 40, end: str = "end") -> epath.Path:
    """A run of one memory of two heads.

    Args:
      folder: of the run; made here.
      size: of its memory.
      steps: done, of 40; logged and saved every ten.
      end: the last event; empty if it was killed.
    """
    workdir = epath.Path(folder)
    workdir.mkdir(parents=True)
    write_config(workdir, CONFIG.format(size=size))
    write_record(workdir / EXPERIMENT, {"data": "text-1234", "LMConfig.embed_dim": 64, "KNN.memory_size": size})
    events = EventLog(workdir / EVENTS)
    events.write("start", version="0", processes=1, devices=1, device_kind="cpu")
    events.write("compile", step=1, count=1, tokens=64, seconds=3.0)
    writer = MetricWriter(workdir, 0)
    writer.write(1, "train", metrics(1) | {"tokens_per_second": 1.0, "step_seconds": 9.0})
    for step in range(10, steps + 1, 10):
        writer.write(step, "train", metrics(step))
        events.write("steps", step=step, count=10, tokens=640, seconds=5.0)
        write_checkpoint(workdir, step)
    writer.write(steps, "evaluation", {"loss": 2.5, "perplexity": 12.18, "tokens": 300.0, "bits_per_byte": 1.5})
    writer.close()
    (workdir / "evaluation.json").write_text(json.dumps(evaluations(steps)))
    if end:
        events.write(end, step=steps, **({"reason": "ValueError: <b>broken</b>"} if end == "failure" else {}))
    return workdir


def write_checkpoint(workdir: epath.Path, step: int) -> None:
    """What a checkpoint says of itself."""
    path = checkpoint_record(workdir / CHECKPOINTS, step)
    path.parent.mkdir(parents=True)
    write_record(path, {"step": step, "rows": {}, "checksums": {}})
    # What counts in an object store.
    (workdir / CHECKPOINTS / str(step) / "commit_success.txt").write_text("complete")


def metrics(step: int) -> dict[str, float]:
    """Of a step of training."""
    values = {"loss": 8 / step**0.5, "gradient_norm": 1.0, "perplexity": 3.0, "learning_rate": 1e-3}
    values |= {"tokens_per_second": 1000.0 + step, "step_seconds": 0.5, "hbm_peak_gib": 1.5}
    for head in range(HEADS):
        values[f"layer_01/gate/{head}"] = 0.5 + step / 400 + head / 10
        values[f"layer_01/hit_share/{head}"] = 0.1 * (head + 1)
    return values | {"layer_01/memory_fill": min(step / 20, 1.0), "layer_01/hit_chance": 0.01}


def evaluations(step: int) -> dict[str, Any]:
    """What `train` writes of its evaluations at the end."""

    def of(loss: float) -> dict[str, Any]:
        places = [(0, loss + 1), (64, loss), (128, loss - 0.5)]
        bins = [{"from": at, "tokens": 100, "documents": 2, "loss": nats, "interval": None} for at, nats in places]
        return {"loss": loss, "perplexity": 2.718**loss, "bits_per_byte": loss / 2, "by_position": bins}

    documents = {"index": [0, 1], "key": ["a", "b"], "tokens": [200, 100], "bytes": [600, 300], "words": None}
    return {"step": step, "documents": documents, "as trained": of(2.5), "memory cleared": of(4.0)}
