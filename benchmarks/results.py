"""What memories are worth on corpora of your own, against the same model trained without one and against controls.

python benchmarks/results.py --cache stdlib=FOLDER --cache isabelle=FOLDER
  [--steps=400] [--seeds=0,1,2] [--runs=none,recall] [--output=runs/results] [--gin_file=FILE] [--minutes=N]

A FOLDER is a token cache as `memorizing prepare` makes it; the caches may have different vocabularies. Every row is
trained and evaluated on whole held-out documents by `memorizing train`, one process after the other, the first seed of
all rows first. A row is benchmarks/results.gin, which is the demo without its memory, and the bindings of ROWS; rows
differ in nothing else but one gate per head, how fast it learns, and two numbers of a cache. The layer that was taught
is read with four times its memory too. Finished runs are not run again, killed ones go on. OUTPUT/runs has the folders
of the runs; results.md, results.json and results.png are made from the finished ones, with --report_only without
running anything.

A gin file changes all rows alike: benchmarks/results_40m.gin makes them 40 times as large, for an accelerator. After N
minutes no other run is begun, and the one that is under way stops at a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memorizing.benchmarks import measure
from memorizing.benchmarks.trained import trainings
from memorizing.data.tasks import task_name
from memorizing.data.tokens import token_cache
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation import baselines, bootstrap, plots
from memorizing.evaluation.plots import COLORS, MARKERS

GIN_FILE = pathlib.Path(__file__).with_suffix(".gin")

WINDOW = ("LOCAL=@XLAttention()", "XLAttention.window=128")
MEMORY = (
    "LMConfig.attention_at=((2, @KNNAttention()),)",
    "KNNAttention.local=%LOCAL",
    "KNNAttention.memory_size=2048",
    "KNNAttention.num_neighbors=32",
)
# As in gin/models/with_recall.gin, and what the demo adds.
RECALL = (
    *MEMORY,
    "KNNAttention.stored_value=next",
    "KNNAttention.retrieval_loss=1.0",
    "AdamW.groups=(@gates/ParameterGroup(),)",
    "gates/ParameterGroup.pattern='attention/core/gate$'",
    "gates/ParameterGroup.learning_rate=10.0",
    "gates/ParameterGroup.decays=False",
    "gates/ParameterGroup.is_optional=True",
)
CACHE = ("LMConfig.continuous_cache=@ContinuousCache()", "ContinuousCache.mixing=learned")
CLEARED = "memory cleared"
ANOTHER = "memory of another document"
LARGER_SIZE = 8192
LARGER = f"memory {LARGER_SIZE}"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      title: as the table shows it.
      run: the folder of the run whose weights it has.
      bindings: of that run, over results.gin.
      setting: which setting of the run's evaluation the row shows.
    """

    title: str
    run: str
    bindings: tuple[str, ...]
    setting: str = "as trained"


ROWS = (
    Row("no memory", "none", ()),
    Row("no memory, window of 128 more", "window", WINDOW),
    Row("no memory, continuous cache, untrained", "none", (), baselines.CONTINUOUS_CACHE),
    Row("kNN layer as in the paper", "paper", MEMORY),
    Row("kNN layer, taught to look up", "recall", RECALL),
    Row("... its memory cleared", "recall", RECALL, CLEARED),
    Row("... with the memory of another document", "recall", RECALL, ANOTHER),
    Row(f"... with a memory of {LARGER_SIZE:,}", "recall", RECALL, LARGER),
    Row("kNN layer, taught, and continuous cache", "both", RECALL + CACHE),
    Row("... their memories cleared", "both", RECALL + CACHE, CLEARED),
    Row("... with the memories of another document", "both", RECALL + CACHE, ANOTHER),
)

# Pairs of rows that are compared, besides every row with the first.
CONTRASTS = (
    (4, 3, "teaching it"),
    (7, 4, "a larger memory at evaluation"),
    (8, 2, "both, against the untrained cache"),
)


def flags(row: Row, cache: str, steps: int, seed: int, gin_files: Sequence[str] = ()) -> list[str]:
    """The command line of `memorizing train` for a row; gin files that change all rows come before its bindings."""
    metadata = token_cache.read_metadata(cache)
    corpus = task_name.parse(metadata["task"]).corpus
    bindings = [
        f"CachedCorpus.task={metadata['task']}",
        f"CACHE={cache}",
        f"VOCAB_SIZE={metadata['vocabulary']['size']}",
        f"STEPS={steps}",
        f"SEED={seed}",
        *row.bindings,
    ]
    return [
        f"--gin_file={GIN_FILE}",
        f"--gin_file=tasks/{corpus}.gin",
        *(f"--gin_file={os.path.abspath(file)}" for file in gin_files),
        *(f"--gin.{binding}" for binding in bindings),
    ]


def folder_of(output: pathlib.Path, corpus: str, run: str, seed: int, steps: int) -> pathlib.Path:
    """The workdir of a run."""
    return output / "runs" / f"{corpus}-{run}-{steps}-seed{seed}"


def read_results(output: pathlib.Path, corpora: Iterable[str], seeds: Iterable[int], steps: int) -> dict[str, Any]:
    """The finished rows: `{corpus: {row title: {seed: figures}}}`.

    The figures are those at the end of `memorizing train`, with the number of tokens of each document, and what the
    last logged steps say of look-ups.
    """
    results: dict[str, Any] = {}
    for corpus in corpora:
        rows: dict[str, dict[int, Any]] = {row.title: {} for row in ROWS}
        for row in ROWS:
            for seed in seeds:
                folder = folder_of(output, corpus, row.run, seed, steps)
                evaluation = finished_evaluation(folder, steps)
                if row.setting in evaluation:
                    rows[row.title][seed] = {
                        "document_tokens": evaluation["documents"]["tokens"],
                        **evaluation[row.setting],
                        **(look_ups(folder / "metrics.jsonl") if row.setting == "as trained" else {}),
                    }
        results[corpus] = rows
    return results


def finished_evaluation(folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """Documents and, by setting, figures of a run: those at its end and of a later `evaluate`; empty before its end."""
    if trainings.finished_step(folder) != steps:
        return {}
    evaluation = json.loads((folder / trainings.RESULT).read_text())
    later = folder / "evaluation" / trainings.RESULT
    return evaluation | (json.loads(later.read_text())["evaluations"] if later.exists() else {})


def look_ups(metrics: pathlib.Path) -> dict[str, float]:
    """Means over the heads of the kNN layer and the last half of the logged steps; empty without such a layer."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    steps = steps[len(steps) // 2 :]
    found = {}
    for name in ("hit_share", "hit_chance", "weight_entropy"):
        values = [value for step in steps for key, value in step.items() if f"layer_02/{name}" in key]
        if values:
            found[name] = float(np.mean(values))
    return found


def over_seeds(values: Iterable[float]) -> dict[str, float | None]:
    """Mean of a figure over the seeds, and its spread: the largest less the smallest, or None for a single seed."""
    values = list(values)
    spread = float(np.ptp(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread}


def paired(row: Mapping[int, Any], base: Mapping[int, Any]) -> dict[str, Any] | None:
    """Loss of a row less that of another on the same documents and with the same seeds, in nats per token.

    Returns:
      Mean and spread over the seeds that both have, and the interval of the mean by resampling documents and seeds
      (None for fewer than two documents); None without such seeds.
    """
    seeds = sorted(set(row) & set(base))
    if not seeds:
        return None
    # [documents]
    tokens = np.array(row[seeds[0]]["document_tokens"])
    # [seeds, documents]
    losses = np.array([np.subtract(row[seed]["by_document"], base[seed]["by_document"]) for seed in seeds])
    nats = losses * tokens
    mean_nats = nats.mean(axis=0)
    interval = bootstrap.interval_over_seeds(nats, tokens)
    return over_seeds(nats.sum(axis=1) / tokens.sum()) | {
        "interval": None if np.isnan(interval).any() else interval.tolist(),
        "documents_better": int(np.sum(mean_nats < 0)),
        "documents": len(tokens),
    }


def summarize(rows: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Of one corpus: every row over its seeds, its difference to the first row, and the contrasts between rows."""
    titles = [row.title for row in ROWS]
    base = rows[titles[0]]
    table = {}
    for title in titles:
        by_seed = rows[title]
        if by_seed:
            table[title] = {
                "seeds": sorted(by_seed),
                "perplexity": over_seeds(each["perplexity"] for each in by_seed.values()),
                "bits_per_byte": over_seeds(each["bits_per_byte"] for each in by_seed.values()),
                "difference": paired(by_seed, base),
                "change": over_seeds(by_seed[seed]["perplexity"] / base[seed]["perplexity"] - 1 for seed in by_seed),
                "look_ups": _look_ups_over_seeds(by_seed.values()),
            }
    contrasts = {}
    for i, j, name in CONTRASTS:
        contrast = paired(rows[titles[i]], rows[titles[j]])
        if contrast:
            contrasts[name] = contrast
    return {"rows": table, "contrasts": contrasts}


def _look_ups_over_seeds(by_seed: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means of what is told of look-ups; empty where nothing is."""
    figures = [each for each in by_seed if "hit_share" in each]
    return {
        name: float(np.mean([each[name] for each in figures]))
        for name in ("hit_share", "hit_chance", "weight_entropy")
        if figures
    }


def markdown(corpus: str, summary: Mapping[str, Any]) -> str:
    """The summary of a corpus as a table, and a line for each contrast."""
    first = ROWS[0].title
    lines = [
        f"| {corpus} | perplexity | against no memory | loss less that of no memory | documents better | hits, chance | "
        "seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in summary["rows"].items():
        cells = [title, _shown(row["perplexity"], ".3f")]
        difference = row["difference"]
        if title == first or difference is None:
            cells += ["", "", ""]
        else:
            cells += [
                _shown(row["change"], "+.1%"),
                _shown(difference),
                f"{difference['documents_better']} of {difference['documents']}",
            ]
        found = row["look_ups"]
        cells.append(f"{found['hit_share']:.3f}, {found['hit_chance']:.3f}" if found else "")
        cells.append(str(len(row["seeds"])))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, contrast in summary["contrasts"].items():
        better = f"{contrast['documents_better']} of {contrast['documents']}"
        lines.append(f"* {name}: {_shown(contrast)}, better on {better}")
    return "\n".join(lines)


def _shown(figure: Mapping[str, Any], form: str = "+.4f") -> str:
    """Mean, spread in parentheses, interval in brackets, as far as there are such."""
    text = format(figure["mean"], form)
    spread = figure["spread"]
    if spread is not None:
        text += f" ({format(spread, form.lstrip('+'))})"
    interval = figure.get("interval")
    if interval:
        low, high = interval
        text += f" [{low:+.4f}, {high:+.4f}]"
    return text


def picture(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the loss by position in the document, and below it the difference to no memory.

    Lines are means over seeds, bands go from the smallest to the largest seed.
    """
    results = {corpus: rows for corpus, rows in results.items() if rows[ROWS[0].title]}
    if not results:
        return
    figure = plots.blank(5.5 * len(results), 6.5)
    axes = figure.subplots(2, len(results), sharex="col", squeeze=False)
    for column, (corpus, rows) in enumerate(results.items()):
        upper, lower = axes[:, column]
        base = rows[ROWS[0].title]
        for i, row in enumerate(ROWS):
            seeds = sorted(set(rows[row.title]) & set(base))
            if not seeds:
                continue
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            # [seeds, positions]
            losses = np.array([_losses(rows[row.title][seed]) for seed in seeds])
            base_losses = np.array([_losses(base[seed]) for seed in seeds])
            starts = np.array([place["from"] for place in base[seeds[0]]["by_position"]])
            middles = np.where(starts > 0, starts * 1.5, starts[1] / 2)
            upper.plot(middles, losses.mean(axis=0), label=row.title, **style)
            if i > 0:
                difference = losses - base_losses
                lower.plot(middles, difference.mean(axis=0), **style)
                lower.fill_between(
                    middles, difference.min(axis=0), difference.max(axis=0), color=COLORS[i % len(COLORS)], alpha=0.15
                )
        upper.set_title(f"{corpus}: held-out loss by position in the document")
        upper.set_ylabel("loss (nats per token)")
        lower.axhline(0, color="gray", linewidth=0.8, linestyle="--")
        lower.set_ylabel("less that of no memory")
        lower.set_xlabel("position in the document (tokens)")
        lower.set_xscale("log")
        upper.grid(alpha=0.3)
        lower.grid(alpha=0.3)
    # One for all panels: it would cover the lines.
    handles, names = max((each.get_legend_handles_labels() for each in axes[0]), key=lambda found: len(found[1]))
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=80)


def _losses(figures: Mapping[str, Any]) -> list[float]:
    """Loss by position in the document."""
    return [place["loss"] for place in figures["by_position"]]


def report(
    output: pathlib.Path,
    caches: Mapping[str, str],
    seeds: Sequence[int],
    steps: int,
    gin_files: Sequence[str] = (),
) -> None:
    """Prints and writes the results of the finished rows."""
    results = read_results(output, caches, seeds, steps)
    summaries = {corpus: summarize(rows) for corpus, rows in results.items()}
    notes = (
        "Mean over seeds, in parentheses the largest less the smallest; "
        "[ ]: 95% bootstrap interval of the mean over documents and seeds. Losses in nats per token, paired by document "
        "and seed."
    )
    tables = [markdown(corpus, summary) for corpus, summary in summaries.items()]
    text = "\n\n".join([*tables, notes]) + "\n"
    times = output / "times.jsonl"
    time_lines = times.read_text().splitlines() if times.exists() else []
    record = {
        "machine": measure.machine(),
        "steps": steps,
        "seeds": list(seeds),
        "common": "".join(pathlib.Path(file).read_text() for file in (GIN_FILE, *gin_files)),
        "rows": [row._asdict() for row in ROWS],
        "caches": {corpus: token_cache.read_metadata(cache) for corpus, cache in caches.items()},
        "times": [json.loads(line) for line in time_lines],
        "summaries": summaries,
        "results": results,
    }
    (output / "results.md").write_text(text)
    (output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    picture(results, output / "results.png")
    files = [name for name in ("results.md", "results.json", "results.png") if (output / name).exists()]
    print(f"\n{text}\nwritten to {output}: {', '.join(files)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--steps", type=Range(1, MOST).of(int), default=400)
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N,...")
    names = ",".join(dict.fromkeys(row.run for row in ROWS))
    parser.add_argument("--runs", default=names, metavar="NAME,...", help="which runs to make (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/results"))
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="for all rows; repeatable")
    parser.add_argument("--minutes", type=Range(0, MOST).of(float), metavar="N", help="for all of it")
    parser.add_argument("--report_only", action="store_true")
    options = parser.parse_args()
    caches = {}
    for given in options.cache:
        name, _, folder = given.partition("=")
        if not folder:
            parser.error(f"--cache={given}: expected NAME=FOLDER, a token cache of `memorizing prepare`")
        caches[name] = os.path.abspath(folder)
        try:
            token_cache.read_metadata(caches[name])
        except UserError as error:
            parser.error(f"--cache={given}: {error}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        trained = {row.run: row for row in ROWS if row.run in options.runs.split(",")}
        read_larger = {row.run for row in ROWS if row.setting == LARGER}
        # The rows of one kind are the same program: it is compiled once.
        environment = {"JAX_COMPILATION_CACHE_DIR": str(output / "compiled")}
        end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        for seed in seeds:
            for corpus, cache in caches.items():
                for row in trained.values():
                    folder = folder_of(output, corpus, row.run, seed, options.steps)
                    row_flags = flags(row, cache, options.steps, seed, options.gin_file)
                    try:
                        trainings.train(row_flags, folder, options.steps, environment, output / "times.jsonl", end=end)
                        if row.run in read_larger and LARGER not in finished_evaluation(folder, options.steps):
                            larger = [f"--memory_sizes={LARGER_SIZE}"]
                            trainings.evaluate(folder, larger, environment, end=end)
                    except trainings.NoTimeLeft:
                        # What has ended is told all the same.
                        continue
                    except trainings.Failed as error:
                        sys.exit(str(error))
    report(output, caches, seeds, options.steps, options.gin_file)


if __name__ == "__main__":
    main()
