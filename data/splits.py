"""Which documents are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from .errors import DataError

TRAIN = "train"
VALIDATION = "validation"


def assign(keys: Collection[str], validation_fraction: float) -> dict[str, frozenset[str]]:
    """Divides documents by the rank of the hash of their keys.

    A threshold on the hash itself could leave a split of a small corpus empty; ranks cannot, and depend on nothing but
    the set of keys.

    Args:
      keys: of all documents of the corpus, in any order.
      validation_fraction: share of the documents that is held out; at least one document is, and at least one is not.

    Returns:
      The keys of each split by its name.

    Raises:
      DataError: there are fewer than two documents, or the fraction is not between 0 and 1.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: give a share between 0 and 1, such as 0.05")
    if len(keys) < 2:
        raise DataError(f"the corpus has {len(keys)} document(s): at least 2 are needed, one of them to be held out")
    ranked = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    num_held_out = min(max(round(len(ranked) * validation_fraction), 1), len(ranked) - 1)
    return {TRAIN: frozenset(ranked[num_held_out:]), VALIDATION: frozenset(ranked[:num_held_out])}
