"""Confidence intervals of means over problems, by resampling the problems. numpy only; knows no model.

Samples of one problem are alike, so the problem is the unit that is resampled, never the single sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omniopd.errors import ConfigError, DataError
from omniopd.types import Value

_INDICES_AT_ONCE = 4_000_000
"""Bounds the memory of the resampling (32 MB of indices)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval(Value):
    """A percentile bootstrap interval around an estimate."""

    low: float
    high: float
    estimate: float
    """The plain mean (difference), not a bootstrap average."""


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of the mean of `values` [problems]. Deterministic in the seed.

    Raises DataError for fewer than two problems, which carry no information on the spread, and for non-finite values.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"need num_resamples >= 1 and a confidence between 0 and 1, got {num_resamples} and {confidence}"
        )
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size < 2:
        raise DataError(f"an interval needs one value for each of 2 or more problems, got the shape {data.shape}")
    if not np.isfinite(data).all():
        raise DataError(f"{int((~np.isfinite(data)).sum())} of {data.size} values are not finite numbers")
    rng = np.random.default_rng(seed)
    block = max(1, _INDICES_AT_ONCE // data.size)
    means = np.concatenate(
        [
            data[rng.integers(0, data.size, size=(min(block, num_resamples - start), data.size))].mean(axis=1)
            for start in range(0, num_resamples, block)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high), estimate=float(data.mean()))


def paired_bootstrap(
    before: Sequence[float] | npt.NDArray[np.float64],
    after: Sequence[float] | npt.NDArray[np.float64],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of mean(after) - mean(before), both [problems] in the same order.

    Pairing takes the difficulty of the problems out of the spread. Raises DataError when the two differ in length.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(
            f"a paired comparison needs the same problems, got {first.shape} before and {second.shape} after"
        )
    return mean_interval(second - first, num_resamples=num_resamples, confidence=confidence, seed=seed)
