"""More segments a row as training goes on, and the accuracy of answers: stages, stopping within them, ablations."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mechanisms import apply_model, init_params

from memorizing.batch import Batch, EvaluationBatch
from memorizing.errors import UserError
from memorizing.evaluation.evaluator import Evaluation, Evaluator, accuracy_by_reach
from memorizing.evaluation.train_and_evaluate import train_and_evaluate
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import Memorize, SyntheticWords
from memorizing.synthetic.stream import SampleStream
from memorizing.training.checkpoint import read_arrays
from memorizing.training.experiment import BatchConfig, Experiment, LoopConfig
from memorizing.training.loop import Preempted

# Stages.


@given(
    curriculum=st.dictionaries(st.integers(1, 12), st.integers(1, 5), max_size=4).map(
        lambda d: tuple(sorted(d.items()))
    ),
    num_segments=st.sampled_from([1, 2, 4]),
)
def test_the_stage_of_a_step_is_the_last_one_that_has_begun(curriculum: tuple, num_segments: int):
    batch = BatchConfig(tokens_per_step=96, segment_length=8, num_segments=num_segments, curriculum=curriculum)
    expected = num_segments
    for step in range(1, 15):
        expected = dict(curriculum).get(step, expected)
        assert batch.segments_at(step) == expected
        # The rows stay, the tokens grow.
        assert batch.tokens_at(step) == 96 // num_segments * expected


@pytest.mark.parametrize("curriculum", [((3, 2), (2, 3)), ((2, 2), (2, 3)), ((0, 2),), ((2, 0),)])
def test_an_impossible_curriculum_is_told(curriculum: tuple):
    with pytest.raises(UserError, match=r"BatchConfig\.curriculum"):
        BatchConfig(curriculum=curriculum)


# A run through the stages, stopped anywhere.

ROWS, LENGTH = 8, 12
TASK = Memorize(noise=SyntheticWords(num_words=8), num_eval_samples=8, eval_segments=2)
EXPERIMENT = Experiment(
    data=TASK,
    model=LMConfig(TASK.vocab_size, 1, 8, 1, 8, 16, recurrent_tokens=RecurrentTokens(2), dropout=0.1),
    # One segment, then 2 from step 3 on and 3 from step 5 on.
    batch=BatchConfig(ROWS * LENGTH, LENGTH, curriculum=((3, 2), (5, 3))),
    loop=LoopConfig(num_steps=6, log_every=1, checkpoint_every=0),
)


def run(experiment: Experiment, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stop_after: int = -1) -> bool:
    """Starts or continues a run, and returns whether it came to its end.

    It is told to stop while it reads that many batches (0: before it reads any).
    """
    with monkeypatch.context() as patch:
        read, seek, num_read = SampleStream.__next__, SampleStream.__init__, 0

        def count(stream: SampleStream) -> Batch:
            nonlocal num_read
            num_read += 1
            if num_read == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return read(stream)

        def open_stream(stream: SampleStream, *args: object) -> None:
            seek(stream, *args)
            if stop_after == 0:
                signal.raise_signal(signal.SIGTERM)

        # On one device: it compiles faster.
        mesh = MeshConfig().make_mesh(jax.devices()[:1])
        patch.setattr(MeshConfig, "make_mesh", lambda *_: mesh)
        patch.setattr(SampleStream, "__next__", count)
        patch.setattr(SampleStream, "__init__", open_stream)
        try:
            train_and_evaluate(experiment, str(workdir))
        except Preempted:
            return False
        return True


def contents(workdir: pathlib.Path) -> tuple[dict, dict]:
    """The last checkpoint's arrays, the checksums of all of it with the rows' positions, and the loss of every step."""
    arrays = read_arrays(epath.Path(workdir))
    newest = max((workdir / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    return arrays, json.loads((newest / "data" / "metadata").read_text()) | {"losses": losses}


def test_a_run_that_is_stopped_anywhere_is_the_run_that_never_stopped(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit: stopped exactly where a stage begins (after the steps 2 and 4) and inside one (after step 3)."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(EXPERIMENT, whole, monkeypatch)
    for steps in (2, 1, 1):
        assert not run(EXPERIMENT, stopped, monkeypatch, stop_after=steps)
    assert run(EXPERIMENT, stopped, monkeypatch)
    (arrays, rest), (stopped_arrays, stopped_rest) = contents(whole), contents(stopped)
    assert sorted(rest["losses"]) == list(range(1, 7))
    assert stopped_rest == rest
    assert arrays.keys() == stopped_arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(stopped_arrays[path], array, err_msg=path)
    # 8 rows have read a sample a step, however many segments it had.
    assert rest["rows"]["stream"] | {"first_sample": 48, "segment": 0} == rest["rows"]["stream"]


def test_a_run_that_is_stopped_before_its_first_step_still_begins_with_its_first_stage(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    batch = dataclasses.replace(EXPERIMENT.batch, curriculum=((1, 2),))
    loop = dataclasses.replace(EXPERIMENT.loop, num_steps=1)
    experiment = dataclasses.replace(EXPERIMENT, batch=batch, loop=loop)
    seen = []
    read = SampleStream.__next__
    monkeypatch.setattr(SampleStream, "__next__", lambda stream: seen.append(read(stream)) or seen[-1])
    assert not run(experiment, tmp_path, monkeypatch, stop_after=0)
    assert run(experiment, tmp_path, monkeypatch)
    assert [each.tokens.shape for each in seen] == [(ROWS, 2, LENGTH)]


# What is counted.

VOCAB, T = 16, 6
MESH = functools.cache(lambda: MeshConfig().make_mesh(jax.devices()[:1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Held-out documents [documents, U, T] side by side; the last `num_empty` rows have none."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    always_starts: bool = False
    num_empty: int = 0
    document_bytes: None = None

    def evaluation_batches(self, num_rows: int, segment_length: int) -> Iterator[EvaluationBatch]:
        document = np.arange(num_rows)
        document[num_rows - self.num_empty :] = -1
        for segment in range(self.tokens.shape[1]):
            fields = (field[:, segment : segment + 1] for field in (self.tokens, self.targets, self.weights))
            starts = np.full((num_rows, 1), self.always_starts or segment == 0)
            is_real = self.targets[:, segment : segment + 1] != 0
            batch = Batch(*fields, is_real, starts)
            yield EvaluationBatch(batch, document, np.full(num_rows, segment * segment_length))


@functools.cache
def evaluator(model: LMConfig, num_rows: int) -> tuple[Evaluator, dict]:
    params = jax.jit(lambda: init_params(model, num_rows, T, jax.random.key(0)))()
    return Evaluator(model, num_rows, T, MESH()), params


def evaluate(model: LMConfig, samples: Samples, ablation: str = "none") -> Evaluation:
    each, params = evaluator(model, len(samples.tokens))
    return each.run(params, {}, samples, ablation)


STATELESS = LMConfig(VOCAB, 1, 8, 1, 8, 16)
FIELDS = (3, 2, T)


@functools.cache
def predicted() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, 2, T] and what a model predicts from them."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, FIELDS, np.int32)
    _, params = evaluator(STATELESS, 3)

    @jax.jit
    def predict(tokens: jax.Array) -> jax.Array:
        flags, context = jnp.ones(tokens.shape, bool), STATELESS.init_context(6, T)
        output = apply_model(STATELESS, params, tokens, flags, flags[:, 0], context)
        return jnp.argmax(output.logits, axis=-1)

    return tokens, np.asarray(predict(tokens.reshape(6, T))).reshape(FIELDS)


@settings(max_examples=50)
@given(
    weights=hnp.arrays(np.float32, FIELDS, elements=st.sampled_from([0.0, 1.0, 0.5])),
    is_wrong=hnp.arrays(bool, FIELDS, elements=st.sampled_from([False, False, False, True])),
    num_empty=st.integers(0, 1),
)
def test_an_answer_is_a_run_of_weights_and_right_in_all_its_tokens(
    weights: np.ndarray, is_wrong: np.ndarray, num_empty: int
):
    tokens, right = predicted()
    targets = np.where(is_wrong | (right == 0), right % (VOCAB - 1) + 1, right).astype(np.int32)
    evaluation = evaluate(STATELESS, Samples(tokens, targets, weights, num_empty=num_empty))
    runs = []
    for document in range(3 - num_empty):
        for segment in range(2):
            in_run = False
            for position in range(T):
                place = document, segment, position
                if weights[place] and not in_run:
                    runs.append(True)
                in_run = bool(weights[place])
                if in_run and targets[place] != right[place]:
                    runs[-1] = False
    assert (evaluation.answers, evaluation.right_answers) == (len(runs), sum(runs))
    assert evaluation.accuracy == (sum(runs) / len(runs) if runs else 0)
    real = slice(3 - num_empty)
    assert evaluation.right_tokens == int(((targets == right) & (weights > 0))[real].sum())


# What the state is worth.

CARRYING = LMConfig(
    VOCAB, 1, 8, 1, 8, 16, attention=XLAttention(window=T), recurrent_tokens=RecurrentTokens(2), initial_logit_scale=4.0
)


def question_samples(num_segments: int, num_rows: int = 3) -> tuple[Samples, Samples]:
    """Documents whose last token is scored; and the same with another first segment, "the fact", in document 0."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, VOCAB, (num_rows, num_segments, T), np.int32)
    other = tokens.copy()
    other[0, 0] = rng.integers(1, VOCAB, T)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, -1, -1] = 1
    return Samples(tokens, tokens, weights), Samples(other, tokens, weights)


def changed_by_the_fact(model: LMConfig, num_segments: int, ablation: str, num_rows: int = 3) -> list[int]:
    """The documents whose answer is predicted in another way when document 0 begins in another way."""
    one, other = (evaluate(model, each, ablation).nats for each in question_samples(num_segments, num_rows))
    return np.flatnonzero(one != other).tolist()


@pytest.mark.parametrize("num_segments", [2, 3])
def test_answers_need_the_state_of_their_own_row(num_segments: int):
    """So accuracy falls to chance where the state is reset, or is another row's: it alone holds the answer."""
    assert changed_by_the_fact(CARRYING, num_segments, "none") == [0]
    assert changed_by_the_fact(CARRYING, num_segments, "state_reset") == []
    # The state goes to the next row before the segment with the answer.
    assert changed_by_the_fact(CARRYING, num_segments, "state_shuffled") == [1]


def test_a_shuffled_state_never_comes_home():
    assert 0 not in changed_by_the_fact(CARRYING, 4, "state_shuffled", num_rows=3)


def test_a_reset_state_is_a_document_a_segment():
    samples, _ = question_samples(3)
    expected = evaluate(CARRYING, dataclasses.replace(samples, always_starts=True))
    np.testing.assert_array_equal(evaluate(CARRYING, samples, "state_reset").nats, expected.nats)
    assert (evaluate(CARRYING, samples).nats != expected.nats).all()


def test_ablations_change_nothing_where_nothing_is_carried():
    samples, _ = question_samples(3)
    for ablation in ("state_reset", "state_shuffled", "memory_cleared"):
        np.testing.assert_array_equal(evaluate(STATELESS, samples, ablation).nats, evaluate(STATELESS, samples).nats)


def test_accuracy_by_reach_evaluates_samples_of_each_length():
    model = EXPERIMENT.model
    params = jax.jit(lambda: init_params(model, 4, LENGTH, jax.random.key(0)))()
    each = Evaluator(model, 4, LENGTH, MESH())
    task = dataclasses.replace(TASK, num_eval_samples=16)
    controls = {"as trained": (each, "none"), "state reset": (each, "state_reset")}
    table = accuracy_by_reach(controls, params, {}, task, (1, 3))
    assert {name: list(row) for name, row in table.items()} == {name: [1, 3] for name in controls}
    expected = each.run(params, {}, dataclasses.replace(task, eval_segments=3))
    assert expected.answers == 16
    assert table["as trained"][3] == {"answers": expected.accuracy, "tokens": expected.token_accuracy}
    # Of one segment nothing is carried.
    assert table["as trained"][1] == table["state reset"][1]
