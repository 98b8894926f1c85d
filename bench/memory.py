"""What a call holds at once, and what a forward keeps for its backward: counted, not timed."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from flamingo_fast.bench import plan
from flamingo_fast.bench.correctness import is_only_rounding, problems
from flamingo_fast.bench.registry import Case, Floor, Shape, Unavailable, shape_name
from flamingo_fast.bench.run import peak_bytes, saved_bytes
from flamingo_fast.bench.tables import Table, digits

_PROVIDERS = ("eager", "ours", "flamingo_pytorch")
_CASES: tuple[tuple[str, Shape], ...] = (
    ("masked_cross_attention", (1, 2048, 32, 8, 64, 64)),
    ("masked_cross_attention_mllama", (1, 1024, 1, 32, 8, 128, 4, 1601)),
    ("latent_attention", (4, 64, 256, 8, 8, 64, 256)),
    ("gated_residual_layer_norm", (2048, 2048)),
    ("GatedCrossAttentionBlock", (4, 256, 5, 1024, 1024)),
    ("PerceiverResampler", (1, 1, 8, 256, 1024, 6)),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of a forward and backward of one provider; saved ones without inputs and weights."""

    op: str
    shape: str
    dtype: str
    provider: str
    peak_bytes: int
    saved_bytes: int


@dataclasses.dataclass
class Results:
    """What came of a run; a provider that disagrees with the oracle has no number."""

    measured: list[Measured] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    not_measured: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def run(
    device: torch.device,
    dtypes: Sequence[str],
    results: Results,
    *,
    quick: bool = False,
    progress: Callable[[str, float], None] = lambda step, share: None,
) -> None:
    """Counts each case once, into `results`; `quick`: in small shapes."""
    cases = [(op, shape, dtype) for op, shape in _CASES for dtype in dtypes]
    for index, (op, shape, dtype) in enumerate(cases):
        progress(f"memory: {op} {dtype}", index / len(cases))
        benchmark = plan.BENCHMARKS[op]
        case = Case(benchmark, benchmark.quick_shape if quick else shape, dtype, device)
        for provider in benchmark.providers:
            if provider.name not in _PROVIDERS:
                continue
            try:
                function = provider.build(case, "fwd_bwd")
            except Unavailable as error:
                results.not_measured.append((f"{case}, {provider.name}", str(error)))
                continue
            assert not isinstance(function, Floor)
            if wrong := problems(case, function, "fwd_bwd"):
                # The baseline may round badly; what it holds does not depend on that.
                is_baseline = provider.name == plan.BASELINE
                if is_baseline and is_only_rounding(case, function, "fwd_bwd"):
                    wrong = []
            if wrong:
                results.failures.append(f"memory, {case}, {provider.name}: {'; '.join(wrong)}")
                continue
            results.measured.append(
                Measured(
                    op,
                    shape_name(case.shape),
                    dtype,
                    provider.name,
                    peak_bytes(case.call(function, "fwd_bwd"), device),
                    saved_bytes(case, function),
                )
            )


def table(results: Results) -> Table:
    """A row for each case and provider, and how many times less ours takes than the baseline."""
    of_baseline = {
        (each.op, each.shape, each.dtype): each
        for each in results.measured
        if each.provider == plan.BASELINE
    }
    rows = []
    for each in results.measured:
        base = of_baseline.get((each.op, each.shape, each.dtype))
        is_other = base is not None and base is not each
        rows.append(
            [
                *(each.op, each.shape, each.dtype, each.provider),
                digits(each.peak_bytes / 1e6),
                digits(each.saved_bytes / 1e6),
                _times(base.peak_bytes, each.peak_bytes) if base and is_other else "",
                _times(base.saved_bytes, each.saved_bytes) if base and is_other else "",
            ]
        )
    return Table(
        "Memory of a forward and backward",
        (
            *("op", "shape", "dtype", "provider", "MB", "MB saved"),
            *("less than eager, x", "saved less, x"),
        ),
        rows,
        4,
        (
            "MB: the most that a call holds at once, with its results. saved: what a forward keeps "
            "for its backward, inputs and weights aside. Counted once, as they are the same again.",
        ),
    )


def _times(base: int, ours: int) -> str:
    return f"{base / ours:.2f}" if ours else ""
