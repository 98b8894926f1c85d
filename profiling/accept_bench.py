"""The stages of `accept` that measure: tuning, ops and modules beside ceilings, and table 3."""

import functools
import gc
import statistics
from pathlib import Path

import torch

from flamingo_fast.bench import attention, latent, plan, records, report, run
from flamingo_fast.bench.ceilings import Ceilings, measure_ceilings
from flamingo_fast.bench.registry import shape_name
from flamingo_fast.bench.table3 import predict, ratios
from flamingo_fast.bench.table3_measured import Measurement, Session, check_rows
from flamingo_fast.bench.table3_scales import SCALES
from flamingo_fast.profiling.accept_context import Context, OutOfTimeError

_DTYPE = "bf16"
# Seconds that writing down takes.
_MARGIN_S = 10.0
# What the claims are about comes first.
_FIRST = (
    *(attention.NAME, latent.NAME, "gated_residual_layer_norm", "GatedCrossAttentionBlock"),
    *("GatedCrossAttentionBlock_decode", "PerceiverResampler"),
)
_OURS = "ours"


def tuning(context: Context) -> None:
    """`flamingo-fast tune`'s search, for as long as the stage has."""
    from flamingo_fast.profiling import tune

    out = context.work / "tuned"
    out.mkdir()
    budget_s = max(context.seconds_left - _MARGIN_S, 1.0)
    if context.quick:
        # An interpreter takes a minute for what the tests of `tune` have, too.
        budget_s = min(budget_s, 60.0 if context.on_gpu else 25.0)
    found = tune.tune(context.device, quick=context.quick, out_dir=out, budget_s=budget_s)
    files = sorted(out.rglob("*.json"))
    for file in files:
        # By the name that kernels look for in $FLAMINGO_FAST_CACHE.
        context.keep(file, file.name)
    entries = found["entries"]
    failed = [each for each in found["skipped"] if each["reason"] != tune.BUDGET_ENDED]
    context.check(
        "tuning",
        bool(entries and files) and not failed,
        "; ".join(f"{each['op']}: {each['reason']}" for each in failed)
        or f"{len(entries)} entries, {len(found['skipped'])} cases beyond the budget",
    )


def bench(context: Context) -> None:
    """Each op against the baseline, gated by the reference, with % of measured ceilings."""
    names = list(dict.fromkeys([*_FIRST, *plan.BENCHMARKS]))
    if not context.on_gpu:
        # PyTorch's ops are what is timed there: a few show that it works.
        names = ["squared_relu", attention.NAME, "GatedCrossAttentionBlock_decode"]
    ceilings = measure_ceilings(context.device, (_DTYPE,), budget_s=0.3, quick=context.quick)
    for each in ceilings.measurements():
        number = f"{each.value.p50:.4g}"
        context.row(
            "Ceilings", ("", "dtype", "", "unit"), (each.kernel, each.dtype, number, each.unit)
        )
    csv = context.work / "results.csv"
    context.keep(csv, "results.csv")
    records.write_csv(csv, ceilings.measurements(), records.environment(context.device))
    for index, name in enumerate(names):
        if context.seconds_left < 2 * _MARGIN_S:
            context.note(f"not measured, out of time: {', '.join(names[index:])}")
            return
        context.attempt(name, functools.partial(_bench_op, context, name, ceilings, csv))
    if not context.on_gpu:
        context.not_exercised("a GPU's clock, and what starting a call costs beside it")


def _bench_op(context: Context, name: str, ceilings: Ceilings, csv: Path) -> str:
    def progress(step: str) -> None:
        print(step, flush=True)
        # What `run.run` takes for an interruption by hand: it keeps what is measured.
        if context.seconds_left < _MARGIN_S:
            raise KeyboardInterrupt

    shapes = [] if context.on_gpu else [shape_name(plan.BENCHMARKS[name].tiny_shape)]
    chosen = plan.make_plan(
        ops=[name],
        shapes=shapes,
        dtypes=[_DTYPE],
        quick=context.quick,
        left_out=plan.COMPILED,
    )
    results = run.run(chosen, context.device, progress, ceilings)
    for table in report.tables(results):
        if "Measured" in table.title and "ceilings" not in table.title:
            for row in table.rows:
                context.row(f"{table.title}: {name}", table.headers, row)
    records.write_csv(csv, results.measurements, results.environment)
    if results.is_interrupted:
        context.note(f"{name}: not all of it was measured, out of time")
    others = []
    for line in results.failures:
        # "case mode, provider: what"; of what stopped a whole case there is no provider.
        case, _, provider = line.partition(":")[0].rpartition(", ")
        if not case or provider.startswith(_OURS):
            raise AssertionError("; ".join(results.failures))
        others.append(provider)
    speedups = [
        each.value.p50
        for each in results.measurements
        if (each.provider, each.metric) == (_OURS, "speedup")
    ]
    shares = [
        each.value.p50
        for each in results.measurements
        if (each.provider, each.metric) == (_OURS, "of_copy_ceiling")
    ]
    if not shares and not results.is_interrupted:
        raise AssertionError("ours was not measured")
    parts = [f"{len(shares)} times"]
    if speedups:
        parts.append(f"{min(speedups):.2f} to {max(speedups):.2f} x {plan.BASELINE}")
    if shares:
        parts.append(f"{min(shares):.0f} to {max(shares):.0f} % of what copying reaches")
    if others:
        parts.append(f"wrong and without numbers: {', '.join(dict.fromkeys(others))}")
    return ", ".join(parts)


def table3(context: Context) -> None:
    """Rows of table 3 at the largest scale that memory and time allow; needs timm."""
    scales = ["full", "half", "mini"] if context.on_gpu else ["micro"]
    if context.quick:
        scales = scales[-1:]
    for scale in scales:
        is_last = scale == scales[-1]
        seconds = context.seconds_left - _MARGIN_S
        # A CPU takes long to build the largest models: half of the time is for the others.
        found, why = _rows(context, scale, seconds if is_last else seconds / 2)
        if found:
            ratio = statistics.median(each.ratio for each in found)
            text = f"{len(found)} rows, median {ratio:.2f} of the baseline's step time"
            context.check(f"table 3, {scale}", True, f"{text}{', then ' * bool(why)}{why}")
            return
        if is_last:
            context.check(f"table 3, {scale}", False, why or "no row was measured")
        else:
            context.skip(f"table 3, {scale}", why)
        gc.collect()
        if context.on_gpu:
            torch.cuda.empty_cache()


def _rows(context: Context, scale: str, seconds: float) -> tuple[list[Measurement], str]:
    """Those that there was time for, and what came then."""
    rows, steps = ["every_4th"], 1
    if not context.quick:
        rows, steps = [*rows, *(each for each in check_rows(()) if each not in rows)], 5
    paper = ratios(predict())
    found: list[Measurement] = []

    def progress(row: str, done: int) -> None:
        print(f"{scale}, {row}: {done} steps", flush=True)

    try:
        with context.limit(seconds):
            session = Session(SCALES[scale], rows, steps, context.device, progress=progress)
            for each in session.run():
                found.append(each)
                low_high = f"{each.interval.low:.3f} - {each.interval.high:.3f}"
                context.row(
                    f"Table 3, {scale}, {each.precision}",
                    ("row", "ms", "ratio", "interval", "paper's ratio", "by operations", "GB"),
                    (
                        each.row,
                        f"{1e3 * statistics.median(each.seconds):.1f}",
                        f"{each.ratio:.3f}",
                        low_high,
                        f"{paper[each.row].paper:.3f}",
                        f"{each.flops_ratio:.3f}",
                        f"{each.peak_bytes / 1e9:.2f}",
                    ),
                )
    except OutOfTimeError as error:
        return found, f"out of time: {error}"
    except torch.OutOfMemoryError as error:
        return found, f"out of memory: {str(error).partition('.')[0]}"
    return found, ""
