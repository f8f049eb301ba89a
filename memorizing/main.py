"""The command line. Each command imports what it needs when it runs, so that `--help` is instant and training never sees TensorFlow."""

from __future__ import annotations

import argparse
import importlib
import sys

from memorizing import __version__
from memorizing.errors import UserError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_START_AGAIN = 42

DEFAULT_RUN = "runs/demo.gin"

DESCRIPTION = """\
Language models that remember: training with external memories in JAX.

  memorizing train                                   a small model on the standard library of this Python, minutes on a laptop
  memorizing train --gin_file=runs/NAME.gin          a shipped or your own experiment
  memorizing train --gin.LMConfig.num_layers=6       ... with one thing changed
  memorizing plan --flops --gin_file=NAME            what a forward pass costs, against the length of the input
  memorizing prepare --help                          make a token cache from a corpus
"""

TRAIN_DESCRIPTION = """\
Trains a model and evaluates it on held-out documents. Run again with the same --workdir, it goes on from the newest checkpoint.

Everything is configured by gin files and bindings:
  --gin_file=FILE        a path, or the name of a shipped file (repeatable; default {default})
  --gin.NAME=VALUE       one binding, e.g. --gin.LoopConfig.num_steps=200 --gin.KNNAttention.memory_size=4096
                         --gin.LMConfig.dtype=bfloat16 --gin.LMConfig.attention_at='()'   (the same model without memory)

shipped runs:
{runs}
exit codes: 0 done, 42 stopped and saved (start it again), 1 the run failed, 2 something given is wrong
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    # argparse cannot know the names after `--gin.`: they are taken out first.
    bindings = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
    rest = [argument for argument in arguments if not argument.startswith("--gin.")]
    try:
        options = _parser(rest).parse_args(rest)
        return options.run(options, bindings)
    except UserError as error:
        print(f"memorizing: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("memorizing", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"memorizing {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train", help="train and evaluate a model", description=_train_description(arguments), formatter_class=raw
    )
    train.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="experiment; repeatable, later files win"
    )
    train.add_argument(
        "--workdir", metavar="DIR", help="folder of the run (default: runs/NAME of the gin file, in the current folder)"
    )
    train.add_argument(
        "--restore_step", type=int, metavar="STEP", help="go on from this checkpoint and drop the later ones"
    )
    train.set_defaults(run=_train)
    plan = commands.add_parser("plan", help="what a run will cost", formatter_class=raw)
    if arguments[:1] == ["plan"]:
        planning = importlib.import_module("memorizing.plan")
        planning.add_arguments(plan)
        plan.set_defaults(run=planning.run)
    prepare = commands.add_parser("prepare", help="make a token cache from a corpus", formatter_class=raw)
    if arguments[:1] == ["prepare"]:
        # Only now: the data side is not part of the core, and not needed for any other command.
        data = importlib.import_module("memorizing.data.prepare")
        data.add_arguments(prepare)
        prepare.set_defaults(run=lambda options, bindings: data.run(options))
    return parser


def _train_description(arguments: list[str]) -> str:
    if arguments[:1] != ["train"] or not {"-h", "--help"} & set(arguments):
        return ""
    from memorizing.gin_registry import shipped_files

    runs = "".join(f"  {name}\n" for name in shipped_files() if name.startswith("runs/"))
    return TRAIN_DESCRIPTION.format(default=DEFAULT_RUN, runs=runs)


def _train(options: argparse.Namespace, bindings: list[str]) -> int:
    from memorizing.gin_registry import find_file, load_experiment
    from memorizing.sharding import use_cpu_cores
    from memorizing.train import NonFiniteLoss, Preempted, train

    gin_files = options.gin_file or [DEFAULT_RUN]
    experiment, text = load_experiment(gin_files, bindings)
    sys.unraisablehook = _unless_loop_is_closed
    use_cpu_cores(experiment.batch.num_rows // experiment.batch.num_microbatches)
    path = options.workdir or f"runs/{find_file(gin_files[-1]).stem}"
    try:
        train(experiment, path, text, options.restore_step)
    except Preempted as stopped:
        print(f"memorizing: {stopped}", flush=True)
        return EXIT_START_AGAIN
    except NonFiniteLoss as failure:
        print(f"memorizing: {failure}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _unless_loop_is_closed(unraisable: sys.UnraisableHookArgs) -> None:
    """Leaves out what threads of the checkpoint library say after a read that failed: the user is told of the failure itself."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
