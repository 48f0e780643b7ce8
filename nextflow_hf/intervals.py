"""Scores with 95 % intervals from resampling the tests (bootstrap)."""

from collections.abc import Sequence

import numpy as np

_DRAWS = 2000


def interval(results: Sequence[float]) -> dict[str, float]:
    """Mean of test results with its interval: `score`, `low`, `high`.

    Raises:
        ValueError: If there are no results.
    """
    results = np.asarray(results, float)
    if not len(results):
        raise ValueError("There are no tests to score; ask for more.")
    return summarize(results.mean(), resample(results[None], np.random.default_rng(0))[0])


def resample(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means over the last axis: `(rows, n)` -> `(rows, draws)`."""
    picks = rng.integers(scores.shape[1], size=(_DRAWS, scores.shape[1]))
    return scores[:, picks].mean(axis=-1)


def summarize(score: float, resampled: np.ndarray) -> dict[str, float]:
    """A score with the interval that holds 95 % of its resampled values."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"score": round(float(score), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
