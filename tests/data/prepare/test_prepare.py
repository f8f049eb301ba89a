"""`memorizing prepare`: corpus -> TFDS -> seqio Task -> token cache. The one test module that imports TensorFlow."""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memorizing import main
from memorizing.data import documents
from memorizing.data.corpora.github import GithubReader
from memorizing.data.documents import SEPARATOR
from memorizing.data.errors import DataError
from memorizing.data.prepare import command as prepare_lib
from memorizing.data.prepare import tokenising
from memorizing.data.streams.sources import CachedCorpus
from memorizing.data.tokens import staging, token_cache, vocabulary

SPM_TASK = "github_spm400"
# What SentencePiece, tf.data or a normaliser might change.
HARD_TEXT = "\tx  =  '\u2581 \x01 e\u0301 漢 \ufb01 \U0001f600'\r\n\n\n   </s> \u2028 <0x41>  "


def run(*flags):
    """Runs the command, in this process unless the flags say otherwise."""
    parser = argparse.ArgumentParser()
    prepare_lib.add_arguments(parser)
    return prepare_lib.run(parser.parse_args(["--processes=1", *flags]))


def run_command(*flags):
    """The same as users run it: with mistakes in flags told in a line."""
    return main._run(["prepare", "--processes=1", *flags])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for index in range(12):
        folder = root / f"répository {index}"
        (folder / "node_modules").mkdir(parents=True)
        (folder / "node_modules" / "vendored.ts").write_text("left out")
        (folder / "LICENSE").write_text("SPDX-License-Identifier: MIT\n")
        (folder / "hard.py").write_bytes(HARD_TEXT.encode())
        body = "".join(f"def function_{index}_{n}(self):\n    return {n}\n\n" for n in range(200 * (index + 1)))
        (folder / "long.py").write_text(body)
    return root


@pytest.fixture(scope="module", params=["github_bytes", SPM_TASK])
def cache_path(request, corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / request.param
    assert run(f"--task={request.param}", f"--source={corpus}", f"--output={path}", "--validation_fraction=0.25") == 0
    return str(path)


def test_cache_holds_every_document_byte_for_byte(corpus, cache_path):
    cache = token_cache.open_cache(cache_path)
    texts = {document.key: document.text for document in documents.read_all(GithubReader(str(corpus)))}
    assert len(texts) == 12 and HARD_TEXT + SEPARATOR in "".join(texts.values()) + SEPARATOR
    found = {}
    for name, expected in (("train", 9), ("validation", 3)):
        split = cache.split(name)
        assert len(split) == expected
        for index in range(len(split)):
            tokens = split.tokens(index)
            text = texts[split.key(index)]
            assert cache.vocabulary.decode(tokens) == text
            # The Task's tokens are those of our own vocabulary, ended once.
            np.testing.assert_array_equal(tokens, [*cache.vocabulary.encode(text), vocabulary.EOS_ID])
            assert split.num_bytes[index] == len(text.encode())
            found[split.key(index)] = text
    assert found == texts


def test_cache_tells_what_it_is(corpus, cache_path):
    metadata = json.loads((pathlib.Path(cache_path) / "cache.json").read_text())
    assert metadata["task"] == os.path.basename(cache_path)
    assert metadata["source"] == str(corpus)
    assert metadata["skipped"] == {"vendored or excluded directory": 12}
    assert metadata["splits"]["train"]["documents"] == 9
    assert metadata["vocabulary"]["name"] == metadata["task"].removeprefix("github_")


def test_same_source_and_settings_make_the_same_bytes(corpus, cache_path, tmp_path):
    again = tmp_path / "again"
    run(
        f"--task={os.path.basename(cache_path)}",
        f"--source={corpus}",
        f"--output={again}",
        "--validation_fraction=0.25",
    )
    files = {file.name: file.read_bytes() for file in pathlib.Path(cache_path).iterdir()}
    assert {file.name: file.read_bytes() for file in again.iterdir()} == files


def test_vocabulary_is_trained_on_the_training_split_only(corpus, tmp_path):
    changed = tmp_path / "corpus"
    shutil.copytree(corpus, changed)
    flags = f"--task={SPM_TASK}", f"--source={changed}", "--validation_fraction=0.25"
    run(*flags, f"--output={tmp_path / 'before'}")
    before = token_cache.open_cache(str(tmp_path / "before"))
    held_out = before.split("validation").key(0)
    (changed / held_out / "long.py").write_text("entirely other words\n" * 500)
    run(*flags, f"--output={tmp_path / 'after'}")
    after = token_cache.open_cache(str(tmp_path / "after"))
    assert after.vocabulary.digest == before.vocabulary.digest
    assert after.fingerprint != before.fingerprint


def test_ids_are_those_of_seqio(cache_path):
    seqio = pytest.importorskip("seqio", reason="there is no seqio for every Python and platform")

    cache = token_cache.open_cache(cache_path)
    if cache.metadata["task"] == "github_bytes":
        theirs = seqio.ByteVocabulary()
    else:
        theirs = seqio.SentencePieceVocabulary(os.path.join(cache_path, vocabulary.MODEL_FILE), extra_ids=0)
    ours = cache.vocabulary
    text = HARD_TEXT.replace("\u2581", "").replace("\x01", "")
    assert ours.encode(text).tolist() == theirs.encode(text) == theirs.encode_tf(text).numpy().tolist()
    assert ours.size == theirs.vocab_size
    assert (theirs.pad_id, theirs.eos_id, theirs.unk_id) == (vocabulary.PAD_ID, vocabulary.EOS_ID, vocabulary.UNK_ID)


def test_a_cache_that_is_there_is_kept(corpus, cache_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in pathlib.Path(cache_path).iterdir()}
    task = os.path.basename(cache_path)
    assert run(f"--task={task}", f"--source={corpus}", f"--output={cache_path}", "--validation_fraction=0.25") == 0
    assert "is there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in pathlib.Path(cache_path).iterdir()} == before
    # Not silently taken for another one.
    for flags, told in (
        ([f"--task={task}", "--source=stdlib"], "source="),
        ([f"--task={task}", f"--source={corpus}"], "validation_fraction=0.25"),
        (["--task=github_spm999", f"--source={corpus}"], f"of {task}, not of github_spm999"),
    ):
        assert run(*flags, f"--output={cache_path}") == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--source=missing"], "missing"),
        (["--source=empty"], "no document"),
        (["--source=single"], "2 are needed"),
        (["--task=gitlab_bytes"], "'github'"),
        (["--task=github"], "github_spm2048"),
        (["--task=github_spm999999"], "999999 pieces"),
        (["--validation_fraction=1.5"], "validation_fraction=1.5"),
        (["--output=file/cache"], "file/cache"),
        (["--output=full"], "full"),
        (["--output=full", "--overwrite"], "full"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(corpus, tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for folder, name in (("empty", "notes.txt"), ("full", "thesis.tex"), ("single/repo", "a.py")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("x = 1\n" * 1000)
    (tmp_path / "single/repo/LICENSE").write_text("SPDX-License-Identifier: MIT\n")
    before = sorted(tmp_path.rglob("*"))
    assert run_command("--task=github_bytes", f"--source={corpus}", "--output=cache", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memorizing: ") and told in line
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_a_cache(corpus, tmp_path):
    flags = "--task=github_bytes", f"--source={corpus}", f"--output={tmp_path / 'cache'}"
    assert run(*flags) == 0
    assert len(token_cache.open_cache(str(tmp_path / "cache")).split("validation")) == 1
    assert run(*flags, "--validation_fraction=0.5", "--overwrite") == 0
    assert len(token_cache.open_cache(str(tmp_path / "cache")).split("validation")) == 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def content(folder):
    return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


@pytest.fixture
def small_parts(monkeypatch):
    """Every repository is a part of its own, in both readings."""
    monkeypatch.setattr(tokenising, "_MIN_PART_BYTES", 1)


@pytest.fixture(scope="module")
def in_parts(corpus, tmp_path_factory):
    """A cache of many parts, made by one process in one go."""
    output = tmp_path_factory.mktemp("in_parts") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "_MIN_PART_BYTES", 1)
        assert run(f"--task={SPM_TASK}", f"--source={corpus}", f"--output={output}") == 0
    assert len(list(output.glob("*.array_record"))) == 12
    return output


def test_number_of_processes_changes_nothing(corpus, in_parts, small_parts, tmp_path, capfd):
    output = tmp_path / "cache"
    assert run(f"--task={SPM_TASK}", f"--source={corpus}", f"--output={output}", "--processes=2") == 0
    assert content(output) == content(in_parts)
    out, err = capfd.readouterr()
    assert "tokenising: 12 documents" in out and not err


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_beam_makes_the_same_bytes(corpus, in_parts, small_parts, tmp_path, mode):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install 'memorizing[prep]'")
    output = tmp_path / "cache"
    beam = [f"--beam=--{option}" for option in ("direct_num_workers=2", f"direct_running_mode={mode}")]
    assert run(f"--task={SPM_TASK}", f"--source={corpus}", f"--output={output}", *beam) == 0
    assert content(output) == content(in_parts)


def test_mistakes_are_told_in_a_line_by_beam_too(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install 'memorizing[prep]'")
    monkeypatch.setattr(
        GithubReader,
        "documents",
        lambda self, *at: iter([documents.Document("key", "text", {"split": "dev"})]),
    )
    flags = "--task=github_bytes", f"--source={corpus}", f"--output={tmp_path / 'cache'}"
    assert run(*flags, "--beam=--direct_num_workers=1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "memorizing: document 'key' is in the split 'dev': the splits are train, validation, test"
    assert list(tmp_path.iterdir()) == []


def test_beam_that_is_missing_is_told(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam.options", None)
    assert run(f"--source={corpus}", f"--output={tmp_path / 'cache'}", "--beam=--runner=DirectRunner") == 2
    assert "pip install 'memorizing[prep]'" in capsys.readouterr().err


@pytest.mark.parametrize("stopped_at", ["survey-00003.npz", "vocabulary.model", "part-00002.npz", "train.index.npz"])
def test_whoever_was_stopped_goes_on_where_he_was(
    corpus, in_parts, small_parts, tmp_path, monkeypatch, capsys, stopped_at
):
    output = tmp_path / "cache"
    flags = f"--task={SPM_TASK}", f"--source={corpus}", f"--output={output}"
    publish = staging.publish

    def stop(local, target):
        if os.path.basename(target) == stopped_at:
            raise OSError("No space left on device")
        publish(local, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(staging, "publish", stop)
        run(*flags)
    assert not output.exists()
    read = []
    documents = GithubReader.documents
    monkeypatch.setattr(GithubReader, "documents", lambda self, *at: read.append(at[0]) or documents(self, *at))
    capsys.readouterr()
    assert run(*flags) == 0
    assert content(output) == content(in_parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    # Of the 24 readings of a repository those that were done are not done again.
    done = {"survey-00003.npz": 3, "vocabulary.model": 12, "part-00002.npz": 14, "train.index.npz": 24}[stopped_at]
    assert len(read) == 24 - done
    assert f"{done - 12 if done > 12 else min(done, 12)} of 12 parts were done before" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["text", "one more", "one less"])
def test_a_source_that_changes_between_the_readings_is_told(corpus, small_parts, tmp_path, monkeypatch, capsys, change):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    run_reading = tokenising.Tokenising.__call__

    def changing(self, part, advance):
        if part.number == 1 and change == "text":
            (copy / part.shards[0].name / "hard.py").write_text("something else")
        elif part.number == 1:
            documents, count = GithubReader.documents, 2 if change == "one more" else 0
            monkeypatch.setattr(GithubReader, "documents", lambda self, *at: iter([*documents(self, *at)] * count))
        run_reading(self, part, advance)

    monkeypatch.setattr(tokenising.Tokenising, "__call__", changing)
    flags = "--task=github_bytes", f"--source={copy}", f"--output={tmp_path / 'cache'}"
    assert run(*flags) == 2
    assert "has changed while it was read" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_prepare_leaves_no_cache_and_no_process(corpus, in_parts, small_parts, tmp_path, kill):
    output = tmp_path / "cache"
    flags = [f"--task={SPM_TASK}", f"--source={corpus}", f"--output={output}"]
    command = [sys.executable, "-m", "memorizing.data.prepare", *flags, "--processes=3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    # Unlike rglob, os.walk does not mind a folder that goes while it looks.
    while not any(name.startswith("survey-") for _, _, names in os.walk(tmp_path) for name in names):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, kill)
    assert process.wait() != 0
    assert not output.exists() and not token_cache.exists(str(output))
    # The others of its session are gone too.
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process is left")
    if kill == signal.SIGKILL:
        assert run(*flags) == 0
        assert content(output) == content(in_parts)


def test_two_documents_of_one_key_are_told(corpus, tmp_path, monkeypatch, capsys):
    documents = GithubReader.documents
    monkeypatch.setattr(
        GithubReader, "documents", lambda self, *at: (found._replace(key="same") for found in documents(self, *at))
    )
    assert run(f"--source={corpus}", f"--output={tmp_path / 'cache'}") == 2
    assert "two documents have the key 'same'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_divides_the_documents(corpus, tmp_path, capsys):
    keys = [f"répository {index}" for index in range(12)]
    path = tmp_path / "splits.tsv"
    path.write_text("".join(f"{key}\t{split}\n" for key, split in zip(keys, ["test", "validation"], strict=False)))
    flags = "--task=github_bytes", f"--source={corpus}", f"--output={tmp_path / 'cache'}", f"--splits={path}"
    assert run(*flags) == 2
    assert "'répository 10' is not in the file" in capsys.readouterr().err
    assert run(*flags, "--default_split=train") == 0
    cache = token_cache.open_cache(str(tmp_path / "cache"))
    found = {
        name: [cache.split(name).key(i) for i in range(len(cache.split(name)))] for name in cache.metadata["splits"]
    }
    assert found == {"train": sorted(keys[2:]), "validation": [keys[1]], "test": [keys[0]]}
    whole = path.read_text()
    # A document that was to be held out, and is not found, would be trained on.
    path.write_text(f"{whole}répositry 3\tvalidation\n")
    assert run(*flags, "--default_split=train", "--overwrite") == 2
    assert re.search(
        r"no document has: 1, such as 'répositry 3'; the nearest is 'répository 3'", capsys.readouterr().err
    )
    path.write_text(f"{whole}répositry 3\ttrain\n")
    assert run(*flags, "--default_split=train", "--overwrite") == 0
    assert "that no document has: 1, such as 'répositry 3'" in capsys.readouterr().out
    path.write_text(whole)
    assert run(*flags, "--default_split=test", "--overwrite") == 2
    assert "no document is in the split 'train'" in capsys.readouterr().err
    assert run(f"--source={corpus}", f"--output={tmp_path / 'other'}", "--splits=official") == 2
    assert "of no official split; give --splits=hash" in capsys.readouterr().err


def test_a_vocabulary_is_trained_alone_and_used_again(corpus, in_parts, tmp_path, capsys):
    path = tmp_path / "spm.model"
    flags = f"--task={SPM_TASK}", f"--source={corpus}"
    assert run(*flags, "--vocab", f"--output={path}") == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["spm.model"]
    # It is the one that a cache gets that trains its own.
    assert (in_parts / "vocabulary.model").read_bytes() == path.read_bytes()
    assert run(*flags, "--vocab", f"--output={path}") == 2
    assert "is there already" in capsys.readouterr().err
    output = tmp_path / "cache"
    assert run(*flags, f"--vocabulary={path}", f"--output={output}", "--validation_fraction=0.5") == 0
    assert (output / "vocabulary.model").read_bytes() == path.read_bytes()
    assert run(*flags, f"--vocabulary={path}", f"--output={output}", "--validation_fraction=0.5") == 0
    other = tmp_path / "other.model"
    other.write_bytes(vocabulary.train([f"some {n} other {n * n} words" for n in range(999)], 400).model)
    capsys.readouterr()
    for changed, told in (
        ([f"--task={SPM_TASK}", f"--vocabulary={other}", f"--output={output}"], "of another vocabulary than"),
        (["--task=github_spm500", f"--vocabulary={path}"], "has 400 pieces: give --task=github_spm400"),
        (["--task=github_bytes", f"--vocabulary={path}"], "github_bytes is of bytes"),
        (["--task=github_bytes", "--vocab", "--output=x"], "bytes need no vocabulary"),
        ([f"--task={SPM_TASK}", f"--vocabulary={tmp_path / 'no'}"], "cannot be read as a SentencePiece model"),
        ([f"--task={SPM_TASK}", f"--vocabulary={__file__}"], "cannot be read as a SentencePiece model"),
        ([f"--task={SPM_TASK}", "--processes=0"], "--processes=0"),
    ):
        assert run_command(f"--source={corpus}", f"--output={tmp_path / 'new'}", *changed) == 2, changed
        assert told in capsys.readouterr().err


def test_source_makes_its_cache_in_another_process(corpus, tmp_path, monkeypatch, capfd):
    path = tmp_path / "cache"
    source = CachedCorpus("github_bytes", str(corpus), str(path))
    assert source.vocab_size == 259
    assert len(source.document_bytes) == 1
    assert "12 documents" in capfd.readouterr().out
    # It is there now: nothing is run again.
    monkeypatch.setattr(subprocess, "run", None)
    assert CachedCorpus("github_bytes", str(corpus), str(path)).identity == source.identity


def test_source_passes_on_why_its_cache_cannot_be_made(tmp_path):
    source = CachedCorpus("github_bytes", str(tmp_path / "nowhere"), str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"github_bytes could not be prepared: no folder .*nowhere.*; give a folder"):
        source.prepare()
    assert list(tmp_path.iterdir()) == []
