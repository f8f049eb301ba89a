"""Which documents are held out: by the corpus, by rank of hash, or by the user's file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.data.errors import DataError
from memorizing.data.tasks import splits


def numbers(rule, keys, official=None):
    hashes = np.asarray([splits.key_hash(key) for key in keys], np.uint64)
    given_splits = np.full(len(keys), splits.NONE, np.int8) if official is None else np.asarray(official, np.int8)
    return rule.numbers(keys, hashes, given_splits)


def by_rank(keys, fraction):
    return splits.by_rank(np.asarray([splits.key_hash(key) for key in keys], np.uint64), fraction)


@pytest.mark.parametrize("num_documents", [2, 3, 10, 100])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
def test_no_split_is_empty(num_documents, fraction):
    keys = [f"repository {index}" for index in range(num_documents)]
    rule = by_rank(keys, fraction)
    counts = splits.count([numbers(rule, keys)])
    assert counts["train"] and counts["validation"] and not counts["test"]
    assert abs(counts["validation"] - fraction * num_documents) <= 1


@given(st.sets(st.text(min_size=1), min_size=2, max_size=50), st.randoms())
def test_a_split_is_a_function_of_the_key(keys, random):
    keys = sorted(keys)
    rule = by_rank(keys, 0.3)
    shuffled = random.sample(keys, len(keys))
    assert by_rank(shuffled, 0.3) == rule
    whole = dict(zip(keys, numbers(rule, keys), strict=True))
    # Also alone, as another process asks it, and from what a cache records.
    again = splits.HashSplits(rule.described()["threshold"])
    assert all(numbers(again, [key])[0] == split for key, split in whole.items())


def test_the_hash_orders_as_the_whole_sha256():
    # The first eight bytes of hashlib.sha256, big-endian: a cache's record can be checked by anyone.
    assert splits.key_hash("abc") == 0xBA7816BF8F01CFEA


@pytest.mark.parametrize(
    ("keys", "fraction"), [(["one"], 0.1), ([], 0.1), (["one", "two"], 0.0), (["one", "two"], 1.0)]
)
def test_splits_that_cannot_be_are_refused(keys, fraction):
    with pytest.raises(DataError):
        by_rank(keys, fraction)


def test_official_splits_are_kept_and_have_to_be_there():
    rule = splits.OfficialSplits()
    assert numbers(rule, ["a", "b", "c"], [0, 2, 1]).tolist() == [0, 2, 1]
    with pytest.raises(DataError, match=r"'b' is of no official split; give --splits=hash"):
        numbers(rule, ["a", "b"], [0, splits.NONE])
    assert [splits.number(name, "key") for name in (None, "train", "validation", "test")] == [-1, 0, 1, 2]
    with pytest.raises(DataError, match="'key' is in the split 'dev'"):
        splits.number("dev", "key")


def test_a_file_names_the_split_of_each_key(tmp_path):
    path = tmp_path / "splits.tsv"
    path.write_text("a\ttrain\nkey with\ttab\tvalidation\r\n\né\ttest\n")
    rule = splits.from_file(str(path), None)
    keys = ["é", "key with\ttab", "a"]
    assert numbers(rule, keys).tolist() == [2, 1, 0]
    with pytest.raises(DataError, match=r"'x', 'y', 'z', ... \(4 in all\) are not in the file.*--default_split"):
        numbers(rule, [*keys, "x", "y", "z", "w"])
    rule = splits.from_file(str(path), "validation")
    assert numbers(rule, ["x", "a"]).tolist() == [1, 0]
    described = rule.described()
    path.write_text("a\tvalidation\n")
    assert splits.from_file(str(path), "validation").described() != described


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    """Its first document would be trained on."""
    path = tmp_path / "splits.tsv"
    path.write_bytes("\ufeffa\tvalidation\r\nb\ttrain\r\n".encode())
    assert numbers(splits.from_file(str(path), None), ["a", "b"]).tolist() == [1, 0]


def test_keys_of_no_document_are_known_the_held_out_ones_first(tmp_path):
    path = tmp_path / "splits.tsv"
    path.write_text("a\ttrain\nb\ttrain\nc\ttest\nd\tvalidation\n")
    rule = splits.from_file(str(path), None)
    hashes = np.asarray([splits.key_hash(key) for key in ("b", "d", "x")], np.uint64)
    assert rule.without_document(hashes) == ["c", "a"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a train\n", "line 1: expected KEY<tab>SPLIT"),
        ("a\ttrain\nb\tdev\n", "line 2: expected KEY<tab>SPLIT, the splits being train, validation, test"),
        ("\ttrain\n", "line 1"),
        ("a\ttrain\na\ttest\n", "line 2: 'a' is in two splits"),
        (b"\xff\ttrain\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path, content, told):
    path = tmp_path / "splits.tsv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told):
        splits.from_file(str(path), None)


def test_an_empty_split_is_told():
    splits.check_none_empty({"train": 1, "validation": 1}, {})
    with pytest.raises(DataError, match=r"'validation' \(left out: too small: 3\); .*--splits"):
        splits.check_none_empty({"train": 1, "test": 1}, {"too small": 3})
