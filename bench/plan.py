"""What a run measures, from the names that a user gave."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from flamingo_fast.bench import attention, latent, modules, ops, pairs, pairs_layer, several_media
from flamingo_fast.bench.growth import GROWTH
from flamingo_fast.bench.registry import DTYPES, MODES, Benchmark, Shape, shape_name

BENCHMARKS: Mapping[str, Benchmark] = {
    **ops.BENCHMARKS,
    **attention.BENCHMARKS,
    **several_media.BENCHMARKS,
    **pairs.BENCHMARKS,
    **pairs_layer.BENCHMARKS,
    **latent.BENCHMARKS,
    **modules.BENCHMARKS,
}
BASELINE = "eager"
# Providers that take seconds to compile.
COMPILED = ("compile", "flex_attention")

# PyTorch counts the bytes of a tensor in 63 bits.
_MAX_NUMEL = 2**59


@dataclasses.dataclass(frozen=True)
class Plan:
    """`cases` are (benchmark, shape, dtype); `left_out` are providers that take long.

    `passes`: over all cases, so that each is measured at several times.
    """

    cases: tuple[tuple[Benchmark, Shape, str], ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    left_out: tuple[str, ...]
    quick: bool
    passes: int = 1

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        return tuple({benchmark.name: benchmark for benchmark, _, _ in self.cases}.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(dtype for _, _, dtype in self.cases))

    @property
    def budget_s(self) -> float:
        """Seconds of timing for each case and mode; the least number of rounds may take longer."""
        return 0.1 if self.quick else 0.75


def make_plan(
    *,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    growth: bool = False,
    left_out: Sequence[str] = (),
) -> Plan:
    """An empty selection is everything. `quick`: one small shape, without torch.compile, as with
    providers that are `left_out`.

    The baseline always runs, since every ratio is to it. Shapes without ops are for the ops that
    have as many dimensions. `growth`: shapes that differ in one size, such as that of images; by
    default the baseline, ours and sdpa.

    Raises:
        ValueError: an unknown name or a shape that an op can't have, and what was expected.
    """
    if growth:
        if shapes:
            raise ValueError("growth chooses its shapes; give no --shape")
        ops = ops or tuple(GROWTH)
    _check_names("op", ops, GROWTH if growth else BENCHMARKS)
    check_dtypes(dtypes)
    _check_names("mode", modes, MODES)
    benchmarks = [BENCHMARKS[name] for name in dict.fromkeys(ops or _fitting(shapes))]
    known = _provider_names(benchmarks)
    _check_names("provider", providers, known)
    if growth and not providers:
        providers = ("ours", "sdpa")
    if quick:
        left_out = COMPILED
    left_out = () if providers else tuple(left_out)
    return Plan(
        cases=tuple(
            (benchmark, shape, dtype)
            for benchmark in benchmarks
            for shape in (
                GROWTH[benchmark.name].of(quick) if growth else _shapes(benchmark, shapes, quick)
            )
            for dtype in dict.fromkeys(dtypes or ("fp32", "bf16"))
        ),
        modes=tuple(dict.fromkeys(modes or MODES)),
        providers=tuple(
            name
            for name in known
            if name == BASELINE or (name in (providers or known) and name not in left_out)
        ),
        left_out=left_out,
        quick=quick,
    )


def joined(plans: Sequence[Plan]) -> Plan:
    """All of their cases, at least one, with the options of the first and all providers."""
    providers = itertools.chain.from_iterable(each.providers for each in plans)
    return dataclasses.replace(
        plans[0],
        cases=tuple(itertools.chain.from_iterable(each.cases for each in plans)),
        providers=tuple(dict.fromkeys(providers)),
    )


def check_dtypes(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown one."""
    _check_names("dtype", names, DTYPES)


def _fitting(shapes: Sequence[str]) -> Sequence[str]:
    """Ops with as many dimensions as every shape has numbers; all if there are none."""
    counts = {shape.count("x") + 1 for shape in shapes}
    return [name for name, each in BENCHMARKS.items() if counts == {len(each.dims)}] or [
        *BENCHMARKS
    ]


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _provider_names(benchmarks: Iterable[Benchmark]) -> tuple[str, ...]:
    chained = itertools.chain.from_iterable(benchmark.providers for benchmark in benchmarks)
    return tuple(dict.fromkeys(provider.name for provider in chained))


def _shapes(benchmark: Benchmark, texts: Sequence[str], quick: bool) -> tuple[Shape, ...]:
    if not texts:
        return (benchmark.quick_shape,) if quick else benchmark.shapes
    return tuple(_parse_shape(text, benchmark) for text in dict.fromkeys(texts))


def _parse_shape(text: str, benchmark: Benchmark) -> Shape:
    sizes = text.lower().split("x")
    if len(sizes) != len(benchmark.dims) or not all(
        size.isascii() and size.isdecimal() and size.strip("0") for size in sizes
    ):
        raise ValueError(
            f"shape {text!r}: {benchmark.name} takes {'x'.join(benchmark.dims)}, "
            f"such as {shape_name(benchmark.shapes[0])}"
        )
    # The length first: Python refuses to read numbers of thousands of digits.
    if max(map(len, sizes)) > 18 or math.prod(map(int, sizes)) > _MAX_NUMEL:
        raise ValueError(f"shape {text!r}: more than 2**59 elements, which no tensor can have")
    return tuple(int(size) for size in sizes)
