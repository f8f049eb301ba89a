"""`memorizing prepare` for documents of one's own, with each kind of vocabulary, and without TensorFlow."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
import tokenizer_files
from raw_corpora import write

from memorizing import batch, main
from memorizing.data.errors import DataError
from memorizing.data.streams.sources import CachedCorpus
from memorizing.data.tasks import task_name, tensorflow_start
from memorizing.data.tokens import token_cache
from memorizing.evaluation.windows import Windows
from memorizing.synthetic import RepeatedPassages

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


def test_documents_that_no_cache_knows_are_read_whole_with_the_vocabulary_of_a_cache(folder, tmp_path):
    path = str(tmp_path / "cache")
    made = tokenizer_files.of_bytes(tmp_path / "made")
    assert prepare("--task=text_hf400", f"--source={folder}", f"--output={path}", f"--vocabulary={made}") == 0
    write(tmp_path, {"new/b.txt": "b" * 20, "new/a.md": "# a\n", "new/c.txt": ""})
    corpus = CachedCorpus("text_hf400", path=path)
    told: list[str] = []
    own = batch.with_documents(corpus, str(tmp_path / "new"), told.append)
    assert own is not None and own.vocab_size == corpus.vocab_size and own.start_id == corpus.start_id
    text = batch.text_of(own)
    assert text is not None and text.vocabulary.digest == corpus.vocabulary.digest
    assert list(text.document_keys()) == ["a.md", "b.txt"] and own.document_bytes.tolist() == [4, 20]
    read: dict[int, list[int]] = {}
    for segment, documents, _ in own.evaluation_batches(2, 8):
        for row, document in enumerate(documents):
            read.setdefault(int(document), []).extend(segment.targets[row, 0][segment.is_real[row, 0]].tolist())
    for index, expected in enumerate(("# a\n", "b" * 20)):
        assert read[index] == text.document_tokens(index).tolist() and read[index][-1] == text.vocabulary.end_id
        assert text.vocabulary.decode(read[index]) == expected
    (line,) = told
    assert ": 2 documents, " in line and line.endswith(" tokens; left out: empty: 1")
    in_windows = batch.with_documents(Windows(corpus, width=8, stride=4), str(tmp_path / "new"), told.append)
    assert isinstance(in_windows, Windows) and in_windows.source.identity == own.identity
    assert batch.with_documents(RepeatedPassages(), str(tmp_path / "new"), told.append) is None


def test_a_missing_cache_is_made_with_the_vocabulary_that_is_named(folder, monkeypatch):
    ran: list[list[str]] = []

    def run(command: list[str], **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 2, stderr="memorizing: told")

    monkeypatch.setattr(subprocess, "run", run)
    named = CachedCorpus("hf400", source=str(folder), vocabulary_file="tokenizer.json")
    with pytest.raises(DataError, match="the corpus of text_hf400 could not be prepared: told"):
        named.prepare()
    assert {"--task=text_hf400", f"--source={folder}", "--vocabulary=tokenizer.json"} < {*ran[0]}
    assert named.cache_path != CachedCorpus("hf400", source=str(folder), vocabulary_file="other.json").cache_path


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
