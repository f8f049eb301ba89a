"""Rows of the shape of the paper's Table 4 on corpora of your own: no memory, a cache, a memory, both, and a larger memory.

python benchmarks/results.py --cache isabelle=FOLDER --cache github=FOLDER [--steps=600] [--seeds=0,1] [--output=runs/results]

A FOLDER is a token cache as `memorizing prepare` makes it; the caches may have different vocabularies. Every row is trained by `memorizing train` and read by `memorizing evaluate`
over whole held-out documents, one process after the other, the first seed of all rows first. A row is benchmarks/results.gin and the bindings of ROWS; rows differ in nothing else but one
gate per head. What is finished is not run again, what was killed goes on. OUTPUT/runs has the runs' own folders; results.md, results.json and results.png are made of whatever
is finished, with --report_only without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memorizing.benchmarks import measure
from memorizing.data.tasks import task_name
from memorizing.data.tokens import token_cache
from memorizing.errors import EXIT_START_AGAIN
from memorizing.evaluation import bootstrap
from memorizing.evaluation.plots import COLORS, MARKERS

GIN_FILE = pathlib.Path(__file__).with_suffix(".gin")

XL = ("LOCAL=@XLAttention()", "XLAttention.window=128")
MEMORY = (
    "LMConfig.attention_at=((1, @KNNAttention()),)",
    "KNNAttention.local=%LOCAL",
    "KNNAttention.memory_size=2048",
    "KNNAttention.num_neighbors=32",
)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      title: memory and XL cache, as the table shows them.
      run: the folder of the run whose weights it has.
      bindings: of that run, over results.gin.
      setting: what of the run's evaluation it is.
    """

    title: str
    run: str
    bindings: tuple[str, ...]
    setting: str = "as trained"


ROWS = (
    Row("no memory, no cache", "no_memory", ()),
    Row("XL cache 128", "xl", XL),
    Row("memory 2048", "memory", MEMORY, "memory 2048"),
    Row("memory 2048, XL cache 128", "memory_xl", MEMORY + XL, "memory 2048"),
    # The same weights as the row above, read with a larger memory, without further training.
    Row("memory 8192, XL cache 128 (weights of the row above)", "memory_xl", MEMORY + XL, "memory 8192"),
)

# What the table's rows are held against, beside the first row: what the memory adds to a cache, a cache to the memory, and what a larger memory adds.
CONTRASTS = (
    (3, 1, "memory, where there is a cache"),
    (3, 2, "cache, where there is a memory"),
    (4, 3, "larger memory"),
)


def flags(row: Row, cache: str, steps: int, seed: int) -> list[str]:
    """The command line of `memorizing train` for a row."""
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
    files = [f"--gin_file={name}" for name in (GIN_FILE, f"tasks/{corpus}.gin")]
    return files + [f"--gin.{binding}" for binding in bindings]


def run_row(row: Row, cache: str, steps: int, seed: int, workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Trains and evaluates one row as far as that has not been done yet."""
    sizes = [other.setting.split()[1] for other in ROWS if other.run == row.run and "memory" in other.setting]
    stages = {
        "train": (workdir / "evaluation.json", flags(row, cache, steps, seed)),
        "evaluate": (
            workdir / "evaluation" / "evaluation.json",
            [f"--memory_sizes={','.join(sizes)}"] if sizes else [],
        ),
    }
    for command, (result, arguments) in stages.items():
        while _step(result) != steps:
            command_line = [command, *arguments, f"--workdir={workdir}"]
            print("$ memorizing " + " ".join(command_line), flush=True)
            started = time.monotonic()
            # The rows of one kind are the same program: it is compiled once.
            environment = {"JAX_COMPILATION_CACHE_DIR": str(output / "compiled")} | os.environ
            code = subprocess.run([sys.executable, "-m", "memorizing", *command_line], env=environment).returncode
            spent = {"run": workdir.name, "command": command, "seconds": round(time.monotonic() - started, 1)}
            with (output / "times.jsonl").open("a") as file:
                file.write(json.dumps(spent | {"code": code}) + "\n")
            if code not in (0, EXIT_START_AGAIN):
                sys.exit(f"{workdir.name}: memorizing {command} ended with exit code {code}")


def _step(result: pathlib.Path) -> int | None:
    return json.loads(result.read_text())["step"] if result.exists() else None


def folder_of(output: pathlib.Path, corpus: str, run: str, seed: int) -> pathlib.Path:
    return output / "runs" / f"{corpus}-{run}-seed{seed}"


def read_results(output: pathlib.Path, corpora: Iterable[str], seeds: Iterable[int], steps: int) -> dict[str, Any]:
    """What is finished: `{corpus: {row title: {seed: figures}}}`, the figures those of `memorizing evaluate`, with the documents' tokens."""
    results: dict[str, Any] = {}
    for corpus in corpora:
        rows = results[corpus] = {row.title: {} for row in ROWS}
        for row in ROWS:
            for seed in seeds:
                path = folder_of(output, corpus, row.run, seed) / "evaluation" / "evaluation.json"
                if _step(path) == steps:
                    evaluation = json.loads(path.read_text())
                    rows[row.title][seed] = {
                        "document_tokens": evaluation["documents"]["tokens"],
                        **evaluation["evaluations"][row.setting],
                    }
    return results


def over_seeds(values: Iterable[float]) -> dict[str, float | None]:
    """Mean of a figure over the seeds, and its spread: the largest less the smallest, or None for a single seed."""
    values = list(values)
    return {"mean": float(np.mean(values)), "spread": float(np.ptp(values)) if len(values) > 1 else None}


def paired(row: Mapping[int, Any], base: Mapping[int, Any]) -> dict[str, Any] | None:
    """Loss of a row less that of another on the same documents and with the same seeds, in nats per token.

    Returns:
      Mean and spread over the seeds that both have, and the interval of the mean by resampling documents (None for fewer than two); None without such seeds.
    """
    seeds = sorted(set(row) & set(base))
    if not seeds:
        return None
    tokens = np.array(row[seeds[0]]["document_tokens"])
    nats = np.array([np.subtract(row[seed]["by_document"], base[seed]["by_document"]) * tokens for seed in seeds])
    interval = bootstrap.ratio_interval(nats.mean(axis=0), tokens)
    return over_seeds(nats.sum(axis=1) / tokens.sum()) | {
        "interval": None if np.isnan(interval).any() else interval.tolist(),
        "documents_better": int(np.sum(nats.mean(axis=0) < 0)),
        "documents": len(tokens),
    }


def summarize(rows: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Of one corpus: every row over its seeds, its difference to the first row, and the contrasts between rows."""
    titles = [row.title for row in ROWS]
    table = {
        title: {
            "seeds": sorted(rows[title]),
            "perplexity": over_seeds(each["perplexity"] for each in rows[title].values()),
            "bits_per_byte": over_seeds(each["bits_per_byte"] for each in rows[title].values()),
            "difference": paired(rows[title], rows[titles[0]]),
        }
        for title in titles
        if rows[title]
    }
    contrasts = {name: paired(rows[titles[i]], rows[titles[j]]) for i, j, name in CONTRASTS}
    return {"rows": table, "contrasts": {name: each for name, each in contrasts.items() if each}}


def markdown(corpus: str, summary: Mapping[str, Any]) -> str:
    """The summary of a corpus as a table, and a line for each contrast."""
    first = ROWS[0].title
    lines = [
        f"| {corpus} | perplexity | bits per byte | loss less that of no memory | documents better | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for title, row in summary["rows"].items():
        figures = [_shown(row["perplexity"], ".3f"), _shown(row["bits_per_byte"], ".4f")]
        difference = row["difference"]
        if title == first or difference is None:
            figures += ["", ""]
        else:
            figures += [_shown(difference), f"{difference['documents_better']} of {difference['documents']}"]
        lines.append("| " + " | ".join([title, *figures, str(len(row["seeds"]))]) + " |")
    lines.append("")
    for name, contrast in summary["contrasts"].items():
        lines.append(
            f"* {name}: {_shown(contrast)}, better on {contrast['documents_better']} of {contrast['documents']}"
        )
    return "\n".join(lines)


def _shown(figure: Mapping[str, Any], form: str = "+.4f") -> str:
    """Mean, spread in parentheses, interval in brackets, as far as there are such."""
    text = f"{figure['mean']:{form}}"
    if figure["spread"] is not None:
        text += f" ({figure['spread']:{form.lstrip('+')}})"
    if interval := figure.get("interval"):
        text += f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return text


def picture(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Loss by position in the document, and below it the difference to no memory: means over seeds, bands from seed to seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = {corpus: rows for corpus, rows in results.items() if rows[ROWS[0].title]}
    if not results:
        return
    figure = Figure(figsize=(5.5 * len(results), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), sharex="col", squeeze=False)
    for column, (corpus, rows) in enumerate(results.items()):
        upper, lower = axes[:, column]
        base = rows[ROWS[0].title]
        for i, row in enumerate(ROWS):
            seeds = sorted(set(rows[row.title]) & set(base))
            if not seeds:
                continue
            style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4}
            losses, bases = (
                np.array([[place["loss"] for place in each[seed]["by_position"]] for seed in seeds])
                for each in (rows[row.title], base)
            )
            starts = np.array([place["from"] for place in base[seeds[0]]["by_position"]])
            middles = np.where(starts > 0, starts * 1.5, starts[1] / 2)
            upper.plot(middles, losses.mean(axis=0), label=row.title, **style)
            if i:
                difference = losses - bases
                lower.plot(middles, difference.mean(axis=0), **style)
                lower.fill_between(middles, difference.min(axis=0), difference.max(axis=0), color=COLORS[i], alpha=0.15)
        upper.set_title(f"{corpus}: held-out loss by position in the document")
        upper.set_ylabel("loss (nats per token)")
        lower.axhline(0, color="gray", linewidth=0.8, linestyle="--")
        lower.set_ylabel("less that of no memory")
        lower.set_xlabel("position in the document (tokens)")
        lower.set_xscale("log")
        for each in (upper, lower):
            each.grid(alpha=0.3)
    # One for all panels: it would cover the lines.
    handles, names = max((each.get_legend_handles_labels() for each in axes[0]), key=lambda found: len(found[1]))
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=80)


def report(output: pathlib.Path, caches: Mapping[str, str], seeds: Sequence[int], steps: int) -> None:
    """Prints and writes what is finished."""
    results = read_results(output, caches, seeds, steps)
    summaries = {corpus: summarize(rows) for corpus, rows in results.items()}
    notes = (
        "Mean over seeds, in parentheses the largest less the smallest; [ ]: 95% bootstrap interval over documents of the mean. "
        "Losses in nats per token, paired by document and seed."
    )
    text = "\n\n".join([*(markdown(corpus, summary) for corpus, summary in summaries.items()), notes]) + "\n"
    times = output / "times.jsonl"
    record = {
        "machine": measure.machine(),
        "steps": steps,
        "seeds": list(seeds),
        "common": GIN_FILE.read_text(),
        "rows": [row._asdict() for row in ROWS],
        "caches": {corpus: token_cache.read_metadata(cache) for corpus, cache in caches.items()},
        "times": [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else [],
        "summaries": summaries,
        "results": results,
    }
    (output / "results.md").write_text(text)
    (output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    picture(results, output / "results.png")
    print(f"\n{text}\nwritten to {output}: results.md, results.json, results.png", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1", metavar="N,N,...")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/results"))
    parser.add_argument("--report_only", action="store_true")
    options = parser.parse_args()
    caches = {name: os.path.abspath(folder) for name, _, folder in (each.partition("=") for each in options.cache)}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        trained = {row.run: row for row in ROWS}
        for seed in seeds:
            for corpus, cache in caches.items():
                for row in trained.values():
                    run_row(row, cache, options.steps, seed, folder_of(output, corpus, row.run, seed), output)
    report(output, caches, seeds, options.steps)


if __name__ == "__main__":
    main()
