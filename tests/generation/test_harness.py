"""`memorizing lm-eval`: the harness gets what a session gives, however long the prompt is."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
import untrained_run

import memorizing
from memorizing import main
from memorizing.errors import UserError
from memorizing.generation.text_model import TextModel
from memorizing.runtime import sharding

pytest.importorskip("lm_eval", reason="tasks of the harness need lm-eval")
from memorizing.generation.harness import HarnessModel

# Longer than a segment and than the memory: 64 positions.
LONG = "Die Größe von 3 ist 漢字, 4 mal 😀.\n" * 4
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list: [{{metric: {metric}}}]
"""


class Request(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return untrained_run.write(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def model(workdir: pathlib.Path) -> Iterator[TextModel]:
    one_device = sharding.mesh_for_one_row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "mesh_for_one_row", lambda *sizes: one_device(*sizes, devices=jax.devices()[:1]))
        yield memorizing.load(str(workdir))


@pytest.fixture(scope="module")
def harness(model: TextModel) -> HarnessModel:
    return HarnessModel(model)


@pytest.mark.parametrize("context", ["", "Die", LONG], ids=["none", "short", "longer than the memory"])
def test_a_continuation_is_scored_as_the_rest_of_the_whole_text(harness: HarnessModel, context: str):
    """Each of several behind one context, and none of them is read by the others."""
    continuations = [" Größe", " ist 漢字", " x" * 20]
    found = harness.loglikelihood([Request((context, each)) for each in continuations], disable_tqdm=True)
    for continuation, (log_probability, _) in zip(continuations, found, strict=True):
        score = harness.model.score(context + continuation)
        # The harness has spaces at the end of a context go with what continues it.
        start = len(harness.tok_encode(context.rstrip()))
        expected = -score.nats[start:].sum(dtype=np.float64)
        assert log_probability == pytest.approx(expected, rel=1e-4)


def test_greedy_is_what_greedy_writing_writes(harness: HarnessModel):
    prompt = LONG[:50]
    written = harness.model.session()
    written.read(prompt)
    greedy = written.generate(12, temperature=0)[0]
    # Up to the last whole character.
    greedy = greedy.rstrip("\N{REPLACEMENT CHARACTER}")
    assert greedy, "the test compares nothing"
    other = ("a" if greedy[-1] != "a" else "b").join((greedy[:-1], ""))
    requests = [Request((prompt, text)) for text in (greedy, other)]
    assert [is_greedy for _, is_greedy in harness.loglikelihood(requests, disable_tqdm=True)] == [True, False]


def test_rolling_is_the_score_of_the_text(harness: HarnessModel):
    whole, nothing = harness.loglikelihood_rolling([Request((LONG,)), Request(("",))], disable_tqdm=True)
    assert whole == pytest.approx(-harness.model.score(LONG).nats.sum(dtype=np.float64), rel=1e-5)
    assert nothing == 0


def test_writing_ends_before_the_first_of_the_texts_to_stop_at(harness: HarnessModel):
    def written(**asked) -> str:
        return harness.generate_until([Request((LONG, {"max_gen_toks": 30, **asked}))], disable_tqdm=True)[0]

    whole = written()
    assert whole == harness.model.generate(LONG, 30, temperature=0)[0]
    middle, late = whole[len(whole) // 3], whole[-1]
    assert written(until=[late, middle]) == whole[: min(whole.index(middle), whole.index(late))]
    assert written(until=middle) == whole[: whole.index(middle)]
    assert written(do_sample=True, temperature=5.0) != whole
    with pytest.raises(UserError, match="num_beams"):
        written(num_beams=4)


def test_tasks_of_ones_own_are_run_and_written_down(workdir: pathlib.Path, model, tmp_path: pathlib.Path, capsys):
    """Data from a file: nothing is downloaded."""
    lines = [{"text": f"{LONG}{number}", "target": f" {number}"} for number in range(3)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "last.yaml").write_text(
        TASK.format(
            name="last", data=data, kind="loglikelihood", text="{{text}}", target="{{target}}", metric="perplexity"
        )
    )
    arguments = ["lm-eval", f"--workdir={workdir}", f"--include_path={tmp_path}"]
    output = tmp_path / "found.json"
    assert main._run([*arguments, "--tasks=last", f"--output={output}"]) == 0
    assert "|last" in capsys.readouterr().out.replace(" ", "")
    found = json.loads(output.read_text())["results"]["last"]["perplexity,none"]
    scored = [model.score(line["text"] + line["target"]) for line in lines]
    nats = [score.nats[-2:].sum() for score in scored]
    assert found == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)

    assert main._run([*arguments, "--tasks=lost"]) == 2
    assert "lost is no task" in capsys.readouterr().err
