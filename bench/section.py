"""What one suite of benchmarks found, for a report."""

import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any

from flamingo_fast.bench.records import Measurement
from flamingo_fast.bench.tables import Table
from flamingo_fast.bench.timing import Interval


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of paired times.

    Attributes:
        name: of the case, the same in every run.
        of: what is divided by what, such as "x vs eager".
        value: the median of pairs.
        low, high: of an interval of that median, with the probability `confidence`.
        level: "kernel", "block" or "model" of one that stands for its kind; else empty.
    """

    name: str
    of: str
    value: float
    low: float
    high: float
    confidence: float
    pairs: int
    level: str = ""

    @classmethod
    def of_pairs(cls, name: str, of: str, pairs: Sequence[float], level: str = "") -> "Ratio":
        interval = Interval.of_median(pairs)
        return cls(
            name,
            of,
            statistics.median(pairs),
            interval.low,
            interval.high,
            interval.confidence,
            len(pairs),
            level,
        )

    @property
    def half_width(self) -> float:
        """Of the interval, over the ratio."""
        return (self.high - self.low) / 2 / self.value

    @property
    def is_sure(self) -> bool:
        """Whether there are pairs enough for an interval that says something."""
        return self.confidence >= 0.9

    def agrees_with(self, other: "Ratio") -> bool:
        """Whether the intervals overlap."""
        return self.low <= other.high and other.low <= self.high


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot as SVG and as PNG."""

    name: str
    caption: str
    svg: str
    png: bytes

    @classmethod
    def of(cls, name: str, caption: str, drawn: Any) -> "Figure":
        """Of a figure of matplotlib, which is closed."""
        from matplotlib import pyplot

        vector, pixels = io.StringIO(), io.BytesIO()
        drawn.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        drawn.savefig(pixels, format="png", dpi=130)
        pyplot.close(drawn)
        text = vector.getvalue()
        return cls(name, caption, text[text.index("<svg") :], pixels.getvalue())


@dataclasses.dataclass
class Section:
    """A part of a report.

    Attributes:
        sentences: what it comes to.
        failures: what disagreed with the oracle or raised; such has no numbers.
        not_measured: what, and why.
        seconds: that it took.
        is_interrupted: whether what follows is missing.
    """

    name: str
    title: str
    sentences: list[str] = dataclasses.field(default_factory=list)
    ratios: list[Ratio] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    not_measured: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    is_interrupted: bool = False


def median_half_width(ratios: Sequence[Ratio]) -> float | None:
    """Of the intervals that say something, over their ratios; None if there are none."""
    widths = [each.half_width for each in ratios if each.is_sure]
    return statistics.median(widths) if widths else None
