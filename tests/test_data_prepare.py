"""`memorizing prepare`: corpus -> TFDS -> seqio Task -> token cache. The one test module that imports TensorFlow."""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memorizing.data import documents, token_cache, vocabulary
from memorizing.data import prepare as prepare_lib
from memorizing.data.errors import DataError
from memorizing.data.github import SEPARATOR, GithubReader
from memorizing.data.sources import CachedCorpus

SPM_TASK = "github_spm400"
# What SentencePiece, tf.data or a normaliser might change.
HARD_TEXT = "\tx  =  '\u2581 \x01 e\u0301 漢 \ufb01 \U0001f600'\r\n\n\n   </s> \u2028 <0x41>  "


def run(*flags):
    parser = argparse.ArgumentParser()
    prepare_lib.add_arguments(parser)
    return prepare_lib.run(parser.parse_args(flags))


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
    texts = {document.key: document.text for document in documents.read(GithubReader(str(corpus)))}
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
    import seqio

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


def test_task_is_registered_under_its_name(cache_path):
    import seqio

    task = seqio.TaskRegistry.get(os.path.basename(cache_path))
    assert set(task.output_features) == {"targets"}
    assert task.output_features["targets"].add_eos


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
    assert run("--task=github_bytes", f"--source={corpus}", "--output=cache", *flags) == 2
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


def test_failure_half_way_leaves_nothing(corpus, tmp_path, monkeypatch):
    write_split = prepare_lib.cache_writer.CacheWriter.write_split

    def fail_at_validation(writer, name, examples):
        if name == "validation":
            raise OSError("No space left on device")
        write_split(writer, name, examples)

    monkeypatch.setattr(prepare_lib.cache_writer.CacheWriter, "write_split", fail_at_validation)
    with pytest.raises(OSError, match="No space left"):
        run("--task=github_bytes", f"--source={corpus}", f"--output={tmp_path / 'cache'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_prepare_leaves_no_cache(corpus, tmp_path, kill):
    output = tmp_path / "cache"
    command = [sys.executable, "-m", "memorizing.data.prepare", "--task=github_bytes", f"--source={corpus}"]
    process = subprocess.Popen([*command, f"--output={output}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(kill)
    assert process.wait() != 0
    assert not output.exists() and not token_cache.exists(str(output))
    if kill == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []


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
