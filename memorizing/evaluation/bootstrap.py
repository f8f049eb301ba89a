"""Intervals by resampling documents: tokens of one document are not independent of each other, documents are."""

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
