"""A token cache is what was written, or is refused in one line that names the file: every bit, and every beginning."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from damage import damages
from token_caches import TEXTS, write_cache

from memorizing.data.errors import DataError
from memorizing.data.tokens import token_cache, vocabulary


def content(path: pathlib.Path) -> Any:
    """Everything that can be read of a cache."""
    cache = token_cache.open_cache(str(path))
    documents = []
    for name in cache.metadata["splits"]:
        split = cache.split(name)
        for index in range(len(split)):
            tokens = split.tokens(index).tolist()
            documents.append((name, split.key(index), tokens, int(split.num_bytes[index])))
    return cache.metadata, cache.vocab_size, cache.vocabulary.digest, documents


def index_of(cache: token_cache.TokenCache, name: str) -> Any:
    """Everything that is read of the index of a split."""
    split = cache.split(name)
    keys = [split.key(number) for number in range(len(split))]
    return split.num_tokens.tolist(), split.num_bytes.tolist(), keys


def count_refused(read: Callable[[], Any], damaged: Iterable[bytes], name: str) -> int:
    """How often what is read is refused in one line that names the file; else it has to be what it was."""
    expected = read()
    refused = 0
    for _ in damaged:
        try:
            assert read() == expected
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
            assert name in str(error) or "another version" in str(error)
    assert read() == expected
    return refused


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(write_cache(tmp_path / "cache", texts={"one": "first\n", "zwei é": "x"}))


def test_every_bit_of_what_the_cache_says_of_itself(cache: pathlib.Path):
    file = cache / "cache.json"
    # White space between the entries means nothing.
    refused = count_refused(lambda: token_cache.read_metadata(str(cache)), damages(file), file.name)
    assert refused > 6 * file.stat().st_size


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_bit_of_an_index(cache: pathlib.Path, split: str, every: int):
    """What zip says of a file's time is not read."""
    file = cache / f"{split}.index.npz"
    opened = token_cache.open_cache(str(cache))
    places = range(0, file.stat().st_size, every)
    assert count_refused(lambda: index_of(opened, split), damages(file, places), file.name) > 4 * len(places)


@pytest.mark.parametrize("num_places", [10, pytest.param(None, marks=pytest.mark.nightly)])
def test_bits_of_a_shard(cache: pathlib.Path, num_places: int | None):
    """array_record has checksums, and room that means nothing."""
    (file,) = cache.glob("train-*")
    used = [place for place, byte in enumerate(file.read_bytes()) if byte]
    places = used if num_places is None else random.Random(0).sample(used, num_places)
    refused = 0
    for place in places:
        damaged = damages(file, range(place, place + 1), num_beginnings=0)
        refused += count_refused(lambda: content(cache), damaged, file.name)
    assert refused > 6 * len(places)
    num_beginnings = 4 if num_places is not None else 2000
    assert count_refused(lambda: content(cache), damages(file, range(0), num_beginnings=num_beginnings), file.name) > 3


def test_a_missing_or_empty_file(tmp_path: pathlib.Path):
    used = vocabulary.train(["some words in a line"] * 50, 275)
    cache = pathlib.Path(write_cache(tmp_path / "cache", used, "github_spm275", TEXTS))
    for file in [path for path in cache.iterdir() if path.is_file()]:
        whole = file.read_bytes()
        for damage in (file.unlink, lambda file=file: file.write_bytes(b"")):
            damage()
            with pytest.raises(DataError) as told:
                content(cache)
            assert "\n" not in str(told.value)
            file.write_bytes(whole)
    content(cache)


@pytest.mark.parametrize("name", ["task", "fingerprint", "vocabulary", "splits"])
def test_a_cache_of_the_first_edition_is_read_and_its_parts_are_asked_for(cache: pathlib.Path, name: str):
    expected = content(cache)[-1]
    file = cache / "cache.json"
    metadata = json.loads(file.read_text())
    del metadata["sha256"], metadata["indices"]
    file.write_text(json.dumps(metadata | {"format": 2}))
    assert content(cache)[-1] == expected
    for value in (None, 3, []):
        file.write_text(json.dumps(metadata | {"format": 2, name: value}))
        with pytest.raises(DataError, match=f"cache.json: its {name} is missing"):
            content(cache)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"format"', "{}", "[" * 100_000])
def test_what_is_no_description_of_a_cache(cache: pathlib.Path, text: str):
    (cache / "cache.json").write_text(text)
    with pytest.raises(DataError, match=r"is damaged.*cache\.json|another version"):
        content(cache)
