"""What the memory of each key head of a run is worth on documents, and settings that give one to the best alone.

Every layer's memory is opened halfway. The gradient of the loss with respect to each head's opening says by how much
more of it the loss would fall: the nats a token of opening it from 0 to 1, were the loss linear in it. One pass over
the documents tells this of all heads, where leaving out one after the other would take as many passes as heads.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import Tree
from memorizing.batch import Batch
from memorizing.commands import experiment_flags
from memorizing.commands.documents import open_on_documents
from memorizing.context import Context, Inputs
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.stack.arrays import layer_name
from memorizing.runtime import tables

# Where a memory is closed the others cannot build on it; where all are open, nor replace it.
HALF = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_run(parser)
    parser.add_argument("--documents", metavar="FOLDER", help="what to read (default: the run's held-out documents)")
    parser.add_argument(
        "--rows", type=Range(1, MOST).of(int), default=4, metavar="N", help="side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--best",
        type=Range(1, MOST).of(int),
        default=12,
        metavar="N",
        help="key heads that the settings give a memory (default: %(default)s)",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table and settings, and returns what each key head is worth in nats a token."""
    finished = open_on_documents(options.workdir, options.step, options.documents, bindings)
    finished.check_data()
    worth = worth_of_heads(finished, options.rows)

    num_kv_heads = finished.experiment.model.dims.kv_heads
    rows = [["layer", *(f"key head {head}" for head in range(num_kv_heads)), "all"]]
    for layer, nats in worth.items():
        rows.append([str(layer), *(f"{each:+.4f}" for each in nats), f"{nats.sum():+.4f}"])
    print(tables.align(rows))
    chosen = best_heads(worth, options.best)
    print(f"\nSettings with a memory for {sum(map(len, chosen.values()))} of {num_kv_heads * len(worth)} key heads:\n")
    try:
        print(settings(finished.experiment.model, chosen))
    except UserError as error:
        print(f"none: {error}")
    return {str(layer): nats.tolist() for layer, nats in worth.items()}


def worth_of_heads(finished: FinishedRun, num_rows: int) -> dict[int, np.ndarray]:
    """By layer the nats a token that the memory of each key head is worth, float64 [K].

    Args:
      finished: a run, in at least one layer of which key heads can have a memory one by one.
      num_rows: documents side by side, at most.

    Raises:
      UserError: no layer has such a memory, or documents hold nothing to predict.
    """
    model, batch = finished.experiment.model, finished.experiment.batch
    num_rows = min(num_rows, finished.experiment.data.num_eval_documents)
    opened = dataclasses.replace(
        model, attention_at=tuple((index, each.with_openings()) for index, each in enumerate(model.stack.mechanisms))
    )
    half = jnp.full(model.num_heads, HALF, jnp.float32)
    shares = {index: half for index, each in enumerate(opened.stack.mechanisms) if each.openings(half)}
    if not shares:
        raise UserError(f"the model of {finished.workdir} has no layer whose heads could have a memory one by one")
    params, buffers = jax.device_put((finished.params, finished.buffers))

    def nats(shares: dict[int, jax.Array], params: Tree, batch: Batch, context: Context) -> tuple[jax.Array, Context]:
        tokens, targets, weights, is_real, start = [leaf[:, 0] for leaf in batch]
        params = _opened(opened, params, shares)
        output = language_model.apply(opened, params, buffers, Inputs(tokens, is_real, start), context)
        token_nats = language_model.token_nats(opened, params, output, targets)
        assert output.context is not None, "a whole segment has a context for the next one"
        return jnp.sum(token_nats * weights), output.context

    gradient = jax.jit(jax.grad(nats, has_aux=True))
    totals = {layer: np.zeros(model.num_heads) for layer in shares}
    context = opened.init_context(num_rows, batch.segment_length)
    num_tokens = 0.0
    for segment, _, _ in finished.experiment.data.evaluation_batches(num_rows, batch.segment_length):
        changes, context = gradient(shares, params, segment, context)
        num_tokens += float(segment.loss_weights.sum())
        for layer, change in jax.device_get(changes).items():
            totals[layer] += change
    if not num_tokens:
        raise UserError("the documents hold nothing to predict")
    # What the loss falls by: of a key head the sum over its query heads.
    return {layer: -total.reshape(model.dims.kv_heads, -1).sum(axis=1) / num_tokens for layer, total in totals.items()}


def best_heads(worth: dict[int, np.ndarray], number: int) -> dict[int, tuple[int, ...]]:
    """The key heads that are worth most, by layer; only those that are worth anything."""
    ranked = sorted(((nats, layer, head) for layer, all_nats in worth.items() for head, nats in enumerate(all_nats)))
    chosen = defaultdict(list)
    for nats, layer, head in ranked[-number:]:
        if nats > 0:
            chosen[layer].append(head)
    return {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen)}


def settings(model: LMConfig, chosen: dict[int, tuple[int, ...]]) -> str:
    """Gin text that gives a memory to these key heads of a run alone, and to all other layers its local attention.

    Args:
      model: of the run.
      chosen: key heads by layer.

    Raises:
      UserError: layers differ in more than whether they have a memory, and for which heads.
    """
    mechanisms = model.stack.mechanisms
    memories = {each.with_heads(()) for each in mechanisms if each.memory_size}
    if len(memories) > 1 or len({each.without_memory() for each in mechanisms}) > 1:
        raise UserError(
            "the layers of this run differ, and settings for all of them alike would make them another model"
        )
    (memory,) = memories
    name, local = type(memory).__name__, type(memory.without_memory()).__name__
    scopes = {heads: "heads_" + "_".join(map(str, heads)) for heads in sorted(set(chosen.values()))}
    pairs = [f"    ({layer}, @{scopes[heads]}/{name}())," for layer, heads in chosen.items()]
    lines = [
        f"LMConfig.attention = @{local}()",
        "LMConfig.attention_at = (",
        *pairs,
        ")",
        *(f"{scope}/{name}.heads = {heads}" for heads, scope in scopes.items()),
        *_bindings(memory),
    ]
    return "\n".join(lines)


def _bindings(part: Any) -> list[str]:
    """Gin text of what a mechanism has beyond its defaults, and of its parts."""
    lines = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            lines += [f"{type(part).__name__}.{field.name} = @{type(value).__name__}()", *_bindings(value)]
        elif value != field.default:
            lines.append(f"{type(part).__name__}.{field.name} = {value!r}")
    return lines


def _opened(model: LMConfig, params: Tree, shares: dict[int, jax.Array]) -> Tree:
    """Parameters with which the memory of each query head is open by its share."""
    changed = dict(params)
    for layer, of_heads in shares.items():
        name = layer_name(layer)
        attention = changed[name]["attention"]
        core = {**attention.get("core", {}), **model.stack.mechanisms[layer].openings(of_heads)}
        changed[name] = {**changed[name], "attention": {**attention, "core": core}}
    return changed
