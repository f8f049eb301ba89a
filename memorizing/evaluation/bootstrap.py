"""Intervals by resampling documents: tokens of one document are not independent of each other, documents are."""

from __future__ import annotations

import numpy as np

SAMPLES, LEVEL = 1000, 0.95


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> np.ndarray:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled documents (Efron 1979).

    Args:
      numerator: float [documents, ...].
      denominator: float [documents, ...], of the same shape or broadcasting to it.
      seed: of the resampling: equal seeds give equal intervals, and resample several figures of one corpus alike.

    Returns:
      float64 [2, ...], lower and upper end; NaN where fewer than two documents have anything.
    """
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    num_documents = len(numerator)
    few = np.sum(denominator > 0, axis=0) < 2
    if num_documents == 0:
        return np.full((2, *few.shape), np.nan)
    # How often each document was drawn: [SAMPLES, documents].
    counts = np.random.default_rng(seed).multinomial(num_documents, np.full(num_documents, 1 / num_documents), SAMPLES)
    above, below = (np.tensordot(counts, array, axes=1) for array in (numerator, denominator))
    # A sample may hold none of the documents that reach a bin.
    ratios = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    ratios = np.where(few, 0.0, ratios)
    ends = np.nanquantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.where(few, np.nan, ends)
