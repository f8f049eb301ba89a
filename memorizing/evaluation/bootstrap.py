"""Intervals by resampling documents: tokens of one document are not independent of each other, documents are.

Where a training was run with several seeds, these are resampled too.
"""

from __future__ import annotations

import numpy as np

SAMPLES = 1000
LEVEL = 0.95


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> np.ndarray:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled documents (Efron 1979).

    Args:
      numerator: float [documents, ...].
      denominator: float [documents, ...], of the same shape or broadcasting to it.
      seed: of the resampling: equal seeds give equal intervals, and resample several figures of one corpus alike.

    Returns:
      float64 [2, ...], lower and upper end; NaN where fewer than two documents have anything.
    """
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    num_documents = len(numerator)
    few = np.sum(denominator > 0, axis=0) < 2
    if num_documents == 0:
        return np.full((2, *few.shape), np.nan)
    # How often each document was drawn.
    rng = np.random.default_rng(seed)
    equal_shares = np.full(num_documents, 1 / num_documents)
    counts = rng.multinomial(num_documents, equal_shares, SAMPLES)  # [SAMPLES, documents]
    above = np.tensordot(counts, numerator, axes=1)  # [SAMPLES, ...]
    below = np.tensordot(counts, denominator, axes=1)  # [SAMPLES, ...]
    # A sample may hold none of the documents that reach a bin.
    ratios = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    ratios = np.where(few, 0.0, ratios)
    ends = np.nanquantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)  # [2, ...]
    return np.where(few, np.nan, ends)


def interval_over_seeds(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same interval over resampled documents and, independently of these, resampled trainings.

    Args:
      numerator: float [trainings, documents].
      denominator: float [documents].
      seed: of the resampling. With one training the interval is that of `ratio_interval`.

    Returns:
      float64 [2], lower and upper end; NaN where fewer than two documents have anything.
    """
    num_trainings, num_documents = numerator.shape
    if np.sum(denominator > 0) < 2:
        return np.full(2, np.nan)
    rng = np.random.default_rng(seed)
    # [SAMPLES, documents], [SAMPLES, trainings]
    documents = rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), SAMPLES)
    trainings = rng.multinomial(num_trainings, np.full(num_trainings, 1 / num_trainings), SAMPLES)
    above = np.einsum("st,td,sd->s", trainings / num_trainings, numerator, documents)
    below = documents @ denominator
    ratios = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return np.nanquantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
