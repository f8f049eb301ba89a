"""What a memory has to beat: a continuous cache that was not trained, and the same model trained without a memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memorizing.batch import text_of
from memorizing.evaluation import report
from memorizing.evaluation.evaluator import Ablation, Evaluation
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.runtime.metrics import perplexity
from memorizing.runtime.tables import align
from memorizing.training.experiment import Experiment

CONTINUOUS_CACHE = "continuous cache instead"
# How a model is read with the continuous cache in the place of its memories.
CACHE_ALONE: Ablation = "memory_of_layers_cleared"
WITHOUT_MEMORY = "Experiment.without_memory = True"


def with_continuous_cache(experiment: Experiment) -> LMConfig | None:
    """The experiment's model with a continuous cache that needs no training, as large as its memory.

    None where the data is no text, which the cache's settings are for, and where the model is this already.
    """
    model = experiment.model
    if text_of(experiment.data) is None:
        return None
    with_cache = cached(experiment)
    has_no_other_memory = len(model.memory_sizes) == 1
    return None if with_cache == model and has_no_other_memory else with_cache


def cached(experiment: Experiment) -> LMConfig:
    """The experiment's model with a continuous cache that needs no training, as large as its memory.

    To be read with `CACHE_ALONE`: the memories of its layers hold a segment, since a smaller one is sooner searched.
    """
    model = experiment.model
    # A whole number of segments on every device.
    unit = experiment.batch.segment_length * experiment.mesh.memory
    baseline = ContinuousCache()
    size = max((model.memory_size or baseline.memory_size) // unit, 1) * unit
    cache = dataclasses.replace(baseline, memory_size=size)
    return dataclasses.replace(model.with_memory_size(unit), continuous_cache=cache)


def worth(trained: Mapping[str, Evaluation], without: Mapping[str, Evaluation], seed: int = 0) -> str:
    """A table of what a memory is worth against the same model trained without it.

    Args:
      trained: final evaluations of the model with the memory, by name.
      without: of the model without.
      seed: of the bootstrap over documents.
    """
    base = without["as trained"]
    compared = {"trained without a memory": base}
    if CONTINUOUS_CACHE in without:
        compared["... with a continuous cache, untrained"] = without[CONTINUOUS_CACHE]
    compared["trained with its memory"] = trained["as trained"]
    rows = [["", "perplexity", "", "95% over documents"]]
    for name, evaluation in compared.items():
        row = [name, f"{perplexity(evaluation.loss):.3f}", "", ""]
        if evaluation is not base:
            difference = report.difference(evaluation, base, seed)
            row[2] = percent(difference["loss"])
            if difference["interval"]:
                low, high = difference["interval"]
                row[3] = f"[{percent(low)}, {percent(high)}]"
        rows.append(row)
    return align(rows)


def percent(loss_difference: float) -> str:
    """By how much the perplexity differs, of a difference of losses in nats."""
    return f"{100 * (perplexity(loss_difference) - 1):+.1f}%"
