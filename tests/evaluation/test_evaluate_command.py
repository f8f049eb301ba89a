"""`memorizing evaluate`: whole documents with several memories, and intervals over documents.

And two runs side by side, and every mistake in a line.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from tiny_texts import LENGTH, MEMORY, TinyTexts, expect_error, finished_run

from memorizing import main
from memorizing.commands import evaluate
from memorizing.config.runs import open_run
from memorizing.evaluation import bootstrap
from memorizing.evaluation.inspection.document import DocumentTokens
from memorizing.evaluation.inspection.lookups import read_with_memory
from memorizing.runtime.workdir import seal

SIZES = (0, MEMORY, 64)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Under a name that shells, gin and formats of strings could take for something else."""
    return finished_run(tmp_path_factory.mktemp("runs") / "50% of 'my' run = {ünfinished} #1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run without a memory, with another seed."""
    return finished_run(tmp_path_factory.mktemp("plain"), model_file="models/transformer_tiny.gin", seed=1)


@pytest.fixture(scope="module")
def result(workdir: str) -> dict:
    arguments = ["evaluate", f"--workdir={workdir}", "--memory_sizes=" + ",".join(map(str, SIZES))]
    assert main._run(arguments) == 0
    return json.loads((pathlib.Path(workdir) / "evaluation" / "evaluation.json").read_text())


def test_every_document_counts_once_with_every_memory(workdir: str, result: dict):
    """The losses are those of reading one document after another.

    Weights and documents are the same for all memories.
    """
    assert list(result["evaluations"]) == [f"memory {size}" for size in SIZES]
    run, data = open_run(workdir), TinyTexts()
    assert result["step"] == run.step == 2
    assert result["documents"]["key"] == data.document_keys()
    for size in SIZES:
        config = run.experiment.model.with_memory_size(size or LENGTH)
        alone = [
            read_with_memory(
                config, run.params, {}, DocumentTokens(data.document_tokens(i), 0), LENGTH, is_cleared=size == 0
            ).nats.astype(np.float64)
            for i in range(3)
        ]
        figures = result["evaluations"][f"memory {size}"]
        np.testing.assert_allclose(figures["by_document"], [each.mean() for each in alone], rtol=1e-5)
        total = sum(each.sum() for each in alone)
        assert figures["tokens"] == data.document_bytes.sum() == sum(map(len, alone))
        assert figures["bits_per_byte"] == pytest.approx(total / np.log(2) / data.document_bytes.sum(), rel=1e-5)
        assert figures["word_perplexity"] == pytest.approx(np.exp(total / data.document_words.sum()), rel=1e-4)
        whole = np.concatenate([each[2 * LENGTH : 4 * LENGTH] for each in alone])
        (place,) = [place for place in figures["by_position"] if place["from"] == 2 * LENGTH]
        assert place["tokens"] == len(whole)
        assert place["loss"] == pytest.approx(whole.mean(), rel=1e-5)


def test_a_memory_changes_nothing_before_it_is_needed(result: dict):
    """Bins that end before the smaller memory loses something have the same loss; later ones do not.

    The same up to the rounding of the search's products.
    """
    small, large = (
        [place["loss"] for place in result["evaluations"][f"memory {size}"]["by_position"]] for size in (MEMORY, 64)
    )
    starts = [place["from"] for place in result["evaluations"]["memory 64"]["by_position"]]
    assert starts == [0, 8, 16, 32, 64, 128]
    np.testing.assert_allclose(small[:2], large[:2], rtol=1e-6)
    assert (np.abs(np.subtract(small, large))[3:] > 1e-4).all()


def test_what_is_left_in_the_workdir_and_told(
    workdir: str, result: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The workdir may be given by a path from the folder that the user is in."""
    folder = pathlib.Path(workdir) / "evaluation"
    for name in ("loss_by_position.png", "loss_by_memory.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(pathlib.Path(workdir).parent)
    relative = pathlib.Path(workdir).name
    assert main._run(["evaluate", f"--workdir={relative}", f"--memory_sizes={MEMORY}", "--step=1", "--rows=1"]) == 0
    told = capsys.readouterr().out
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["step"] == 1
    figures = again["evaluations"][f"memory {MEMORY}"]
    assert figures["loss"] != result["evaluations"][f"memory {MEMORY}"]["loss"]
    low, high = figures["perplexity_interval"]
    assert low < figures["perplexity"] < high
    assert f"{figures['perplexity']:.3f}  [{low:.3f}, {high:.3f}]" in told


def test_the_controls_are_told_unless_sizes_are_named(
    workdir: str, plain: str, result: dict, capsys: pytest.CaptureFixture
):
    """A cache that is the baseline itself is not told twice."""
    with_cache = "--gin.LMConfig.continuous_cache=@ContinuousCache()"
    sized = f"--gin.ContinuousCache.memory_size={MEMORY}"
    memories = ["memory 0", f"memory {MEMORY}", f"memory {4 * MEMORY}"]
    for arguments, names in (
        ([workdir], [*memories, "memory of another document", "continuous cache instead"]),
        ([workdir, with_cache, sized], [*memories, "memory of another document", "continuous cache instead"]),
        ([plain], ["context reset every segment", "as trained", "continuous cache instead"]),
        ([plain, with_cache, sized], [*memories, "memory of another document"]),
    ):
        folder, *bindings = arguments
        assert main._run(["evaluate", f"--workdir={folder}", *bindings]) == 0
        told = capsys.readouterr().out
        summary = json.loads((pathlib.Path(folder) / "evaluation" / "evaluation.json").read_text())
        assert list(summary["evaluations"]) == names
        assert all(f"{name}: perplexity" in told for name in names)
        if folder == workdir and not bindings:
            trained = result["evaluations"][f"memory {MEMORY}"]["loss"]
            assert summary["evaluations"][f"memory {MEMORY}"]["loss"] == pytest.approx(trained, rel=1e-6)


def test_controls_see_no_further_than_the_longest_document(workdir: str):
    """What sees more gives the same, and takes longer."""
    finished, texts = open_run(workdir), TinyTexts()
    longest = max(len(texts.document_tokens(index)) for index in range(texts.num_eval_documents))
    whole = -(-longest // LENGTH) * LENGTH
    assert evaluate._needed(finished, MEMORY) == MEMORY < longest
    assert evaluate._needed(finished, 2 * whole) == whole
    assert evaluate._larger(finished, MEMORY) == [4 * MEMORY]
    assert evaluate._larger(finished, whole - LENGTH) == [4 * (whole - LENGTH)]
    assert evaluate._larger(finished, whole) == []


def test_a_local_attention_that_sees_further_in_the_place_of_a_memory(
    workdir: str, result: dict, capsys: pytest.CaptureFixture
):
    """With windows longer than the documents the losses are those of attention to all of a document."""
    arguments = [f"--workdir={workdir}", f"--memory_sizes={MEMORY}", "--windows=8,256,512"]
    assert main._run(["evaluate", *arguments]) == 0
    assert "window of 512: perplexity" in capsys.readouterr().out
    told = json.loads((pathlib.Path(workdir) / "evaluation" / "evaluation.json").read_text())["evaluations"]
    assert list(told) == [f"memory {MEMORY}", "window of 8", "window of 256", "window of 512"]
    assert told["window of 256"]["loss"] == pytest.approx(told["window of 512"]["loss"], rel=1e-6)
    assert abs(told["window of 8"]["loss"] - told["window of 256"]["loss"]) > 1e-4
    # The first segment has nothing before it.
    first = [figures["by_position"][0]["loss"] for figures in [*told.values(), result["evaluations"]["memory 0"]]]
    np.testing.assert_allclose(first, first[0], rtol=1e-6)


def test_two_runs_document_by_document(
    tmp_path: pathlib.Path, workdir: str, plain: str, result: dict, capsys: pytest.CaptureFixture
):
    for first, second in ((workdir, plain), (plain, workdir)):
        assert main._run(["evaluate", "--compare", first, second]) == 0
    there, back = (
        json.loads((pathlib.Path(first) / "evaluation" / f"compare_with_{pathlib.Path(second).name}.json").read_text())
        for first, second in ((workdir, plain), (plain, workdir))
    )
    trained = result["evaluations"][f"memory {MEMORY}"]
    np.testing.assert_allclose(there["runs"]["A"]["by_document"], trained["by_document"], rtol=1e-6)
    by_document = np.subtract(there["runs"]["A"]["by_document"], there["runs"]["B"]["by_document"])
    np.testing.assert_allclose(there["difference"]["by_document"], by_document, rtol=1e-6)
    assert there["difference"]["loss"] == pytest.approx(-back["difference"]["loss"])
    low, high = there["difference"]["interval"]
    np.testing.assert_allclose(back["difference"]["interval"], [-high, -low])
    assert f"difference {there['difference']['loss']:+.4f}" in capsys.readouterr().out
    changed = finished_run(tmp_path / "changed", "TinyTexts.seed=1")
    expect_error(capsys, ["--compare", workdir, changed], "TinyTexts.*seed=0.*seed=1")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--memory_sizes=12"], r"--memory_sizes.*12.*multiple.*8"),
        (["--memory_sizes=many"], r"--memory_sizes=many.*numbers"),
        (["--rows=0"], r"--rows=0"),
        (["--step=7"], r"no step 7.*1, 2"),
        (["--compare", "a", "b"], r"leave out --workdir"),
        (["--windows=many"], r"--windows=many: numbers of tokens"),
        (["--windows=0"], r"--windows=0: XLAttention.window = 0: at least 1 position"),
        # A configuration that is not the checkpoint's.
        (["--gin.LMConfig.embed_dim=32"], r"embedder/table.*\(259, 16\).*\(259, 32\)"),
        (["--gin.LMConfig.num_layers=3"], r"no params/layer_02"),
        (["--gin.LMConfig.attention_at=()"], r"no place for.*gate"),
        (["--gin.LMConfig.embed_dmi=32"], r"did you mean LMConfig.embed_dim"),
        # Another vocabulary, of the same size.
        (["--gin.TinyTexts.is_shifted=True"], r"vocabulary.*bytes.*shifted"),
    ],
)
def test_a_mistake_is_told_in_a_line(workdir: str, capsys: pytest.CaptureFixture, arguments: list[str], pattern: str):
    expect_error(capsys, [f"--workdir={workdir}", *arguments], pattern)


def test_a_folder_without_a_run_is_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    expect_error(capsys, [f"--workdir={tmp_path}"], "holds no run.*memorizing train")
    run = pathlib.Path(finished_run(tmp_path / "run"))
    for folder in (run / "checkpoints").iterdir():
        folder.rename(run / f"away_{folder.name}")
    expect_error(capsys, [f"--workdir={run}"], "no checkpoint")
    assert not (run / "evaluation").exists()


def test_a_damaged_checkpoint_is_told_and_the_one_before_can_be_used(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
    run = pathlib.Path(finished_run(tmp_path / "run"))
    record = run / "checkpoints" / "2" / "data" / "metadata"
    data = json.loads(record.read_text())
    # To the comparison the same as a flipped bit of the array, wherever Orbax keeps it.
    data["checksums"]["state"]["params/final_norm/scale"] ^= 1
    del data["sha256"]
    record.write_text(json.dumps(seal(data)))
    expect_error(capsys, [f"--workdir={run}"], r"checkpoints/2 .*checksum.*params/final_norm/scale.*--step=1")
    assert open_run(str(run), step=1).step == 1
    for file in (run / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    expect_error(capsys, [f"--workdir={run}", "--step=1"], r"checkpoints/1 cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("vocabulary.json", '{"name": "by', r"vocabulary.json is damaged.*delete it"),
        ("vocabulary.json", "{}", r"vocabulary.json is damaged"),
        ("vocabulary.json", "\x00" * 80, r"vocabulary.json is damaged"),
        ("config.gin", "LMConfig.embed_dim = ", r"config.gin is not as it was written.*--gin.NAME=VALUE"),
    ],
    ids=["cut short", "empty object", "zeros", "configuration"],
)
def test_a_damaged_record_is_told(workdir: str, capsys: pytest.CaptureFixture, name: str, content: str, pattern: str):
    record = pathlib.Path(workdir) / name
    whole = record.read_bytes()
    record.write_text(content)
    try:
        expect_error(capsys, [f"--workdir={workdir}"], pattern)
    finally:
        record.write_bytes(whole)


def test_intervals_cover_what_they_should():
    """Of 200 made-up corpora of 40 documents of very different length: the share of intervals with the true loss."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        tokens = np.exp(rng.normal(6, 1, 40)).round() + 1
        # Documents differ: their own losses scatter around 2.
        nats = tokens * rng.normal(2, 0.5, 40)
        low, high = bootstrap.ratio_interval(nats, tokens)
        covered += low <= 2 <= high
    assert 0.84 < covered / 200 < 0.99


def test_intervals_of_few_documents():
    assert np.isnan(bootstrap.ratio_interval(np.ones(1), np.ones(1))).all()
    np.testing.assert_allclose(bootstrap.ratio_interval(np.array([2.0, 6.0]), np.array([1.0, 3.0])), [2, 2])
    # A bin that one document alone reaches has none; its neighbour has.
    nats, tokens = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
    low, high = bootstrap.ratio_interval(nats, tokens)
    assert [low[0], high[0]] == [1, 3]
    assert np.isnan([low[1], high[1]]).all()
