"""A Hugging Face `tokenizer.json` is a vocabulary: its ids, and every text exactly."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizer_files
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_caches import TEXTS, write_cache
from tokenizers import normalizers

from memorizing.data.errors import DataError
from memorizing.data.tokens import token_cache, tokenizer, vocabulary_files
from memorizing.generation.text_model import TextStream

KINDS = {
    "bytes": tokenizer_files.of_bytes,
    "llama3": tokenizer_files.of_llama3,
    "spaces": tokenizer_files.of_spaces,
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(files):
    return {name: vocabulary_files.load(path) for name, path in files.items()}


@settings(max_examples=40)
@given(ANY_TEXT)
@example("")
@example(" \u2581 \x01 \x010\x011 \u2581\u2581")
@example("\ufeff\r\n\t\n  \0 </s><unk><pad><0x0A> \u2028 a\u0301<|endoftext|><|begin_of_text|><eos>")
def test_any_text_comes_back(loaded, text):
    for used in loaded.values():
        ids = used.encode(text)
        assert used.decode(ids) == text
        assert b"".join(used.pieces([*ids, used.end_id, used.start_id])) == text.encode()
        assert not set(ids.tolist()) & {used.end_id, used.start_id, *used.unused_ids}
        stream = TextStream(used)
        assert "".join(map(stream.add, ids.tolist())) + stream.end() == text


def test_ids_are_those_of_the_file(files, loaded):
    text = tokenizer_files.LINES[0] + "\n\n  x = 漢\n"
    for name, used in loaded.items():
        theirs = tokenizers.Tokenizer.from_file(files[name])
        ids = theirs.encode(text, add_special_tokens=False).ids
        # Llama 2 puts a space before a text, which is left out.
        assert used.encode(" " + text if name == "spaces" else text).tolist() == ids
        assert used.size == theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("bytes", "<|endoftext|>", "<|endoftext|>"),
        ("llama3", "<|begin_of_text|>", "<|end_of_text|>"),
        ("spaces", "<bos>", "<eos>"),
    ],
)
def test_a_document_begins_and_ends_as_in_pretraining(loaded, name, start, end):
    used = loaded[name]
    assert (used.start_id, used.end_id) == (used.token_id(start), used.token_id(end))
    assert used.pieces([used.start_id, used.end_id]) == [b"", b""]


def test_other_tokens_can_be_chosen(files, loaded):
    other = vocabulary_files.load(files["llama3"], "<|eot_id|>", "<|eot_id|>")
    assert other.start_id == other.end_id == other.token_id("<|eot_id|>")
    assert other.digest != loaded["llama3"].digest
    for wrong in (("<x>", None), (None, "<x>")):
        with pytest.raises(DataError, match="no token '<x>'"):
            vocabulary_files.load(files["llama3"], *wrong)


def test_a_folder_is_a_name_too_and_what_ends_a_document_is_known_without_a_configuration(files, loaded, tmp_path):
    assert vocabulary_files.load(str(pathlib.Path(files["bytes"]).parent)).digest == loaded["bytes"].digest
    (tmp_path / "tokenizer.json").write_bytes(pathlib.Path(files["bytes"]).read_bytes())
    assert vocabulary_files.load(str(tmp_path / "tokenizer.json")).end_id == loaded["bytes"].end_id


def test_a_normal_form_is_left_out(files, loaded, tmp_path):
    made = tokenizers.Tokenizer.from_file(files["bytes"])
    made.normalizer = normalizers.NFC()
    made.save(str(tmp_path / "tokenizer.json"))
    text = "e\u0301 \ufb01"
    used = vocabulary_files.load(str(tmp_path / "tokenizer.json"))
    assert used.decode(used.encode(text)) == text
    assert used.encode("été").tolist() == made.encode("été").ids


@pytest.mark.parametrize(
    "change", ["lower case", "no bytes", "strips", "no model", "empty template", "no JSON", "no end", "no file"]
)
def test_what_loses_something_is_refused_in_a_line(files, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(files["bytes"])
    if change == "lower case":
        made.normalizer = normalizers.Lowercase()
    if change == "strips":
        made.add_tokens([tokenizers.AddedToken("def", lstrip=True)])
    parsed = json.loads(made.to_str())
    if change == "no model":
        del parsed["model"]
    text = json.dumps(parsed)
    if change == "empty template":
        parsed["post_processor"] = {"type": "TemplateProcessing", "single": []}
        text = json.dumps(parsed)
    if change == "no end":
        text = text.replace("<|endoftext|>", "<end?>")
    path.write_text("{" if change == "no JSON" else text)
    if change == "no bytes":
        tokenizer_files.of_spaces(tmp_path, byte_fallback=False)
    if change == "no file":
        path.unlink()
    with pytest.raises(DataError, match=r"^--vocabulary=.*(tokenizer of bytes|cannot be read|--end_token)") as raised:
        vocabulary_files.load(str(path))
    assert "\n" not in str(raised.value)


def test_the_package_that_is_missing_is_told(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'memorizing\[pretrained\]'"):
        vocabulary_files.load(files["bytes"])


def test_a_cache_has_a_copy_of_its_own(files, loaded, tmp_path):
    used = loaded["llama3"]
    path = write_cache(tmp_path / "cache", used, "github_hf" + str(used.size))
    assert (tmp_path / "cache" / tokenizer.TOKENIZER_FILE).read_bytes() == pathlib.Path(files["llama3"]).read_bytes()
    cache = token_cache.open_cache(path)
    assert (cache.vocabulary.digest, cache.start_id) == (used.digest, used.start_id)
    split = cache.split("train")
    for index in range(len(split)):
        assert cache.vocabulary.decode(split.tokens(index)) == TEXTS[split.key(index)]
    (tmp_path / "cache" / tokenizer.TOKENIZER_FILE).write_bytes(pathlib.Path(files["bytes"]).read_bytes())
    with pytest.raises(DataError, match="another vocabulary"):
        _ = token_cache.open_cache(path).vocabulary


def test_characters_without_tokens_are_known(tmp_path):
    # GPT-2's characters for the bytes 4 and 241.
    used = vocabulary_files.load(tokenizer_files.of_bytes(tmp_path, size=390, lacking="\u0104ñ"))
    assert vocabulary_files.can_write(used, "any é text\t\n\x05\U0001f600")
    for text in ("a\x04b", "a\U00050000b"):
        assert not vocabulary_files.can_write(used, text) and used.decode(used.encode(text)) != text
    with pytest.raises(DataError, match="tokenizer of bytes"):
        vocabulary_files.load(tokenizer_files.of_bytes(tmp_path, size=390, lacking="ª"))


def test_ids_that_stand_for_nothing_are_never_written(loaded):
    used = loaded["bytes"]
    assert used.unused_ids == (used.token_id("<|pad|>"),)
    assert np.all(used.encode("text") < used.size)
