"""The token cache as a folder on disk, and the source that a run is configured with; without TensorFlow."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from token_caches import TEXTS, tokenised, write, write_cache

from memorizing.data.errors import DataError
from memorizing.data.streams.sources import CachedCorpus
from memorizing.data.tokens import cache_writer, paths, staging, token_cache, vocabulary
from memorizing.data.tokens.cache_writer import TokenisedDocument
from memorizing.data.tokens.vocabulary import ByteVocabulary


@pytest.fixture
def cache_path(tmp_path):
    return write_cache(tmp_path / "cache")


@pytest.mark.parametrize("documents_per_part", [1, 2, 10])
def test_documents_come_back_from_any_shard_in_any_order(tmp_path, documents_per_part):
    cache = token_cache.open_cache(write_cache(tmp_path / "cache", documents_per_part=documents_per_part))
    split = cache.split("train")
    assert len(list((tmp_path / "cache").glob("train-*.array_record"))) == {1: 3, 2: 2, 10: 1}[documents_per_part]
    assert len(split) == 3
    for index in (2, 0, 1, 1):
        key, text = list(TEXTS.items())[index]
        tokens = split.tokens(index)
        assert split.key(index) == key
        assert cache.vocabulary.decode(tokens) == text
        assert tokens[-1] == vocabulary.EOS_ID
        assert (len(tokens), len(text.encode())) == (split.num_tokens[index], split.num_bytes[index])
    assert cache.metadata["splits"]["train"]["tokens"] == split.num_tokens.sum()


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path, size, dtype):
    @dataclasses.dataclass(frozen=True)
    class Wide(ByteVocabulary):
        size: int

    # Id 0 is a word like any other.
    tokens = np.asarray([size - 1, 0, 1], np.int32)
    with staging.staged(str(tmp_path / "cache"), token_cache.METADATA_FILE, {}) as folder:
        write(folder, [[("train", TokenisedDocument("key", 1, tokens))]], Wide(size=size))
    stored = token_cache.open_cache(str(tmp_path / "cache")).split("train").tokens(0)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, tokens)


@pytest.mark.parametrize("tokens", [[], [5, 259, 1], [-1, 1]])
def test_documents_that_would_be_misread_are_refused(tmp_path, tokens):
    document = TokenisedDocument("key", 1, np.asarray(tokens, np.int32))
    with pytest.raises(DataError, match="'key'"):
        cache_writer.write_part(tmp_path, tmp_path / "index.npz", 0, ByteVocabulary().size, [("train", document)])
    assert list(tmp_path.iterdir()) == []


PIECE = token_cache.PIECE


@pytest.mark.parametrize("lengths", [[PIECE], [PIECE + 1, 5], [3, PIECE - 1, 2 * PIECE, 4 * PIECE + 7, 1]])
def test_long_documents_are_read_in_pieces(tmp_path, lengths):
    """A document of millions of tokens is several records; any range of it costs no more than what it touches."""
    random = np.random.default_rng(0)
    documents = [random.integers(1, 259, length, np.int32) for length in lengths]
    write_documents = [("train", TokenisedDocument(str(i), 1, tokens)) for i, tokens in enumerate(documents)]
    with staging.staged(str(tmp_path / "cache"), token_cache.METADATA_FILE, {}) as folder:
        write(folder, [write_documents[:1], write_documents[1:]], ByteVocabulary())
    split = token_cache.open_cache(str(tmp_path / "cache")).split("train")
    read = []
    opened = split._piece
    split._piece = lambda index, piece: read.append(piece) or opened(index, piece)
    for index, tokens in enumerate(documents):
        np.testing.assert_array_equal(split.tokens(index), tokens)
        for _ in range(20):
            start, stop = sorted(random.integers(0, len(tokens) + 1, 2))
            read.clear()
            np.testing.assert_array_equal(split.tokens(index, start, stop), tokens[start:stop])
            assert len(read) <= (stop - start) // PIECE + 2


def test_cache_needs_nothing_outside_its_folder_and_its_fingerprint_is_its_content(tmp_path, cache_path):
    fingerprint = token_cache.open_cache(cache_path).fingerprint
    moved = tmp_path / "moved"
    pathlib.Path(cache_path).rename(moved)
    assert token_cache.open_cache(str(moved)).fingerprint == fingerprint
    assert token_cache.open_cache(str(moved)).split("train").tokens(0).any()
    assert token_cache.open_cache(write_cache(tmp_path / "same")).fingerprint == fingerprint
    other = write_cache(tmp_path / "other", texts=TEXTS | {"three": "y"})
    assert token_cache.open_cache(other).fingerprint != fingerprint
    renamed = write_cache(tmp_path / "renamed", texts={f"{key} renamed": text for key, text in TEXTS.items()})
    assert token_cache.open_cache(renamed).fingerprint != fingerprint


def test_same_documents_make_the_same_bytes(tmp_path, cache_path):
    again = pathlib.Path(write_cache(tmp_path / "again"))
    files = {file.name: file.read_bytes() for file in pathlib.Path(cache_path).iterdir()}
    assert {file.name: file.read_bytes() for file in again.iterdir()} == files
    assert set(files) == {
        "cache.json",
        *(f"{s}{e}" for s in ("train", "validation") for e in (".index.npz", "-00000.array_record")),
    }


def test_sentencepiece_model_travels_with_the_cache(tmp_path):
    used = vocabulary.train(["some words in a line"] * 50, 275)
    path = write_cache(tmp_path / "cache", used, "github_spm275")
    cache = token_cache.open_cache(path)
    assert cache.vocab_size == 275
    assert [cache.vocabulary.decode(cache.split("train").tokens(index)) for index in range(3)] == list(TEXTS.values())
    (tmp_path / "cache" / "vocabulary.model").write_bytes(vocabulary.train(["other words in a line"] * 50, 275).model)
    with pytest.raises(DataError, match="another vocabulary"):
        _ = token_cache.open_cache(path).vocabulary


def test_caches_of_other_tasks_and_formats_are_refused(cache_path):
    with pytest.raises(DataError, match="github_bytes, not of github_spm2048"):
        token_cache.open_cache(cache_path, "github_spm2048")
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        token_cache.open_cache(cache_path).split("test")
    with pytest.raises(DataError, match="memorizing prepare"):
        token_cache.open_cache(cache_path + "-missing")
    metadata = pathlib.Path(cache_path) / "cache.json"
    older = json.loads(metadata.read_text()) | {"format": 0}
    del older["sha256"]
    metadata.write_text(json.dumps(older))
    with pytest.raises(DataError, match="another version"):
        token_cache.open_cache(cache_path)


def test_damaged_shards_are_told(tmp_path, cache_path):
    split = token_cache.open_cache(cache_path).split("train")
    (shard,) = pathlib.Path(cache_path).glob("train-*")
    other = write_cache(tmp_path / "other", texts={"one": "shorter", "two": "x", "three": "y"})
    shard.write_bytes((pathlib.Path(other) / shard.name).read_bytes())
    with pytest.raises(DataError, match=f"damaged.*{shard.name}.*prepare it again"):
        split.tokens(0)


def test_folder_in_an_object_store_is_copied_last_file_last_and_read_from_a_copy(tmp_path, monkeypatch):
    store = tmp_path / "store"
    monkeypatch.setattr(paths, "is_remote", lambda path: str(path).startswith(str(store)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_cache(store / "cache")
    cache = token_cache.open_cache(str(store / "cache"))
    assert cache.path.startswith(str(tmp_path / "home"))
    assert cache.vocabulary.decode(cache.split("train").tokens(0)) == "first\n"
    # Copied once.
    (store / "cache" / "train-00000.array_record").unlink()
    assert token_cache.open_cache(str(store / "cache")).split("train").tokens(0).any()


def test_folder_in_an_object_store_that_was_not_copied_whole_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "is_remote", lambda path: True)
    used = ByteVocabulary()
    with (
        pytest.raises(OSError, match="lost"),
        staging.staged(str(tmp_path / "cache"), token_cache.METADATA_FILE, {}) as folder,
    ):
        path = folder.work / "part-0.npz"
        documents = [("train", document) for document in tokenised(used, TEXTS)]
        cache_writer.write_part(folder.path, path, 0, used.size, documents)
        raise OSError("the connection was lost")
    assert (tmp_path / "cache" / "train-00000.array_record").exists()
    assert not token_cache.exists(str(tmp_path / "cache"))
    # The next one begins there, and leaves a cache and nothing else.
    with staging.staged(str(tmp_path / "cache"), token_cache.METADATA_FILE, {}) as folder:
        assert path.exists()
        cache_writer.join(folder.path, [path], ["train"], "github_bytes", used, {})
    assert not (tmp_path / "cache" / "work").exists()
    assert len(token_cache.open_cache(str(tmp_path / "cache")).split("train")) == 3


def test_caches_have_places_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = [
        ("github_bytes", "stdlib"),
        ("github_spm2048", "stdlib"),
        ("github_bytes", "/a/code"),
        ("github_bytes", "/b/code"),
    ]
    found = {paths.default_cache_path(task, source) for task, source in named}
    assert len(found) == 4
    assert all(path.startswith(str(tmp_path / "memorizing")) for path in found)
    of_bucket = paths.default_cache_path("github_bytes", "gs://bucket/code")
    monkeypatch.chdir(tmp_path)
    assert paths.default_cache_path("github_bytes", "gs://bucket/code") == of_bucket
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert paths.default_cache_path("github_bytes", "stdlib").startswith(
        "/home/somebody/.cache/memorizing/github_bytes-stdlib"
    )


def test_source_is_what_training_asks_for(cache_path):
    source = CachedCorpus("github_bytes", path=cache_path)
    assert source.vocab_size == 259
    assert source.identity.startswith("github_bytes-")
    assert source.document_bytes.tolist() == [2]
    assert source.document_key(0) == "held out"
    assert source.decode(source.encode("é")) == "é"
    batch = next(source.train_batches(2, range(1, 2), 3, 4, seed=0))
    assert batch.targets.shape == (1, 3, 4)
    (evaluated,) = source.evaluation_batches(2, 4)
    assert source.decode(evaluated.batch.targets[0, 0]) == "é"
    # A frozen dataclass that gin builds and compares.
    assert source == CachedCorpus("github_bytes", path=cache_path) and hash(source) == hash(
        CachedCorpus("github_bytes", path=cache_path)
    )


def test_state_of_another_cache_is_refused(tmp_path, cache_path):
    other = write_cache(tmp_path / "other", texts=TEXTS | {"three": "y"})
    first, second = (
        CachedCorpus("github_bytes", path=path).train_batches(2, range(2), 1, 4, 0) for path in (cache_path, other)
    )
    with pytest.raises(ValueError, match="another stream: its cache is"):
        second.set_state(first.get_state())


def test_source_with_mistakes_names_its_binding(tmp_path, cache_path):
    with pytest.raises(DataError, match=r"CachedCorpus.task='github'"):
        CachedCorpus("github")
    with pytest.raises(DataError, match=r"CachedCorpus.path=3"):
        CachedCorpus(path=3)
    with pytest.raises(DataError, match=r"CachedCorpus.path='.*missing'.*CachedCorpus.source"):
        _ = CachedCorpus(path=str(tmp_path / "missing")).vocab_size
    with pytest.raises(DataError, match="github_bytes, not of github_spm2048"):
        _ = CachedCorpus("github_spm2048", path=cache_path).vocab_size


def test_gin_builds_the_source():
    gin = pytest.importorskip("gin")
    import memorizing.data.gin_registry  # noqa: F401

    # What an earlier test loaded stays with gin.
    gin.clear_config()
    with gin.unlock_config():
        gin.parse_config("CachedCorpus.task = 'github_bytes'\nmacro = @CachedCorpus()")
    built = gin.query_parameter("macro/macro.value").scoped_configurable_fn()
    gin.clear_config()
    assert built == CachedCorpus("github_bytes")
    assert CachedCorpus() != built


def test_training_never_imports_tensorflow(cache_path):
    program = f"""
import sys
import memorizing.data.gin_registry
from memorizing.data.streams.sources import CachedCorpus
from memorizing.data import documents
from memorizing.data.corpora import catalogue, github
from memorizing.data.prepare import command
from memorizing.data.streams import segments
from memorizing.data.tasks import splits
from memorizing.data.tokens import token_cache, vocabulary
source = CachedCorpus("github_bytes", path={cache_path!r})
next(source.train_batches(2, range(2), 1, 4, 0)), list(source.evaluation_batches(2, 4)), source.decode([70])
heavy = {{"tensorflow", "tensorflow_datasets", "seqio", "jax", "torch"}} & set(sys.modules)
ours = {{name for name in sys.modules if name.startswith("memorizing.") and not name.startswith("memorizing.data")}}
assert not heavy, heavy
# The contract, the user's error, and the registration with gin: nothing that models.
assert ours == {{"memorizing.batch", "memorizing.config", "memorizing.config.types", "memorizing.errors"}}, ours
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_index_of_many_documents_is_columns(tmp_path):
    tokens = np.asarray([5, 1], np.int32)
    documents = (("train", TokenisedDocument(f"document {index}", 1, tokens)) for index in range(20_000))
    with staging.staged(str(tmp_path / "cache"), token_cache.METADATA_FILE, {}) as folder:
        write(folder, [documents], ByteVocabulary())
    split = token_cache.open_cache(str(tmp_path / "cache")).split("train")
    assert split.key(19_999) == "document 19999" and split.key(0) == "document 0"
    with np.load(tmp_path / "cache" / "train.index.npz", allow_pickle=False) as index:
        integers = dict.fromkeys(("num_tokens", "num_bytes", "key_ends", "shards", "shard_starts"), np.int64)
        assert {name: index[name].dtype for name in index} == integers | {"keys": np.uint8}
