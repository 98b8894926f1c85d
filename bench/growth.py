"""How time and memory grow with one size of an input, and with which power of it."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flamingo_fast.bench import attention, several_media
from flamingo_fast.bench.registry import Shape, shape_name
from flamingo_fast.bench.tables import Table

if TYPE_CHECKING:
    from flamingo_fast.bench.run import Results

SIZES = {"N": "images", "L": "text tokens", "F": "frames", "B": "batch"}
"""What a dimension of a shape is, by its name."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """Shapes of an op that differ in one number, for each of some dimensions."""

    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]

    def of(self, quick: bool) -> tuple[Shape, ...]:
        return self.quick_shapes if quick else self.shapes


def _along(shape: Shape, index: int, sizes: Sequence[int]) -> tuple[Shape, ...]:
    return tuple((*shape[:index], size, *shape[index + 1 :]) for size in sizes)


_DOUBLING = (1, 2, 4, 8, 16, 32, 64, 128)
_SEVERAL_MEDIA = Growth(
    (
        *_along((1, 2048, 1, 8, 64, 64), 2, (1, 4, 16, 64)),
        *_along((1, 2048, 16, 8, 64, 64), 1, (256, 1024, 4096)),
    ),
    (
        *_along((1, 128, 1, 2, 32, 16), 2, (1, 4)),
        *_along((1, 128, 4, 2, 32, 16), 1, (64,)),
    ),
)

GROWTH: Mapping[str, Growth] = {
    attention.NAME: Growth(
        (
            *_along((1, 2048, 1, 8, 64, 64), 2, _DOUBLING),
            *_along((1, 2048, 16, 8, 64, 64), 1, (256, 512, 1024, 4096)),
        ),
        _along((1, 128, 1, 2, 32, 16), 2, (1, 4)),
    ),
    several_media.ALL_PREVIOUS: _SEVERAL_MEDIA,
    several_media.SPARSE: _SEVERAL_MEDIA,
    "GatedCrossAttentionBlock": Growth(
        _along((1, 256, 5, 512, 512), 0, (1, 2, 4, 8, 16)),
        _along((1, 16, 2, 32, 32), 0, (1, 2)),
    ),
    "PerceiverResampler": Growth(
        _along((1, 1, 1, 256, 512, 2), 2, (1, 2, 4, 8, 16, 32)),
        _along((1, 1, 1, 16, 32, 1), 2, (1, 2)),
    ),
    # A token after more and more shots, of an image each.
    "GatedCrossAttentionBlock_decode": Growth(
        _along((1, 1, 1, 1024, 1024), 2, _DOUBLING),
        _along((1, 1, 1, 32, 32), 2, (1, 4)),
    ),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size by which the value grows, fitted to its larger half: the least squares'
    slope of logarithms. What does not depend on the size hides it among small ones.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least two, got {len(sizes)}")
    points = sorted(zip(sizes, values, strict=True))
    points = points[min(len(points) // 2, len(points) - 2) :]
    x, y = zip(*((math.log(size), math.log(value)) for size, value in points), strict=True)
    return statistics.linear_regression(x, y).slope


def series(shapes: Sequence[Shape], index: int) -> list[Shape]:
    """The most shapes that differ in the number at `index` alone, sorted."""
    by_rest: dict[Shape, list[Shape]] = {}
    for shape in shapes:
        by_rest.setdefault((*shape[:index], *shape[index + 1 :]), []).append(shape)
    return max(map(sorted, by_rest.values()), key=len)


def series_of(results: "Results", op: str) -> list[tuple[str, list[Shape]]]:
    """Of an op: (dimension, its series), where there are at least two of a series."""
    cases = dict.fromkeys((benchmark, shape) for benchmark, shape, _ in results.plan.cases)
    benchmark = next(each for each, _ in cases if each.name == op)
    shapes = [shape for each, shape in cases if each is benchmark]
    return [
        (dim, found)
        for index, dim in enumerate(benchmark.dims)
        if dim in SIZES and len(found := series(shapes, index)) > 1
    ]


def table(results: "Results") -> Table:
    """Fitted exponents of time and memory."""
    values = {
        (m.kernel, m.dtype, m.mode, m.provider, m.shape, m.metric): m.value.p50
        for m in results.measurements
    }
    rows = []
    for benchmark in results.plan.benchmarks:
        for dim, shapes in series_of(results, benchmark.name):
            index = benchmark.dims.index(dim)
            sizes = {shape_name(shape): shape[index] for shape in shapes}
            groups = dict.fromkeys(
                key[1:4] for key in values if key[0] == benchmark.name and key[4] in sizes
            )
            for group in groups:
                row = []
                for metric in ("time", "peak_memory"):
                    points = [
                        (size, found)
                        for name, size in sizes.items()
                        if (found := values.get((benchmark.name, *group, name, metric)))
                    ]
                    row.append(f"{exponent(*zip(*points, strict=True)):.2f}" if points[1:] else "")
                measured = [
                    size
                    for name, size in sizes.items()
                    if (benchmark.name, *group, name, "time") in values
                ]
                if not measured:
                    continue
                what = "shots" if benchmark.name.endswith("_decode") else SIZES[dim]
                span = f"{what}, {min(measured)} to {max(measured)}"
                rows.append([benchmark.name, span, *group, *row])
    return Table(
        "Growth: fitted exponents",
        ("op", "of", "dtype", "mode", "provider", "time", "memory"),
        rows,
        5,
        (
            "time grows with this power of the size, over the larger half of the sizes measured: "
            "0 is not at all, 1 in proportion. memory: the most that a call holds at once.",
        ),
    )
