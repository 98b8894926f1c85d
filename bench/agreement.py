"""How near two columns of numbers are: their ranks, and their distance."""

import dataclasses
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of some rows' values with what they are compared to.

    Attributes:
        spearman: rank correlation; NaN where all values are equal.
        error: mean absolute difference.
    """

    rows: int
    spearman: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float], others: Sequence[float]) -> "Agreement":
        """
        Raises:
            ValueError: not as many of one as of the other, or none.
        """
        if not values or len(values) != len(others):
            raise ValueError(
                f"others: expected as many as values, at least one; got {len(others)} and "
                f"{len(values)}"
            )
        error = statistics.fmean(abs(a - b) for a, b in zip(values, others, strict=True))
        return cls(len(values), spearman(values, others), error)

    def __str__(self) -> str:
        return (
            f"rank correlation {self.spearman:.3f}, mean absolute error {self.error:.3f}, over "
            f"{self.rows} rows"
        )


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks. NaN where all are equal."""
    ranks = [_ranks(values) for values in (one, other)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]
