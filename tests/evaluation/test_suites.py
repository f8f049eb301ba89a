"""Recall suites on a finished run: what is counted, in which settings, and what is left in the workdir."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from tiny_texts import LENGTH, expect_error, finished_run

from memorizing import main
from memorizing.config.runs import open_run
from memorizing.evaluation.evaluator import Evaluator, ReadSegment
from memorizing.evaluation.suites import long_ppl, summary
from memorizing.evaluation.suites.answers import answers_of, spans_of
from memorizing.evaluation.suites.controls import Evaluators, Setting
from memorizing.evaluation.suites.greedy import Greedy
from memorizing.evaluation.suites.one_window import OneWindow
from memorizing.evaluation.suites.run import digests, figures
from memorizing.models.attention import Attention, FullAttention, SinkhornAttention
from memorizing.models.lm_config import LMConfig
from memorizing.synthetic import DetectAndMemorize, DictionaryLookup
from memorizing.synthetic.recall import BABILong, Passkey, Ruler, SegmentedMQAR, catalogue

MQAR = SegmentedMQAR(num_ids=64, num_pairs=3, eval_gap=1, num_eval_samples=4)
SOURCES = [
    (MQAR, 8),
    (DictionaryLookup(eval_segments=5, eval_distance=3, num_eval_samples=4, key_length=1, value_length=2), 24),
    (DetectAndMemorize(num_eval_samples=4), 24),
    (Passkey(num_eval_samples=4), 32),
    (Ruler(task="niah_multivalue", num_eval_samples=3), 48),
    (BABILong(task="qa2", num_eval_samples=4, eval_segments=8), 48),
]
each_source = pytest.mark.parametrize(("source", "length"), SOURCES, ids=lambda value: type(value).__name__)


def read_by(source, length: int, is_right) -> list[ReadSegment]:
    """Segments as an evaluator hands them out, of a made-up model: `is_right(batch)` is bool [B, T]."""
    segments = []
    for batch, document, offset in source.evaluation_batches(3, length):
        right = is_right(batch)
        segments.append(ReadSegment((np.where(right, 0.5, 3.0), right), batch, document, offset))
    return segments


@each_source
def test_an_oracle_scores_one_and_a_random_guesser_is_at_chance(source, length: int) -> None:
    spans = spans_of(source, length)
    size = source.eval_segments * length
    oracle = answers_of(spans, read_by(source, length, lambda batch: np.ones(batch.targets.shape[::2], bool)), size)
    assert oracle.right.all() and figures(spans, oracle, 0)["accuracy"] == 1
    nobody = answers_of(spans, read_by(source, length, lambda batch: np.zeros(batch.targets.shape[::2], bool)), size)
    assert not nobody.right.any()
    rng = np.random.default_rng(0)

    def guess(batch) -> np.ndarray:
        return rng.integers(1, source.vocab_size, batch.targets.shape)[:, 0] == batch.targets[:, 0]

    guesser = answers_of(spans, read_by(source, length, guess), size)
    # Ids at random are worse than the best guess, which is what chance means.
    assert guesser.right.mean() <= source.chance + 3 * np.sqrt((source.chance + 0.01) / len(spans.sample))
    # Every scored token belongs to one answer, and all of it was told before.
    scored = sum(int(segment.batch.loss_weights.sum()) for segment in read_by(source, length, guess))
    assert scored == (spans.end - spans.start).sum()
    assert (spans.distance >= 0).all() and (spans.depth >= 0).all() and (spans.depth < 1).all()
    np.testing.assert_allclose(oracle.nats, 0.5 * (spans.end - spans.start))


def test_distances_are_in_segments_and_exact() -> None:
    assert set(spans_of(MQAR, 8).distance) == {2}
    dictionary, length = SOURCES[1]
    assert set(spans_of(dictionary, length).distance) == {3}
    facts = spans_of(*SOURCES[2])
    assert set(facts.distance) <= {0, 1, 2, 3} and len(set(facts.distance)) > 1
    assert len(spans_of(*SOURCES[4]).sample) == 3 * 4


def test_one_wrong_token_makes_a_wrong_answer() -> None:
    source, length = SOURCES[1]
    spans = spans_of(source, length)
    first = int(spans.start[0])

    def all_but_one(batch) -> np.ndarray:
        return np.ones(batch.targets.shape[::2], bool)

    segments = read_by(source, length, all_but_one)
    for segment in segments:
        for row, (document, offset) in enumerate(zip(segment.document, segment.offset, strict=True)):
            if document == 0 and offset <= first < offset + length:
                segment.scores[1][row, first - offset] = False
    answers = answers_of(spans, segments, source.eval_segments * length)
    assert not answers.right[0] and answers.right[1:].all()


@each_source
def test_one_window_shows_the_same_samples(source, length: int) -> None:
    window = OneWindow(source, length)
    whole = list(window.evaluation_batches(3, window.length))
    assert len(whole) == -(-source.num_eval_documents // 3)
    parts = list(source.evaluation_batches(3, length))
    for name in ("tokens", "targets", "loss_weights", "is_real"):
        joined = np.concatenate([getattr(part.batch, name) for part in parts[: source.eval_segments]], axis=2)
        np.testing.assert_array_equal(getattr(whole[0].batch, name), joined)
    assert whole[0].batch.start_of_document.all() and len(digests(source, length)[0]) == 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A run on made-up texts, of weights at random."""
    return open_run(finished_run(tmp_path_factory.mktemp("runs") / "run"))


def test_without_memory_nothing_of_the_facts_is_seen(run) -> None:
    """Other pairs in the first segment change nothing in the last one if the memory is cleared, and much otherwise."""

    class Changed:
        """The same questions behind other pairs."""

        num_eval_documents = MQAR.num_eval_documents
        document_bytes = text = None

        def evaluation_batches(self, *size):
            for segment in MQAR.evaluation_batches(*size):
                if segment.offset[0] == 0:
                    other = segment.batch._replace(tokens=63 - segment.batch.tokens)
                    segment = segment._replace(batch=other)
                yield segment

    mesh = run.experiment.mesh.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, buffers = run.variables_on(mesh)
        evaluator = Evaluator(run.experiment.model, 4, LENGTH, mesh)

        def last(source, ablation: str) -> np.ndarray:
            *_, segment = evaluator.read(params, buffers, source, ablation)
            return np.where(segment.batch.loss_weights[:, 0] > 0, np.asarray(segment.scores[0]), 0.0)

        cleared = last(MQAR, "memory_cleared")
        np.testing.assert_array_equal(cleared, last(Changed(), "memory_cleared"))
        trained = last(MQAR, "none")
        assert np.abs(trained - last(Changed(), "none")).max() > 1e-3
        assert np.abs(trained - cleared).max() > 1e-3


def test_what_is_generated_is_the_most_likely_continuation(run) -> None:
    """A prompt with the first token of its continuation is continued by the rest; rows do not disturb others."""
    mesh = run.experiment.mesh.make_mesh(jax.devices()[:1])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 259, length).astype(np.int32) for length in (13, 8, 30)]
    numbers = [5, 20, 3]
    with jax.set_mesh(mesh):
        params, buffers = run.variables_on(mesh)
        greedy = Greedy(run.experiment.model, 4, LENGTH, mesh)
        together = greedy.generate(params, buffers, prompts, numbers, 0)
        for prompt, number, generated in zip(prompts, numbers, together, strict=True):
            (alone,) = greedy.generate(params, buffers, [prompt], [number], 0)
            np.testing.assert_array_equal(alone, generated)
            assert generated.shape == (number,)
            # One token fewer has to be generated where the first one is part of the prompt.
            longer = np.append(prompt, generated[:1])
            (rest,) = greedy.generate(params, buffers, [longer], [number - 1], 0)
            np.testing.assert_array_equal(rest, generated[1:])
        cleared = greedy.generate(params, buffers, prompts, numbers, 0, "memory_cleared")
        assert any((one != other).any() for one, other in zip(together, cleared, strict=True))


@pytest.mark.parametrize("attention", [FullAttention(), SinkhornAttention(block_size=LENGTH // 2)])
def test_one_window_is_read_where_its_length_changes_no_parameters(run, attention: Attention) -> None:
    model = LMConfig(8, 16, 1, 2, 8, 16, attention=attention, attention_at=(), continuous_cache=None)
    setting = Setting("window long enough", model, "state_reset", is_one_window=True)
    mesh = run.experiment.mesh.make_mesh()
    with jax.set_mesh(mesh):
        prepared = Evaluators(mesh.size, LENGTH, mesh, 1_000).prepare(setting, MQAR)
    # Sinkhorn's network has a score for each place in a segment.
    assert (prepared is None) == isinstance(attention, SinkhornAttention)


def test_the_command_asks_in_every_setting(run, capsys: pytest.CaptureFixture) -> None:
    workdir = str(run.workdir)
    arguments = ["--suite=passkey,mqar", "--lengths=2,40", "--samples=2", "--generate", "--longest_window=100"]
    assert main._run(["evaluate", f"--workdir={workdir}", "--rows=2", *arguments]) == 0
    told = capsys.readouterr().out
    folder = pathlib.Path(workdir) / "evaluation"
    lines = [json.loads(line) for line in (folder / "suite_passkey_mqar.jsonl").read_text().splitlines()]
    assert (folder / "suite_passkey_mqar.png").read_bytes().startswith(b"\x89PNG")
    settings = ["as trained", "memory cleared", "memory of another document", "window long enough"]
    settings.append("continuous cache instead")
    by_task: dict[str, list[dict]] = {}
    for line in lines:
        by_task.setdefault(line["task"], []).append(line)
    # Segments of eight tokens hold three pairs; a prompt as bytes takes 290 tokens.
    assert set(by_task) == {"passkey", "segmented_mqar"}
    for found in by_task.values():
        assert list(dict.fromkeys(line["setting"] for line in found)) == settings
    assert [line["segments"] for line in by_task["passkey"]] == [40] * 5
    for line in lines:
        is_window = line["setting"] == "window long enough"
        assert (line["accuracy"] is None) == (is_window and line["segments"] == 40)
        if line["accuracy"] is not None:
            assert line["bytes_carried"] == (0 if is_window else line["bytes_carried"]) and len(line["by_depth"]) == 10
        assert line["samples"] == len(line["prompts"]) == 2 and line["step"] == 2 and line["segment_length"] == LENGTH
    assert sum("generated" in line for line in lines) == 2
    assert "segmented_mqar" in told and "window long enough" in told and "own score" in told


def test_perplexity_of_key_tokens(run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    losses = {0: np.array([0.1, 5.0, 1.0, 0.5]), 1: np.array([0.2])}
    without = {0: np.array([4.0, 9.0, 1.5, 3.0]), 1: np.array([2.0])}
    chosen = long_ppl.choose(without, losses, "data", {"workdir": "w"})
    # The second token is helped, and still not predicted.
    assert chosen.positions == {0: [0, 3], 1: []} and chosen.number == 2
    found = long_ppl.figures(losses, chosen, 0)
    assert found["long_ppl"] == pytest.approx(np.exp(0.3)) and found["share"] == 2 / 5
    path = tmp_path / "key_tokens.json"
    path.write_text(chosen.to_json())
    assert long_ppl.read_key_tokens(str(path), "data") == chosen
    nothing = long_ppl.figures(losses, chosen._replace(positions={0: [], 1: []}), 0)
    assert nothing["long_ppl"] is None
    expect_error(
        capsys, [f"--workdir={run.workdir}", "--suite=long_ppl", f"--key_tokens={path}"], "is of the data data"
    )
    path.write_text("{}")
    expect_error(capsys, [f"--workdir={run.workdir}", "--suite=long_ppl", f"--key_tokens={path}"], "no file of key")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--suite=rule"], r"--suite=rule: one of own, mqar.*babilong"),
        (["--suite=own"], r"trained on no task with answers"),
        (["--suite=dictionary"], r"--suite=dictionary: for runs that are trained on such a task"),
        (["--suite=ruler", "--lengths=2"], r"nothing of it fits 2 segments of 8 tokens.*larger --lengths"),
        (["--suite=mqar", "--lengths=two"], r"--lengths=two: numbers of segments"),
        (["--suite=mqar", "--samples=1"], r"--samples=1.*from 2 to"),
        (["--suite=mqar", "--memory_sizes=0"], r"leave out --compare, --memory_sizes and --windows"),
        (["--suite=mqar,long_ppl"], r"long_ppl reads the run's own documents and stands alone"),
        (["--suite=mqar", "--key_tokens=x"], r"is for --suite=long_ppl"),
        (["--suite=long_ppl", "--samples=4"], r"--samples is not for --suite=long_ppl"),
        (["--suite=long_ppl", "--documents=nowhere"], r"nowhere"),
        (["--lengths=2"], r"--lengths goes with --suite"),
    ],
)
def test_a_mistake_is_told_in_a_line(run, capsys: pytest.CaptureFixture, arguments: list[str], pattern: str) -> None:
    expect_error(capsys, [f"--workdir={run.workdir}", *arguments], pattern)


def test_every_suite_has_exercises_for_its_reader() -> None:
    for data, length, suites in (
        (Passkey(), 128, ["passkey", "ruler", "babilong", "own", "mqar", "published_mqar"]),
        (MQAR, 16, ["own", "mqar"]),
        (SOURCES[1][0], 24, ["own", "dictionary"]),
        (SOURCES[2][0], 24, ["own", "facts"]),
        (Ruler(), 512, ["own", "ruler"]),
    ):
        reader = catalogue.Reader(data, max(data.vocab_size, 64), length)
        for suite in suites:
            found = catalogue.exercises([suite], reader, [4, 2], 3)
            assert found and all(each.source.num_eval_documents == 3 for each in found)
            assert len({(each.task, *each.settings.values()) for each in found}) == len(found)
    with_all = catalogue.exercises(["ruler"], catalogue.Reader(Ruler(), 2000, 512), [4], 3)
    assert len(with_all) == 11 and {"cwe@ours", "vt"} < {each.task for each in with_all}


def test_the_table_has_a_row_an_exercise() -> None:
    spans = spans_of(MQAR, 8)
    segments = read_by(MQAR, 8, lambda batch: np.ones(batch.targets.shape[::2], bool))
    found = figures(spans, answers_of(spans, segments, 24), 0)
    about = {"task": "mqar", "pairs": 3, "segments": 3, "distance": [2, 2], "chance": 0.031}
    lines = [about | {"setting": "as trained"} | found, about | {"setting": "window long enough", "accuracy": None}]
    row = summary.table(lines).splitlines()[2]
    assert row.split() == ["mqar", "3", "3", "2", "0.031", "1.000", "[1.000,", "1.000]", "-"]
    assert summary.depth_by_length(lines[:1]).startswith(b"\x89PNG")
