"""Tasks that show that a mechanism does what its paper says: trained with it, and with a part of it taken away.

  --task=sparse        symbols are copied from farther back than a window, in two steps through two sets of positions
  --task=duplication   Reformer's task: trained with a number of rounds of hashing, evaluated with all
  --task=routing       a topic's symbol is copied from where the topic came up, by clusters of content

Every variant is trained once, in a folder of its own; what is there already is not trained again, so that a run that
was stopped goes on. Figures are shares of scored tokens that are predicted rightly, on held-out samples.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NamedTuple

import jax

from memorizing.config.loading import load_experiment
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range
from memorizing.evaluation.evaluator import Evaluator
from memorizing.evaluation.train_and_evaluate import train_and_evaluate
from memorizing.runtime import tables


class Variant(NamedTuple):
    """A model that is trained.

    Attributes:
      name: of the row.
      bindings: beside those of the gin file.
    """

    name: str
    bindings: tuple[str, ...] = ()


class Proof(NamedTuple):
    """A task, the models that are trained on it, and how each is evaluated.

    Attributes:
      gin_file: of the run.
      steps: of training, unless told otherwise.
      variants: the rows of the table.
      readings: the columns of the table: bindings with which each variant is evaluated.
    """

    gin_file: str
    steps: int
    variants: tuple[Variant, ...]
    readings: dict[str, tuple[str, ...]]


def _rounds(number: int) -> tuple[str, ...]:
    """As the run's file has them, whatever the model was trained with."""
    hashing = ("ReformerAttention.hash_buckets=8", "ReformerAttention.chunk_size=32")
    return (*hashing, f"ReformerAttention.num_rounds={number}")


_ONE_BUCKET = (
    "ReformerAttention.hash_buckets=1",
    "ReformerAttention.chunk_size=128",
    "ReformerAttention.num_rounds=1",
)
_LOCAL = ("LMConfig.attention=@SparseAttention()", "SparseAttention.sees='first'")

PROOFS = {
    "sparse": Proof(
        "sparse_copy",
        300,
        (
            Variant("first and second set"),
            Variant("first set alone", ("far/SparseAttention.sees='first'",)),
            Variant("second set alone", ("near/SparseAttention.sees='second'",)),
        ),
        {"accuracy": ()},
    ),
    "duplication": Proof(
        "reformer_duplication",
        1500,
        (
            Variant("full attention", _ONE_BUCKET),
            Variant("4 rounds", _rounds(4)),
            Variant("2 rounds", _rounds(2)),
            Variant("1 round", _rounds(1)),
            Variant("local attention", (*_LOCAL, "SparseAttention.stride=32")),
        ),
        {
            "full": _ONE_BUCKET,
            "8 rounds": _rounds(8),
            "4 rounds": _rounds(4),
            "2 rounds": _rounds(2),
            "1 round": _rounds(1),
        },
    ),
    "routing": Proof(
        "routing_topics",
        6000,
        (
            Variant("routing"),
            Variant("routing, strictly causal", ("RoutingAttention.strictly_causal=True",)),
            Variant("centroids stay at random", ("RoutingAttention.decay=1.0", "RoutingAttention.commitment=0.0")),
            Variant("local attention", _LOCAL),
        ),
        {"accuracy": ()},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--task", choices=PROOFS, required=True)
    parser.add_argument("--workdir", default="runs/proofs", metavar="DIR", help="of the runs (default: %(default)s)")
    parser.add_argument("--steps", type=Range(2, MOST).of(int), metavar="N", help="of training (default: the task's)")
    parser.add_argument("--seed", type=Range(0, MOST).of(int), default=0, metavar="N", help="(default: %(default)s)")


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Trains, evaluates, prints a table, and returns the figures."""
    proof = PROOFS[options.task]
    steps = options.steps or proof.steps
    results: dict[str, dict[str, float]] = {}
    for variant in proof.variants:
        name = variant.name.replace(" ", "_").replace(",", "")
        folder = pathlib.Path(options.workdir) / f"{options.task}_{steps}_{options.seed}" / name
        settings = [*bindings, *variant.bindings, f"STEPS={steps}", f"LoopConfig.seed={options.seed}"]
        experiment, text = load_experiment([proof.gin_file], settings)
        train_and_evaluate(experiment, str(folder), text)
        results[variant.name] = _readings(str(folder), variant, proof)
        told = ", ".join(f"{reading} {accuracy:.3f}" for reading, accuracy in results[variant.name].items())
        print(f"{variant.name}: {told}", flush=True)
    chance = experiment.data.chance
    print(f"\n{_table(results)}\nchance: {chance:.3f}")
    return {"steps": steps, "seed": options.seed, "chance": chance, "accuracy": results}


def _readings(folder: str, variant: Variant, proof: Proof) -> dict[str, float]:
    """Accuracy of a variant with each of the readings; what takes no readings is evaluated as it was trained."""
    is_as_trained = any(binding.startswith("LMConfig.attention=") for binding in variant.bindings)
    readings = {next(iter(proof.readings)): ()} if is_as_trained else proof.readings
    accuracies = {}
    for name, bindings in readings.items():
        finished = open_run(folder, bindings=bindings)
        experiment = finished.experiment
        mesh = experiment.make_mesh()
        num_rows = min(experiment.batch.num_rows, experiment.data.num_eval_documents)
        with jax.set_mesh(mesh):
            evaluator = Evaluator(experiment.model, num_rows, experiment.batch.segment_length, mesh)
            evaluation = evaluator.run(finished.params, finished.buffers, experiment.data)
        accuracies[name] = evaluation.token_accuracy
    return accuracies


def _table(results: dict[str, dict[str, float]]) -> str:
    readings = list(max(results.values(), key=len))
    rows = [["trained with", *readings]]
    for name, accuracies in results.items():
        rows.append([name, *(f"{accuracies[each]:.3f}" if each in accuracies else "" for each in readings)])
    return tables.align(rows)
