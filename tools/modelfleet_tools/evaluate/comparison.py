"""Whether one model is better than another on the same examples, or only luckier."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 9999
_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    `difference` is the first model's mean minus the other's, with the 95% interval of a paired bootstrap.

    `only_first` and `only_other` are examples that one of them alone had right, for figures of right and wrong.
    """

    metric: str
    difference: float
    low: float
    high: float
    test: str
    p_value: float
    only_first: int | None
    only_other: int | None

    @property
    def significant(self) -> bool:
        """Whether chance alone would give such a difference in less than 5% of cases."""
        return self.p_value < 0.05  # noqa: PLR2004  the customary level


def compare(metric: str, first: NDArray[np.float64], other: NDArray[np.float64]) -> Comparison:
    """Compare float64 [examples] of two models: McNemar's exact test for 0 and 1, else a paired permutation test."""
    difference = first - other
    low, high = _interval(difference)
    if np.isin(first, (0, 1)).all() and np.isin(other, (0, 1)).all():
        only_first, only_other = int((difference > 0).sum()), int((difference < 0).sum())
        discordant = only_first + only_other
        # https://en.wikipedia.org/wiki/McNemar%27s_test#Variations
        p_value = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
        test = "McNemar, exact"
        return Comparison(metric, float(difference.mean()), low, high, test, p_value, only_first, only_other)
    tested = stats.permutation_test(
        (first, other), _mean_difference, permutation_type="samples", n_resamples=_RESAMPLES, rng=_SEED
    )
    test = "paired permutations"
    return Comparison(metric, float(difference.mean()), low, high, test, float(tested.pvalue), None, None)


def _interval(difference: NDArray[np.float64]) -> tuple[float, float]:
    if np.ptp(difference) == 0:
        return float(difference[0]), float(difference[0])
    found = stats.bootstrap((difference,), np.mean, method="percentile", n_resamples=_RESAMPLES, batch=100, rng=_SEED)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean_difference(first: NDArray[np.float64], other: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(first.mean(axis=axis) - other.mean(axis=axis))
