"""Vocabularies give back every text exactly."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from memorizing.data.errors import DataError
from memorizing.data.tasks import task_name
from memorizing.data.tokens import vocabulary
from memorizing.data.tokens.vocabulary import ByteVocabulary, SentencePieceVocabulary

# Every text that has a UTF-8 form.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
LINES = [f"def function_{index % 17}(self, argument):\n    return  {index} # été" for index in range(400)]


@pytest.fixture(scope="module")
def pieces():
    return vocabulary.train("\n".join(LINES).split("\n"), 400)


@given(TEXTS)
@example("")
@example(" \u2581 \x01 \x010\x011 \u2581\u2581")
@example("\ufeff\r\n\t\n  \0 </s><unk><pad><0x0A> \u2028 a\u0301")
def test_any_text_comes_back(pieces, text):
    for used in (ByteVocabulary(), pieces):
        ids = used.encode(text)
        assert used.decode(ids) == text
        assert b"".join(used.pieces([*ids, vocabulary.EOS_ID, vocabulary.PAD_ID])) == text.encode()
        assert not len(ids) or (ids.min() > vocabulary.UNK_ID and ids.max() < used.size)


def test_sentencepiece_keeps_layout_as_tokens(pieces):
    assert pieces.size == 400
    (newline,), (tab,) = pieces.encode("\n"), pieces.encode("\t")
    assert list(pieces.encode("\n\n\t")) == [newline, newline, tab]
    assert len(pieces.encode(LINES[0])) < len(LINES[0]) / 2


def test_ends_and_padding_have_no_text(pieces):
    for used in (ByteVocabulary(), pieces):
        ids = [*used.encode("text"), vocabulary.EOS_ID, vocabulary.PAD_ID, vocabulary.PAD_ID]
        assert used.decode(np.asarray(ids, np.uint16)) == "text"


def test_half_a_character_is_marked(pieces):
    for used in (ByteVocabulary(), pieces):
        assert used.decode(used.encode("漢")[:-1]).startswith("\ufffd")


def test_training_is_deterministic_and_digests_tell_vocabularies_apart(pieces):
    lines = "\n".join(LINES).split("\n")
    assert vocabulary.train(lines, 400).model == pieces.model
    assert SentencePieceVocabulary(pieces.model).digest == pieces.digest
    assert len({pieces.digest, vocabulary.train(lines, 399).digest, ByteVocabulary().digest}) == 3


@pytest.mark.parametrize("size", [100, 100_000])
def test_sizes_that_the_text_does_not_allow_are_refused(size):
    with pytest.raises(DataError, match=f"no vocabulary of {size} pieces.*"):
        vocabulary.train(["a few words"], size)


@pytest.mark.parametrize("name", ["github_bytes", "github_spm2048", "c4_spm32000"])
def test_task_names_are_a_corpus_and_a_vocabulary(name):
    assert str(task_name.parse(name)) == name


@pytest.mark.parametrize("name", ["github", "github_spm", "github_spm0", "_bytes", "github_bytes2", "github bytes", ""])
def test_other_names_are_refused(name):
    with pytest.raises(DataError, match="github_spm2048"):
        task_name.parse(name)


def of_settings(path, **settings):
    """A model that SentencePiece trains with other settings than ours."""
    model = io.BytesIO()
    used = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    used |= {"user_defined_symbols": ["\n", "\t"], "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(LINES).split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        minloglevel=2,
        **(used | settings),
    )
    path.write_bytes(model.getvalue())
    return str(path)


@given(TEXTS)
@example("\n a\n\nb \u2581\n")
def test_a_model_with_a_space_before_every_text_is_used_without_it(space_before, text):
    assert space_before.decode(space_before.encode(text)) == text
    # As the Tasks tokenise.
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    assert [id for line in lines for id in space_before.encode(line)] == space_before.encode(text).tolist()


@pytest.fixture(scope="module")
def space_before(tmp_path_factory):
    path = of_settings(tmp_path_factory.mktemp("model") / "spm.model", add_dummy_prefix=True)
    loaded = vocabulary.load(path)
    assert vocabulary.load(path).digest == loaded.digest
    return loaded


def test_our_own_model_is_loaded_as_it_is(pieces, tmp_path):
    (tmp_path / "spm.model").write_bytes(pieces.model)
    loaded = vocabulary.load(str(tmp_path / "spm.model"))
    assert (loaded.size, loaded.encode(LINES[0]).tolist()) == (pieces.size, pieces.encode(LINES[0]).tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"eos_id": 2, "unk_id": 1},
        {"user_defined_symbols": ["\t"], "byte_fallback": False},
    ],
)
def test_a_model_that_loses_something_is_refused(tmp_path, settings):
    path = of_settings(tmp_path / "spm.model", **settings)
    with pytest.raises(DataError, match="memorizing prepare --vocab"):
        vocabulary.load(path)
