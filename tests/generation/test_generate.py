"""`memorizing generate` and `memorizing.load`.

A trained run reads texts, scores them as evaluation does, writes on, and keeps what it has read in a file.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

import memorizing
from memorizing import main
from memorizing.batch import Vocabulary
from memorizing.data.tokens import cache_writer, staging, token_cache
from memorizing.data.tokens import vocabulary as vocabularies
from memorizing.data.tokens.cache_writer import TokenisedDocument
from memorizing.data.tokens.vocabulary import ByteVocabulary
from memorizing.errors import UserError
from memorizing.generation import text_model
from memorizing.generation.decoding import TextDecoder
from memorizing.generation.programs import Decoder, Weights
from memorizing.generation.text_model import TextModel, TextStream
from memorizing.runtime import sharding
from memorizing.runtime.workdir import write_record
from memorizing.synthetic import RepeatedPassages
from memorizing.training.checkpoint import read_arrays

REPOSITORY = pathlib.Path(__file__).parents[2]
TEXTS = {f"document {index}": f"Die Größe von {index} ist 漢字, {index} mal 😀.\n" * (20 + index) for index in range(4)}
HELD_OUT = "Was in der Größe 7 steht, 漢字 und 😀, das steht in der Größe 7.\n" * 8
BYTES = ByteVocabulary()

CONFIG = """
include 'runs/smoke.gin'
import memorizing.data.gin_registry
Experiment.data = @CachedCorpus()
CachedCorpus.task = 'github_bytes'
CachedCorpus.path = '{cache}'
VOCAB_SIZE = 259
LMConfig.embed_dim = 16
LMConfig.head_dim = 8
LMConfig.mlp_dim = 32
KNNAttention.memory_size = 64
LoopConfig.num_steps = 12
LoopConfig.checkpoint_every = 6
"""


def write_cache(path: pathlib.Path) -> None:
    """A token cache of `TEXTS`, without TensorFlow."""

    def document(key: str, text: str) -> TokenisedDocument:
        return TokenisedDocument(key, len(text.encode()), np.append(BYTES.encode(text), BYTES.end_id))

    documents = [("train", document(*item)) for item in TEXTS.items()]
    documents += [("validation", document("held out", HELD_OUT)), ("validation", document("short", "kurz"))]
    with staging.staged(str(path), token_cache.METADATA_FILE, {}) as folder:
        index = folder.work / "part.npz"
        cache_writer.write_part(folder.path, index, 0, BYTES.size, documents)
        cache_writer.join(folder.path, [index], ["train", "validation"], "github_bytes", BYTES, {"source": "a test"})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of a few steps on bytes."""
    folder = tmp_path_factory.mktemp("generate")
    write_cache(folder / "cache")
    (folder / "run.gin").write_text(CONFIG.format(cache=folder / "cache"))
    assert main._run(["train", f"--gin_file={folder / 'run.gin'}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir: pathlib.Path) -> TextModel:
    return memorizing.load(str(workdir))


# Scores.


def test_a_document_is_scored_as_evaluation_scores_it(model: TextModel, workdir: pathlib.Path):
    """Every token once, from an empty memory, the first and the end included."""
    experiment = model.run.experiment
    decoder = Decoder(experiment.model, experiment.batch.segment_length)
    nats = []
    for text in (HELD_OUT, "kurz"):
        tokens = np.append(BYTES.encode(text), BYTES.end_id)
        weights = Weights(jax.device_put(model.run.params), {})
        nats.append(TextDecoder(decoder, weights, decoder.start(0)).read(tokens[None]).nats[0])
        score = model.score(text)
        np.testing.assert_allclose(score.nats, nats[-1][:-1], rtol=1e-5)
        assert (score.num_bytes, "".join(score.pieces[:3])) == (len(text.encode()), text[:3])
    evaluation = json.loads((workdir / "evaluation.json").read_text())["as trained"]
    np.testing.assert_allclose(np.concatenate(nats).mean(), evaluation["loss"], rtol=1e-5)
    total = np.concatenate(nats).sum(dtype=np.float64)
    assert evaluation["bits_per_byte"] == pytest.approx(total / np.log(2) / len((HELD_OUT + "kurz").encode()), rel=1e-5)


def test_a_session_scores_a_text_in_parts_as_it_does_at_once(model: TextModel):
    session, whole = model.session(), model.score(HELD_OUT)
    told: list[int] = []
    parts = [session.read(HELD_OUT[:100]), session.read(HELD_OUT[100:101]), session.read(HELD_OUT[101:], told.append)]
    np.testing.assert_allclose(np.concatenate([part.nats for part in parts]), whole.nats, rtol=1e-4, atol=1e-5)
    assert session.num_tokens == len(whole.tokens) == len(HELD_OUT.encode())
    assert told == sorted(told) and told[-1] == len(parts[2].tokens) and len(told) > 10
    assert whole.perplexity == pytest.approx(np.exp(whole.loss))
    assert whole.bits_per_byte == pytest.approx(whole.loss / np.log(2))


# Texts.


def test_samples_are_a_function_of_the_seed_and_a_session_stays_where_it_is(model: TextModel):
    session = model.session()
    session.read("Die Größe")
    first, second = session.generate(num_tokens=40, num_samples=2, seed=7)
    assert first != second
    assert session.generate(num_tokens=40, seed=7) == [first]
    assert session.generate(num_tokens=40, seed=8) != [first]
    assert model.generate("Die Größe", num_tokens=40, seed=7) == [first]
    assert session.num_tokens == len("Die Größe".encode())


def test_temperature_0_and_top_k_1_are_the_same_and_not_random(model: TextModel):
    greedy = model.generate("Die", 30, temperature=0)
    assert greedy == model.generate("Die", 30, seed=3, top_k=1) != model.generate("Die", 30, seed=3)


@pytest.mark.parametrize(
    "setting",
    [{"num_tokens": 0}, {"num_samples": 0}, {"seed": -1}, {"seed": 2**32}, {"top_p": 2.0}, {"top_k": -3}],
    ids=str,
)
def test_a_wrong_setting_is_told_at_once(model: TextModel, setting: dict):
    with pytest.raises(UserError, match=f"{next(iter(setting))} = "):
        model.session().write(**setting)


def test_a_sample_ends_where_the_model_ends_the_document():
    steps = [[3 + 65, 3 + 65], [1, 3 + 66], [3 + 65, 1], [3 + 65, 3 + 65]]
    texts = list(text_model._texts(BYTES, (np.array(step) for step in steps), 2))
    assert ["".join(sample) for sample in zip(*texts, strict=True)] == ["A", "AB"]


def test_unused_ids_are_never_written(model: TextModel):
    assert not model.allowed[[0, 2]].any() and model.allowed[[1, 3, 258]].all()


@pytest.fixture(scope="module")
def pieces() -> Vocabulary:
    lines = [line for text in TEXTS.values() for line in text.splitlines()] + ["\x01\x01 ▁ x"] * 3
    return vocabularies.train(lines, 330)


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("aöx \n\t漢😀▁\x01é0"), max_size=30), which=st.booleans())
def test_streamed_text_is_the_text_in_whole_characters(pieces: Vocabulary, text: str, which: bool):
    vocabulary = pieces if which else BYTES
    stream = TextStream(vocabulary)
    parts = [stream.add(token) for token in vocabulary.encode(text).tolist()]
    assert "".join(parts) == text and stream.end() == ""


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), which=st.booleans())
def test_whatever_tokens_a_model_draws_what_was_said_is_never_taken_back(pieces: Vocabulary, seed: int, which: bool):
    """Bytes that are no UTF-8, and escapes of nothing, occur in what a model writes."""
    vocabulary = pieces if which else BYTES
    tokens = np.random.default_rng(seed).integers(0, vocabulary.size, 60).tolist()
    stream = TextStream(vocabulary)
    parts = [stream.add(token) for token in tokens]
    content = b"".join(vocabulary.pieces(tokens))
    assert "".join(parts) + stream.end() == content.decode("utf-8", "replace")
    # No more than an incomplete character is held back.
    held_back = codecs.getincrementaldecoder("utf-8")("replace")
    assert "".join(parts) == held_back.decode(content)


# Sessions.


def test_a_saved_session_goes_on_as_if_it_had_never_ended(model: TextModel, tmp_path: pathlib.Path):
    session = model.session()
    session.read(HELD_OUT)
    session.save(str(tmp_path / "book.session"))
    # The run opened anew, as another process would.
    again = memorizing.load(str(model.run.workdir)).session(str(tmp_path / "book.session"))
    assert again.num_tokens == session.num_tokens
    assert again.generate(40, seed=2) == session.generate(40, seed=2)
    np.testing.assert_array_equal(again.read("und dann").nats, session.read("und dann").nats)
    # It remembers more than the end of the text.
    assert np.abs(model.session().read("und dann").nats - session.read("und dann").nats).max() > 1e-3


def test_a_session_of_other_weights_vocabulary_or_memory_is_refused(
    model: TextModel, workdir: pathlib.Path, tmp_path: pathlib.Path
):
    path = str(tmp_path / "book.session")
    session = model.session()
    session.read("text")
    session.save(path)
    assert set(read_arrays(epath.Path(workdir), 6)), "the older checkpoint is there"
    with pytest.raises(UserError, match="its step is 12, that of this run is 6"):
        memorizing.load(str(workdir), step=6).session(path)
    with pytest.raises(UserError, match="its model is"):
        memorizing.load(str(workdir), bindings=["KNNAttention.memory_size=128"]).session(path)
    other = TextModel(model.run)
    other.identity = {**model.identity, "vocabulary": "another"}
    with pytest.raises(UserError, match="its vocabulary is"):
        other.session(path)
    other.identity = {**model.identity, "weights": "others"}
    with pytest.raises(UserError, match="its weights is"):
        other.session(path)


def test_a_damaged_session_is_refused(model: TextModel, tmp_path: pathlib.Path):
    path = tmp_path / "book.session"
    session = model.session()
    session.read(HELD_OUT)
    session.save(str(path))
    whole = path.read_bytes()
    keys = whole.find(b"memory/keys")
    for content in (b"", b"text", whole[: len(whole) // 2], whole[: keys + 300] + b"\xff" + whole[keys + 301 :]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no session, or is damaged"):
            model.session(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        model.session(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot be written"):
        session.save(str(tmp_path / "missing" / "book.session"))
    assert not list(tmp_path.glob(".*")), "nothing half-written"


# The command.


def generate(workdir: pathlib.Path, *flags: str) -> int:
    return main._run(["generate", f"--workdir={workdir}", "--num_tokens=20", *flags])


def test_the_command_writes_on_from_a_prompt(
    model: TextModel, workdir: pathlib.Path, capsys: pytest.CaptureFixture, tmp_path: pathlib.Path
):
    expected = model.generate("Die Größe", 20, num_samples=2, seed=4, temperature=0.7)
    assert generate(workdir, "--prompt=Die Größe", "--seed=4", "--temperature=0.7") == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    assert generate(workdir, "--prompt=Die Größe", "--seed=4", "--temperature=0.7", "--num_samples=2") == 0
    out, told = capsys.readouterr()
    assert out == f"=== sample 1 of 2 ===\n{expected[0]}\n=== sample 2 of 2 ===\n{expected[1]}\n"
    assert "a memory of 64 tokens" in told and "Die Größe" in told
    file = tmp_path / "prompt.txt"
    file.write_text("Die Größe")
    assert generate(workdir, f"--prompt_file={file}", "--seed=4", "--temperature=0.7") == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_without_a_prompt_a_held_out_document_goes_on(workdir: pathlib.Path, capsys: pytest.CaptureFixture):
    assert generate(workdir) == 0
    out, told = capsys.readouterr()
    assert out and "held-out document 'held out'" in told and "read 256 tokens" in told


def test_a_book_is_read_once(
    model: TextModel, workdir: pathlib.Path, capsys: pytest.CaptureFixture, tmp_path: pathlib.Path
):
    book, saved = tmp_path / "book.txt", tmp_path / "book.session"
    book.write_text(HELD_OUT)
    assert generate(workdir, f"--prompt_file={book}", f"--save_session={saved}", "--num_tokens=0") == 0
    assert capsys.readouterr().out == ""
    assert generate(workdir, f"--session={saved}", "--prompt=Und") == 0
    assert capsys.readouterr().out == model.generate(HELD_OUT + "Und", 20)[0] + "\n"
    assert generate(workdir, f"--session={saved}") == 0
    assert capsys.readouterr().out == model.generate(HELD_OUT, 20)[0] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt="], "--prompt is empty"),
        (["--prompt_file={tmp}/empty"], "empty is empty"),
        (["--prompt_file={tmp}/picture"], "picture is not UTF-8 text: byte 0 is 0x89"),
        (["--prompt_file={tmp}/zeros"], "zeros is not text: byte 2 is 0"),
        (["--prompt_file={tmp}/missing"], "missing: cannot be read"),
        (["--prompt_file={tmp}"], "cannot be read"),
        (["--prompt=a", "--top_p=1.5"], "--top_p=1.5: expected from 0 to 1"),
        (["--prompt=a", "--temperature=-1"], "--temperature=-1: expected from 0"),
        (["--prompt=a", "--num_tokens=-1"], "--num_tokens=-1: expected from 0"),
        (["--prompt=a", "--seed=-1"], "--seed=-1: expected from 0"),
        (["--prompt=a", "--step=7"], "7"),
        (["--session={tmp}/picture"], "is no session, or is damaged"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_a_line(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "picture").write_bytes(b"\x89\xff")
    (tmp_path / "zeros").write_bytes(b"ab\0c")
    assert generate(workdir, *(flag.format(tmp=tmp_path) for flag in flags)) == 2
    out, told = capsys.readouterr()
    assert message in told.splitlines()[-1] and "Traceback" not in told and not out


def test_runs_that_cannot_write_are_told_so(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
    def refused(folder: pathlib.Path, message: str) -> None:
        assert generate(folder, "--prompt=a") == 2
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1, told

    refused(tmp_path, "holds no run")
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    record = json.loads((other / "vocabulary.json").read_text())
    write_record(epath.Path(other / "vocabulary.json"), {"name": record["name"], "digest": "0" * 64})
    refused(other, "was trained with the vocabulary bytes")
    shutil.rmtree(other / "checkpoints")
    refused(other, "checkpoint")


def test_a_run_whose_data_is_no_text_is_refused(model: TextModel):
    experiment = dataclasses.replace(model.run.experiment, data=RepeatedPassages(vocab_size=32))
    with pytest.raises(UserError, match=r"is no text \(RepeatedPassages\)"):
        TextModel(dataclasses.replace(model.run, experiment=experiment))


# Python.


def test_the_example_runs(workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    path = REPOSITORY / "examples" / "read_and_write.py"
    example = importlib.util.module_from_spec(importlib.util.spec_from_file_location("example", path))
    example.__spec__.loader.exec_module(example)
    (tmp_path / "text").write_text(HELD_OUT)
    example.main([str(workdir), str(tmp_path / "text")])
    assert "after the first half" in capsys.readouterr().out


def test_a_text_model_lies_on_all_devices_that_can_share_it(model: TextModel, monkeypatch: pytest.MonkeyPatch):
    """Heads and slots of the memory are shared; what is scored and written is that of one device."""
    query = model._weights.params["layer_01"]["attention"]["query"]["kernel"]
    assert len(query.sharding.device_set) > 1 and not query.sharding.is_fully_replicated
    one_device = sharding.mesh_for_one_row
    monkeypatch.setattr(sharding, "mesh_for_one_row", lambda *sizes: one_device(*sizes, devices=jax.devices()[:1]))
    alone = TextModel(model.run)
    assert len(alone._weights.params["embedder"]["table"].sharding.device_set) == 1
    np.testing.assert_allclose(alone.score(HELD_OUT).nats, model.score(HELD_OUT).nats, rtol=1e-4, atol=1e-5)
    written = (each.generate(HELD_OUT[:300], 20, temperature=0) for each in (model, alone))
    assert next(written) == next(written)
