"""How benchmarks score a generated text. Their quirks are kept, since a score compares only with them.

None searches the prompt: predictions are what was generated behind it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np


def equal(prediction: str, references: Sequence[str]) -> float:
    """The passkey's: exactly the answer, but for white space around it."""
    return float(prediction.strip() == references[0])


def ruler_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's for all tasks but QA: the share of the references that occur in the prediction.

    They occur as parts of text, in any case and order: 12 occurs in 3123.
    """
    text = _cleaned(prediction)
    return float(np.mean([reference.lower() in text for reference in references]))


def ruler_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's for QA: whether any reference occurs."""
    text = _cleaned(prediction)
    return float(any(reference.lower() in text for reference in references))


def _cleaned(prediction: str) -> str:
    """As RULER does: control characters become line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def babilong(prediction: str, target: str, question: str, labels: Collection[str]) -> float:
    """BABILong's: of the labels in the first sentence, less those in the question, the target is the only one.

    Labels occur as parts of text. Those of the question are never counted, not even where the target is one of them.
    The published code also cuts at "Question", but only after lower-casing, so that it never does.
    """
    text = prediction.lower().split(".")[0]
    for mark in ("<context>", "<example>"):
        text = text.split(mark)[0]
    asked = question.lower()
    found = {label.lower() for label in labels if label.lower() in text and label.lower() not in asked}
    return float(found == {target.lower()})
