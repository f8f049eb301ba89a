"""The command `lm-eval`: tasks of the LM Evaluation Harness on a finished run, long prompts read into its memory."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from memorizing.commands import experiment_flags
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range, UserError
from memorizing.generation.text_model import TextModel
from memorizing.runtime.json_lines import replace_text
from memorizing.runtime.workdir import resolve

DESCRIPTION = """\
Runs tasks of the LM Evaluation Harness on a trained model. A prompt of any length is read into its memory as a document of its own; nothing is cut off.

  memorizing lm-eval --workdir=DIR --tasks=lambada_openai
  memorizing lm-eval --workdir=DIR --tasks=mine --include_path=FOLDER_OF_YAML_FILES --limit=100

The harness finds tasks, loads their data (most of its own from the Hugging Face hub), and keeps the score: pip install 'memorizing[lm-eval]'.
"""
RESULTS = "lm_eval.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="names of tasks, with commas between them")
    parser.add_argument("--include_path", metavar="DIR", help="a folder of tasks of your own, YAML files")
    parser.add_argument(
        "--num_fewshot",
        type=Range(0, 1000).of(int),
        metavar="N",
        help="examples before each question (default: as each task has it)",
    )
    parser.add_argument("--limit", type=Range(1, MOST).of(int), metavar="N", help="only the first N of each task")
    parser.add_argument(
        "--output", metavar="FILE", help=f"JSON of the results (default: {RESULTS} in the run's folder)"
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval needs the package of this name: pip install 'memorizing[lm-eval]'")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if options.include_path and not pathlib.Path(options.include_path).is_dir():
        raise UserError(f"--include_path={options.include_path} is no folder")
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=options.include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise UserError(
            f"--tasks={options.tasks}: {unknown[0] if unknown else 'nothing'} is no task of the harness"
            + ("" if options.include_path else "; tasks of your own are found with --include_path=FOLDER")
        )
    experiment_flags.use_devices(1)
    model = TextModel(open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings))
    print(f"{model.run.workdir}, step {model.run.step}: {model.memory}", flush=True)
    _evaluate(model, tasks, manager, options)
    return 0


def _evaluate(model: TextModel, tasks: list[str], manager: Any, options: argparse.Namespace) -> None:
    """Has the harness evaluate the model, and shows and writes what it found."""
    # Intervals by resampling would be computed in forked processes, which JAX's threads do not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    from memorizing.generation.harness import HarnessModel

    found = simple_evaluate(
        HarnessModel(model),
        tasks=list(tasks),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None, "there is one process"
    print(make_table(found))
    path = resolve(options.output) if options.output else model.run.workdir / RESULTS
    # Of functions and types the harness tells their names.
    replace_text(path, json.dumps({"step": model.run.step, **found}, indent=1, default=str) + "\n")
    print(f"written to {path}")
