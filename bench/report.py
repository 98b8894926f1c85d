"""Results for people, as tables for the terminal and for markdown, and the files of a run."""

from collections.abc import Sequence

from flamingo_fast.bench import roofline
from flamingo_fast.bench.plan import BASELINE, Plan
from flamingo_fast.bench.records import Measurement
from flamingo_fast.bench.registry import DTYPES, shape_name
from flamingo_fast.bench.run import Results
from flamingo_fast.bench.tables import Table, digits

_COMPARED = (BASELINE, "ours")
MEASURED = "Measured"


def tables(results: Results) -> list[Table]:
    """The measured tables and, without a GPU, the predicted one."""
    found = [_ceilings(results), _measured(results.measurements), _cpu_time(results.measurements)]
    if results.device.type != "cuda":
        found.append(predicted(results.plan))
    return [table for table in found if table.rows]


def _ceilings(results: Results) -> Table:
    rows = [
        [m.kernel, m.dtype, m.unit, digits(m.value.p50), _range(m)]
        for m in results.ceilings.measurements()
    ]
    return Table("Measured ceilings", ("", "dtype", "unit", "median", "p20 to p80"), rows, 3)


def _measured(measurements: Sequence[Measurement]) -> Table:
    by_case: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in measurements:
        case = (m.kernel, m.shape, m.dtype, m.mode, m.provider)
        by_case.setdefault(case, {})[m.metric] = m
    on_gpu = any(m.metric == "cpu_time" for m in measurements)
    has_rates = any(m.metric == "of_matmul_ceiling" for m in measurements)
    rows = [
        [
            *case,
            digits(found["time"].value.p50),
            _range(found["time"]),
            f"{found['speedup'].value.p50:.2f}" if "speedup" in found else "",
            digits(found["bandwidth"].value.p50),
            f"{found['of_copy_ceiling'].value.p50:.0f}",
            *([_share(found, "of_matmul_ceiling")] if has_rates else []),
            digits(found["peak_memory"].value.p50),
            digits(found["saved_for_backward"].value.p50) if "saved_for_backward" in found else "",
            *([digits(found["cpu_time"].value.p50)] if on_gpu else []),
        ]
        for case, found in by_case.items()
        if "time" in found
    ]
    return Table(
        MEASURED,
        (
            *("op", "shape", "dtype", "mode", "provider"),
            *("ms", "p20 to p80", f"x vs {BASELINE}", "GB/s", "% of copy"),
            *(["% of matmul"] if has_rates else []),
            *("MB", "saved"),
            *(["CPU ms"] if on_gpu else []),
        ),
        rows,
        5,
        (
            f"x vs {BASELINE}: median of the ratios of paired rounds; above 1 is faster.",
            "GB/s: useful bytes (each input read and each output written once) over the time; % of "
            "what the machine was measured to copy, and of what it multiplies.",
            "MB: the most that a call holds at once, its results among it.",
            "saved: MB that a forward keeps for its backward, its inputs aside.",
            *(
                ["CPU ms: what starting a call takes; ms is of a GPU that never waits for it."]
                if on_gpu
                else []
            ),
        ),
    )


def _share(found: dict[str, Measurement], metric: str) -> str:
    return f"{found[metric].value.p50:.0f}" if metric in found else ""


def _cpu_time(measurements: Sequence[Measurement]) -> Table:
    by_case: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in measurements:
        if m.metric == "cpu_time_per_call":
            by_case.setdefault((m.kernel, m.shape, m.dtype, m.mode), {})[m.provider] = m
    rows = [
        [*case, *(digits(found[name].value.p50) if name in found else "" for name in _COMPARED)]
        for case, found in by_case.items()
    ]
    headers = ("op", "shape", "dtype", "mode", *(f"{name}, us" for name in _COMPARED))
    return Table("Measured CPU time of a call", headers, rows, 4)


def predicted(plan: Plan) -> Table:
    """What the plan's kernels and their eager compositions would take on GPUs, by the roofline."""
    rows = []
    for benchmark, shape, dtype in plan.cases:
        itemsize = DTYPES[dtype].itemsize
        for mode in plan.modes:
            ours = benchmark.work(shape, itemsize, mode)
            eager = benchmark.eager_work(shape, itemsize, mode)
            times = (
                digits(roofline.predicted_us(work, dtype, gpu))
                for gpu in roofline.GPUS
                for work in (ours, eager)
            )
            rows.append([benchmark.name, shape_name(shape), dtype, mode, *times])
    return Table(
        "Predicted GPU time in us, not measured",
        (
            *("op", "shape", "dtype", "mode"),
            *(f"{gpu.name}\n{name}" for gpu in roofline.GPUS for name in ("ours", BASELINE)),
        ),
        rows,
        4,
        (*roofline.ASSUMPTIONS, *(f"{gpu.name}: {gpu.source}" for gpu in roofline.GPUS)),
    )


def _range(m: Measurement) -> str:
    return f"{digits(m.value.p20)} to {digits(m.value.p80)}"
