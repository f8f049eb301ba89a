"""`memorizing prepare` for documents of one's own, with each kind of vocabulary, and without TensorFlow."""

from __future__ import annotations

import json
import pathlib

import pytest
import tokenizer_files
from raw_corpora import write

from memorizing import main
from memorizing.data.streams.sources import CachedCorpus
from memorizing.data.tasks import task_name, tensorflow_start
from memorizing.data.tokens import token_cache

HARD_TEXT = "\tX  =  '\u2581 \x01 e\u0301 漢 \ufb01 \U0001f600'\r\n\n\n   </s> \u2028 <|endoftext|>  "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("documents")
    texts = {f"{index}.py": "\n".join(tokenizer_files.LINES[: 20 * index + 20]) for index in range(4)}
    return write(root, texts | {"hard.txt": HARD_TEXT, "again.txt": HARD_TEXT, "empty.md": "\n"})


@pytest.fixture(autouse=True)
def without_tensorflow(monkeypatch):
    def refuse():
        raise AssertionError("TensorFlow is not for documents of one's own")

    monkeypatch.setattr(tensorflow_start, "tasks", refuse)


def prepare(*flags: str) -> int:
    return main._run(["prepare", "--processes=1", *flags])


def held(path: str | pathlib.Path) -> dict[str, dict[str, str]]:
    """The texts of a cache by split and key."""
    cache = token_cache.open_cache(str(path))
    found: dict[str, dict[str, str]] = {}
    for name in cache.metadata["splits"]:
        split = cache.split(name)
        for index in range(len(split)):
            tokens = split.tokens(index)
            assert tokens[-1] == cache.vocabulary.end_id
            found.setdefault(name, {})[split.key(index)] = cache.vocabulary.decode(tokens)
    return found


@pytest.mark.parametrize("task", ["text_bytes", "text_spm400", "text_hf400"])
def test_documents_come_back_exactly_and_no_split_is_empty(folder, tmp_path, task):
    flags = [f"--vocabulary={tokenizer_files.of_bytes(tmp_path / 'made')}"] if "_hf" in task else []
    assert prepare(f"--task={task}", f"--source={folder}", f"--output={tmp_path / 'cache'}", *flags) == 0
    by_split = held(tmp_path / "cache")
    assert {name: len(texts) for name, texts in by_split.items()} == {"train": 4, "validation": 1}
    texts = by_split["train"] | by_split["validation"]
    (hard,) = {*texts} & {"hard.txt", "again.txt"}
    assert texts[hard] == HARD_TEXT
    assert texts["3.py"] == (folder / "3.py").read_text()
    metadata = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert metadata["skipped"] == {"duplicate": 1, "empty": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted({"cache", *(["made"] if flags else [])})


def test_documents_that_would_not_come_back_are_left_out(folder, tmp_path, capsys):
    # The tokenizer has no token for \x01, which stands in two of the documents.
    made = tokenizer_files.of_bytes(tmp_path / "made", size=399, lacking="\u0101")
    flags = "--task=text_hf399", f"--source={folder}", f"--output={tmp_path}/cache", f"--vocabulary={made}"
    assert prepare(*flags) == 0
    assert "characters that the vocabulary lacks: 1, duplicate: 1" in capsys.readouterr().out
    assert sum(map(len, held(tmp_path / "cache").values())) == 4


def test_all_texts_are_kept_if_they_are_to_be(folder, tmp_path):
    flags = "--task=text_bytes", f"--source={folder}", f"--output={tmp_path}/cache"
    assert prepare(*flags, "--reader.keep_duplicates=true") == 0
    assert sum(map(len, held(tmp_path / "cache").values())) == 6


def test_a_vocabulary_alone_is_a_task_of_the_source(folder, tmp_path):
    assert str(task_name.parse("spm400", str(folder))) == "text_spm400"
    assert str(task_name.parse("spm2048", "stdlib")) == str(task_name.parse("spm2048")) == "github_spm2048"
    path = str(tmp_path / "cache")
    assert prepare("--task=bytes", f"--source={folder}", f"--output={path}") == 0
    corpus = CachedCorpus("bytes", source=str(folder), path=path)
    assert corpus.identity.startswith("text_bytes-") and corpus.num_eval_documents == 1
    assert corpus == CachedCorpus("bytes", source=str(folder), path=path)


def test_what_a_cache_is_made_from_is_told(folder, tmp_path, capsys):
    made = [tokenizer_files.of_bytes(tmp_path / name, size) for name, size in (("a", 400), ("b", 390))]
    flags = [f"--source={folder}", f"--output={tmp_path}/cache"]
    assert prepare(*flags, "--task=text_hf400", f"--vocabulary={made[0]}") == 0
    assert prepare(*flags, "--task=text_hf400", f"--vocabulary={made[0]}") == 0
    assert "is there already" in capsys.readouterr().out
    for wrong, told in (
        (["--task=text_hf400", f"--vocabulary={made[1]}"], "another vocabulary"),
        (["--task=text_hf400", f"--vocabulary={made[0]}", "--end_token=<|pad|>"], "another vocabulary"),
        (["--task=text_bytes"], "text_hf400, not of text_bytes"),
    ):
        assert prepare(*flags, *wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--task=text_spm9000"], "9000 pieces"),
        (["--task=text_hf400"], "name the tokenizer"),
        (["--task=text_hf400", "--vocabulary=spm.model"], "--vocabulary=spm.model"),
        (["--task=text_hf399", "--vocabulary=TOKENIZER"], "--task=text_hf400"),
        (["--task=text_bytes", "--vocabulary=TOKENIZER"], "is of bytes"),
        (["--task=text_bytes", "--source=nowhere"], "no file or folder"),
        (["--task=text_bytes", "--reader.suffixes=png"], "other kind of file: 7"),
        (["--task=text_bytes", "--reader.document=page"], "file or folder"),
        (["--vocab", "--task=text_hf400"], "SentencePiece"),
    ],
)
def test_mistakes_are_a_line_and_leave_nothing(folder, tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    made = tokenizer_files.of_bytes(tmp_path / "made")
    flags = [flag.replace("TOKENIZER", made) for flag in flags]
    assert prepare(f"--source={folder}", "--output=cache", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memorizing: ") and told in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]
