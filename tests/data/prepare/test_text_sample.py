"""The sample that a vocabulary is trained on: of the training documents only, from everywhere, of a bounded size."""

import numpy as np
import pytest

from memorizing.data.prepare import text_sample
from memorizing.data.prepare.text_sample import TextSampler
from memorizing.data.tasks import splits


def text(index, length):
    """Lines that tell their document."""
    return "".join(f"{index}:{line}".ljust(9) + "\n" for line in range(length // 10))


def sample(documents, max_bytes):
    sampler = TextSampler(max_bytes)
    for number, (key, content) in enumerate(documents.items()):
        sampler.add(number, splits.key_hash(key), content)
    return sampler.result()


def test_all_of_a_small_part_is_kept():
    documents = {"one": text(1, 20_000), "two": "é" * 9000, "three": ""}
    found = sample(documents, 1 << 20)
    assert found.lengths.sum() == 20_000 + 18_000
    assert np.bincount(found.document).tolist() == [5, 3]


def test_a_large_part_is_bounded_and_kept_from_everywhere():
    documents = {f"document {index}": text(index, 50_000) for index in range(40)}
    found = sample(documents, 300_000)
    assert 150_000 <= found.lengths.sum() <= 300_000
    assert len(set(found.document.tolist())) > 20
    # What is left of it when less is allowed is the beginning of it.
    fewer = sample(documents, 100_000)
    np.testing.assert_array_equal(found.document[: len(fewer.document)], fewer.document)


def test_lines_are_of_the_documents_that_may_be_taken():
    documents = {f"document {index}": text(index, 50_000) for index in range(6)}
    found = sample(documents, 1 << 20)
    may_take = np.asarray([True, False, True, True, False, True])
    lines = list(text_sample.lines(iter([(found, may_take, 40_000)])))
    assert {line.split(":")[0] for line in lines if line[1:2] == ":"} == {"0", "2", "3", "5"}
    assert 40_000 <= sum(len(line) + 1 for line in lines) <= 50_000
    # What the others hold makes no difference.
    changed = sample(documents | {"document 1": "entirely other words", "document 4": text(9, 90_000)}, 1 << 20)
    assert list(text_sample.lines(iter([(changed, may_take, 40_000)]))) == lines


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"), [([10, 20], 100, [10, 20]), ([100, 300], 40, [10, 30]), ([0, 5], 3, [0, 3])]
)
def test_parts_have_a_share_by_their_size(sizes, max_bytes, expected):
    assert text_sample.shares(sizes, max_bytes) == expected
