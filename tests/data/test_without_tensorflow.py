"""Documents are prepared, trained on, evaluated and written on where TensorFlow and seqio are missing.

The demo's and published corpora too: `tasks/test_seqio_tasks.py` holds their caches against those of seqio.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from raw_corpora import write

from memorizing.data.tokens import token_cache

SCRIPT = """
import contextlib, io, json, sys
from memorizing import main

ended = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main._run(arguments)
    ended.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""
# Python imports it first of all, also in the process that the command starts to prepare the documents.
HIDING = """
import sys
for name in ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "t5", "apache_beam"):
    sys.modules[name] = None
"""
TINY = (
    *("VOCAB_SIZE=259", "CachedCorpus.task='bytes'", "STEPS=2", "Cosine.warmup_steps=1", "LMConfig.num_layers=1"),
    *("LMConfig.embed_dim=8", "LMConfig.num_heads=1", "LMConfig.head_dim=8", "LMConfig.mlp_dim=8"),
    *("LMConfig.attention_at=()", "LMConfig.continuous_cache=None"),
    *("BatchConfig.segment_length=8", "BatchConfig.tokens_per_step=16"),
)
COMMANDS = {
    "train": ["train", "--gin_file=demo", "--gin.SOURCE=notes", *(f"--gin.{binding}" for binding in TINY)],
    "evaluate": ["evaluate", "--documents=new"],
    "generate": ["generate", "--prompt=note", "--num_tokens=4"],
    "no folder": ["evaluate", "--documents=nowhere"],
    "no document": ["evaluate", "--documents=notes/*.png"],
    "a seqio Task": ["prepare", "--task=github_spm300", "--source=repositories", "--output=c"],
}


LICENCE = "SPDX-License-Identifier: MIT"
CODE = "".join(f"word{index % 97} = {index * index}\n" for index in range(400))


class Home(NamedTuple):
    """The folder in which the commands ran, and of each its exit code, standard output and standard error."""

    folder: pathlib.Path
    ended: dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    write(folder, {f"notes/{index}.txt": f"note {index}: " + "words, words\n" * 9 for index in range(5)})
    write(folder, {"new/a.txt": "never seen\n" * 9, "new/b.md": "of another kind\n" * 4, "new/c.txt": ""})
    for name in ("one", "two", "three"):
        write(folder / "repositories" / name, {"a.py": f"{name} = 1\n" + CODE, "LICENSE": LICENCE})
    (folder / "sitecustomize.py").write_text(HIDING)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "MEMORIZING_CPU_DEVICES": "1"}
    # It compiles much and runs little.
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    python = [sys.executable, "-c", SCRIPT, json.dumps(list(COMMANDS.values()))]
    ran = subprocess.run(
        python, capture_output=True, text=True, cwd=folder, env=environment | {"PYTHONPATH": str(folder)}
    )
    assert ran.returncode == 0, ran.stderr
    return Home(folder, dict(zip(COMMANDS, json.loads(ran.stdout.splitlines()[-1]), strict=True)))


def test_one_line_prepares_and_trains(home: Home):
    code, _, error = home.ended["train"]
    assert code == 0, error
    (cache,) = (home.folder / "cache" / "memorizing").glob("text_bytes-notes-*")
    assert json.loads((cache / "cache.json").read_text())["splits"]["train"]["documents"] == 4
    assert (home.folder / "runs" / "demo" / "checkpoints").is_dir()


def test_documents_that_no_cache_knows_are_evaluated_with_all_controls(home: Home):
    code, told, error = home.ended["evaluate"]
    assert code == 0, error
    assert "new: 2 documents, 165 tokens; left out: empty: 1" in told
    (folder,) = (home.folder / "runs" / "demo" / "evaluation").iterdir()
    assert folder.name.startswith("new-")
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["documents"]["key"] == ["a.txt", "b.md"] and result["documents"]["bytes"] == [99, 64]
    assert {*result["evaluations"]} == {"context reset every segment", "as trained", "continuous cache instead"}
    assert sorted(path.name for path in (home.folder / "new").iterdir()) == ["a.txt", "b.md", "c.txt"]


def test_a_published_corpus_is_prepared_without_its_task(home: Home):
    """So is the demo's, `github_spm2048`."""
    code, told, error = home.ended["a seqio Task"]
    assert code == 0, error
    assert told.count("seqio is not installed: tokenising without the seqio Task, to the same tokens\n") == 1
    cache = token_cache.open_cache(str(home.folder / "c"))
    splits = [cache.split(name) for name in cache.metadata["splits"]]
    texts = {cache.vocabulary.decode(split.tokens(index)) for split in splits for index in range(len(split))}
    assert {text.partition(" ")[0] for text in texts} == {"one", "two", "three"}
    assert all(CODE in text for text in texts)


def test_a_run_without_tensorflow_writes(home: Home):
    code, told, error = home.ended["generate"]
    assert code == 0 and told.strip(), error


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("no folder", "no file or folder 'nowhere'"),
        ("no document", "has no document; left out: nothing"),
    ],
)
def test_mistakes_are_told_in_a_line(home: Home, command: str, expected: str):
    code, _, error = home.ended[command]
    (line,) = error.strip().splitlines()
    assert code == 2 and expected in line
