"""The benchmarks' scorers on strings by hand, quirks among them."""

from __future__ import annotations

import pytest

from memorizing.synthetic.recall import scoring, stories

PLACES = stories.FAMILIAR.places
GIVERS = stories.FAMILIAR.labels("qa5")


@pytest.mark.parametrize(
    ("prediction", "references", "everything", "any_of_them"),
    [
        (" 1234567.", ["1234567"], 1, 1),
        ("It is 1234567 and 7654321", ["1234567", "7654321"], 1, 1),
        ("7654321", ["1234567", "7654321", "1111111", "2222222"], 0.25, 1),
        ("123456", ["1234567"], 0, 0),
        # In any case; a reference may be part of another word.
        ("the answer: SLOW-BOTTOM", ["slow-bottom"], 1, 1),
        ("xabcdefgx", ["ABCDEFG"], 1, 1),
        ("91234567890", ["1234567"], 1, 1),
        # A control character becomes a line end, and so parts a reference.
        ("12\x00345", ["12345"], 0, 0),
        ("\x0012345\x01", ["12345"], 1, 1),
        ("one\ttwo", ["one two"], 0, 0),
        ("", ["12345"], 0, 0),
        ("   ", ["a"], 0, 0),
        # Order is nothing, and saying it twice is nothing.
        ("b a a", ["a", "b"], 1, 1),
        ("AAAAA, BBBBB", ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"], 0.4, 1),
    ],
)
def test_ruler(prediction: str, references: list[str], everything: float, any_of_them: float) -> None:
    assert scoring.ruler_all(prediction, references) == pytest.approx(everything)
    assert scoring.ruler_part(prediction, references) == any_of_them


@pytest.mark.parametrize(
    ("prediction", "target", "question", "labels", "score"),
    [
        ("hallway", "hallway", "Where is Mary?", PLACES, 1),
        (" The HALLWAY", "hallway", "Where is Mary?", PLACES, 1),
        # Only the first sentence counts.
        ("hallway. Before, the kitchen", "hallway", "Where is Mary?", PLACES, 1),
        ("I think. hallway", "hallway", "Where is Mary?", PLACES, 0),
        # Another label is a mistake, unless the question names it.
        ("hallway or kitchen", "hallway", "Where is Mary?", PLACES, 0),
        ("the hallway, before the kitchen", "hallway", "Where was the milk before the kitchen?", PLACES, 1),
        # A target that the question names is never right.
        ("kitchen", "kitchen", "Where was the milk before the kitchen?", PLACES, 0),
        ("office", "hallway", "Where is Mary?", PLACES, 0),
        ("", "hallway", "Where is Mary?", PLACES, 0),
        # Labels are found as parts of words.
        ("the bedrooms", "bedroom", "Where is Mary?", PLACES, 1),
        ("hallway<context> kitchen", "hallway", "Where is Mary?", PLACES, 1),
        ("hallway <example> kitchen", "hallway", "Where is Mary?", PLACES, 1),
        # The published code cuts at "Question" after lower-casing: never.
        ("hallway Question: kitchen", "hallway", "Where is Mary?", PLACES, 0),
        ("Bill gave the milk", "milk", "What did Bill give to Jeff?", GIVERS, 1),
        ("milk to Mary", "milk", "What did Bill give to Jeff?", GIVERS, 0),
    ],
)
def test_babilong(prediction: str, target: str, question: str, labels: tuple[str, ...], score: float) -> None:
    assert scoring.babilong(prediction, target, question, labels) == score


@pytest.mark.parametrize(("prediction", "score"), [(" 421", 1), ("421\n", 1), ("4210", 0), ("421.", 0), ("", 0)])
def test_passkey(prediction: str, score: float) -> None:
    assert scoring.equal(prediction, ["421"]) == score
