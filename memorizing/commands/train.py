"""The command `train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from memorizing.commands import experiment_flags
from memorizing.config.files import find_file
from memorizing.config.loading import load_experiment
from memorizing.errors import EXIT_FAILED, EXIT_START_AGAIN, UserError
from memorizing.evaluation import baselines
from memorizing.evaluation.train_and_evaluate import train_and_evaluate
from memorizing.runtime import distributed
from memorizing.runtime.failures import MachineFailed, end_together
from memorizing.training.loop import NonFiniteLoss, Preempted

DEFAULT_RUN = "runs/demo.gin"

DESCRIPTION = """\
Trains a model and evaluates it on held-out documents. Run again with the same --workdir, it goes on from the newest checkpoint.

Everything is configured by gin files and bindings:
  --gin_file=FILE        a path, or the name of a shipped file (repeatable; default {default})
  --gin.NAME=VALUE       one binding, e.g. --gin.LoopConfig.num_steps=200 --gin.KNNAttention.memory_size=4096
                         --gin.LMConfig.dtype=bfloat16 --gin.LMConfig.attention_at='()'   (the same model without memory)

Shipped runs, among others (memorizing gin lists all of them, memorizing gin NAME shows one):
  demo                                   this one: minutes on a laptop
  smoke                                  the whole loop in seconds, on made-up documents
  dictionary_near, dictionary            look-ups in a dictionary
  rmt_curriculum                         a Recurrent Memory Transformer on facts in noise
  table4_..., table5_..., add_memory_1b  the runs of the Memorizing Transformers paper

On several hosts the same command runs once on each; memorizing/runtime/distributed.py lists the environment variables that bring the processes together.

exit codes: 0 done; 42 stopped and saved, or a process, device or connection was lost: start it again; 1 the run failed; 2 something given is wrong
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION.format(default=DEFAULT_RUN)
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the run (default: runs/NAME of the gin file, in the current folder)"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="then train the same model without its memory, in WORKDIR/without_memory, and say what the memory is worth",
    )
    parser.add_argument(
        "--restore_step",
        type=experiment_flags.STEP.of(int),
        metavar="STEP",
        help="go on from this checkpoint and drop the later ones",
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return end_together(lambda: _run(options, bindings))


def _run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    gin_files = options.gin_file or [DEFAULT_RUN]
    experiment, text = load_experiment(gin_files, bindings)
    if options.compare and not experiment.model.has_memory:
        raise UserError("--compare: the model has no external memory that it could be trained without")
    experiment_flags.use_devices(experiment.batch.num_rows // experiment.batch.num_microbatches)
    path = options.workdir or f"runs/{find_file(gin_files[-1]).stem}"
    try:
        trained = train_and_evaluate(experiment, path, text, options.restore_step)
        if options.compare:
            without, text = load_experiment(gin_files, [*bindings, baselines.WITHOUT_MEMORY])
            distributed.say("\nthe same without a memory:")
            distributed.say(baselines.worth(trained, train_and_evaluate(without, f"{path}/without_memory", text)))
    except Preempted as stopped:
        distributed.say(f"memorizing: {stopped}")
        return EXIT_START_AGAIN
    except (NonFiniteLoss, MachineFailed) as failure:
        print(f"memorizing: {failure}", file=sys.stderr)
        return EXIT_FAILED
    return 0
