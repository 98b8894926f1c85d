"""The benchmark's arithmetic, its gate and its files; never how long anything took."""

import csv
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

import flamingo_fast
from flamingo_fast.bench import (
    attention,
    growth,
    latent,
    pairs,
    plan,
    plot,
    records,
    registry,
    roofline,
    several_media,
    several_media_work,
    tables,
    timing,
    work,
)
from flamingo_fast.bench import run as bench_run
from flamingo_fast.bench.correctness import disagreements, problems
from flamingo_fast.bench.records import Environment, Measurement
from flamingo_fast.bench.registry import DTYPES, MODES, Benchmark, Case, Unavailable, plain
from flamingo_fast.bench.timing import MIN_ROUNDS, Quantiles, interleaved, paired_ratios
from flamingo_fast.cli import app
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import peers

CPU = torch.device("cpu")
ATTENTION = plan.BENCHMARKS["masked_cross_attention"]


def small_shape(op: Benchmark) -> tuple[int, ...]:
    if op.name == "PerceiverResampler":
        # 64 rows: PyTorch adds up bf16 gradients of LayerNorm in bf16.
        return (1, 1, 2, 5, 64, 1)
    return {
        2: (16, 64),
        5: (5, 64, 2, 16, 8),
        6: (2, 300, 3, 2, 16, 8),
        7: (3, 6, 20, 4, 2, 16, 9),
        8: (2, 300, 3, 4, 2, 16, 2, 8),
    }[len(op.dims)]


def bench(*args: str) -> Result:
    # Wide enough for paths to stay on one line.
    return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": "400"})


# Work


@pytest.mark.parametrize(
    ("formula", "mode", "loaded", "stored"),
    [
        # 3 rows of 5 bf16 elements: 30 bytes a tensor, 10 a parameter, 12 of fp32 a statistic.
        (work.squared_relu, "fwd", 30, 30),
        (work.squared_relu, "bwd", 60, 30),
        (work.gated_residual, "fwd", 60 + 2, 30),
        (work.gated_residual, "bwd", 60 + 2, 30 + 2),
        (work.norm, "fwd", 30 + 20, 30 + 24),
        (work.norm, "bwd", 60 + 24 + 10, 30 + 20),
        (work.gated_residual_norm, "fwd", 60 + 2 + 20, 60 + 24),
        (work.gated_residual_norm, "bwd", 120 + 2 + 24 + 10, 60 + 2 + 20),
        (work.gated_residual_norm, "fwd_bwd", 60 + 2 + 20 + 156, 60 + 24 + 82),
    ],
)
def test_bytes_by_hand(
    formula: Callable[..., work.Work], mode: str, loaded: int, stored: int
) -> None:
    found = formula((3, 5), 2, mode)
    assert (found.loaded, found.stored) == (loaded, stored)
    assert found.bytes == loaded + stored


def test_bytes_of_variants_by_hand() -> None:
    rms = work.norm((3, 5), 2, "bwd", rms=True)
    assert (rms.loaded, rms.stored) == (60 + 12 + 10, 30 + 10)
    twice = work.norm((3, 5), 2, "bwd", column_pass=True)
    assert twice.loaded == work.norm((3, 5), 2, "bwd").loaded + 60


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gated_residual_layer_norm"])
def test_norms_too_wide_for_one_pass_read_their_inputs_again(op: str) -> None:
    pytest.importorskip("triton")
    from flamingo_fast.kernels.norm_config import WIDEST_KEPT

    assert work.WIDEST_ONE_PASS == WIDEST_KEPT
    formula = plan.BENCHMARKS[op].work
    once = 4 if op.startswith("gated") else 2
    statistic = 4 if op == "rms_norm" else 8
    for width, elements in ((WIDEST_KEPT, once), (WIDEST_KEPT + 16, once + 2)):
        row = formula((2, width), 2, "bwd").loaded - formula((1, width), 2, "bwd").loaded
        assert row == elements * width * 2 + statistic


def test_flops_by_hand() -> None:
    assert work.gated_residual((3, 5), 2, "fwd_bwd").vector_flops == 15 * (2 + 3)
    assert work.gated_residual_norm((3, 5), 2, "fwd").vector_flops == 15 * (2 + 7)


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Without the copies that an expanded tensor only seems to have."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride != 0)


class _CountBytes(TorchDispatchMode):
    """Bytes that kernels read and write when each touches every tensor once; views touch none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            # The tensors that `cat` puts together are in a list.
            tensors = pytree.tree_leaves((args, results))
            self.bytes += sum(_distinct_bytes(t) for t in tensors if isinstance(t, torch.Tensor))
        return results


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
# RMSNorm is one kernel on a GPU only; elsewhere PyTorch composes it.
@pytest.mark.parametrize(
    ("op", "shape", "tolerance"),
    [
        ("gated_residual", (256, 512), 0.01),
        ("gated_residual_layer_norm", (256, 512), 0.01),
        ("layer_norm", (256, 512), 0.01),
        ("squared_relu", (256, 512), 0.01),
        # Masks and copies of gradients, which the formula leaves out; one sample needs no others.
        ("masked_cross_attention", (1, 1024, 2, 8, 64, 64), 0.02),
        ("masked_cross_attention_all_previous", (1, 1024, 2, 8, 64, 64), 0.02),
        ("masked_cross_attention_idefics", (1, 512, 2, 16, 64, 64), 0.02),
        ("masked_cross_attention_mllama", (1, 256, 1, 16, 4, 64, 2, 64), 0.02),
        ("latent_attention", (1, 64, 1024, 8, 8, 64, 1024), 0.02),
        ("latent_attention", (1, 64, 1024, 8, 2, 64, 1024), 0.02),
    ],
)
def test_eager_bytes_are_those_of_pytorchs_kernels(
    op: str, shape: tuple[int, ...], tolerance: float, mode: str
) -> None:
    case = Case(plan.BENCHMARKS[op], shape, "fp32", CPU)
    benchmark, inputs = case.benchmark, case.inputs.values()
    leaves = [value for value in inputs if isinstance(value, torch.Tensor)]
    eager = benchmark.build_eager(case, False)
    with _CountBytes() as forward:
        outputs = eager(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.empty_like(out) for out in outputs]
    with _CountBytes() as backward:
        torch.autograd.grad(outputs, leaves, douts)
    counted = forward.bytes if mode == "fwd" else backward.bytes
    assert benchmark.eager_work(shape, 4, mode).bytes == pytest.approx(counted, rel=tolerance)


def test_predicted_time_by_hand() -> None:
    h100 = next(gpu for gpu in roofline.GPUS if gpu.name == "H100")
    memory_bound = work.gated_residual((2048, 4096), 2, "fwd")
    assert roofline.predicted_us(memory_bound, "bf16", h100) == pytest.approx(15.02, abs=0.01)
    compute_bound = work.Work(1, 1, 0, matmul_flops=989 * 10**12)
    assert roofline.predicted_us(compute_bound, "bf16", h100) == pytest.approx(1e6)


# Timing


def test_quantiles() -> None:
    assert Quantiles.of(range(11)) == Quantiles(5, 2, 8, 11)


def test_ratios_are_of_the_same_round() -> None:
    # The machine slows down fourfold on the way; the pairs don't notice.
    ratios = paired_ratios([2, 4, 6, 8], [1, 2, 3, 4])
    assert (ratios.p50, ratios.p20, ratios.p80) == (2, 2, 2)
    assert paired_ratios([1, 1, 1], [2, 2, 2]).p50 == 0.5


def test_rounds_are_interleaved_in_changing_order() -> None:
    started: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: started.append(name)

    def sample(function: Callable[[], object]) -> float:
        function()
        return float(len(started))

    samples = interleaved({name: call(name) for name in "abc"}, sample, budget_s=0)
    assert {len(values) for values in samples.values()} == {MIN_ROUNDS}
    timed = started[3:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    for index, order in enumerate(rounds):
        for place, name in enumerate(order):
            assert samples[name][index] == 3 + index * 3 + place + 1


def test_only_benchmarks_that_say_so_get_fewer_rounds_when_these_take_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_LONG_S", 0.0)
    calls = {"a": lambda: None}
    for fewest in (5, MIN_ROUNDS):
        samples = interleaved(calls, lambda call: 1.0, budget_s=0, fewest_rounds=fewest)
        assert len(samples["a"]) == fewest


# Results file

ENVIRONMENT = Environment("cpu", 2, "3.11.9", "2.13.0", "none", "3.9.0", "0.1.0", "abc")
TIME = Measurement(
    "op", "ours", "fwd", "2x2", "bf16", "time", "ms", Quantiles(1.0, 0.9, 1.1, samples=15)
)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_run_replaces_its_rows_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    eager = dataclasses.replace(TIME, provider="eager")
    records.write_csv(path, [TIME, eager], ENVIRONMENT)
    faster = dataclasses.replace(TIME, value=Quantiles(0.5, 0.4, 0.6, samples=20))
    records.write_csv(path, [faster], ENVIRONMENT)
    rows = rows_of(path)
    assert [(row["provider"], row["p50"], row["samples"]) for row in rows] == [
        ("ours", "0.5", "20"),
        ("eager", "1", "15"),
    ]
    records.write_csv(path, [TIME], dataclasses.replace(ENVIRONMENT, commit="def"))
    assert [row["commit"] for row in rows_of(path)] == ["abc", "abc", "def"]
    assert set(rows[0]) == set(records.COLUMNS)


HEADER = ",".join(records.COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"kernel,ms\n", "its columns are not this version's"),
        (f"{HEADER}1\n".encode(), "row 2 has 1 fields"),
        (f"{HEADER}{'1,' * len(records.COLUMNS)}1\n".encode(), "row 2 has"),
        (bytes(range(256)), "not a CSV file"),
        (f'{HEADER}"1'.encode(), "not a CSV file"),
    ],
)
def test_a_results_file_that_cannot_be_kept_is_refused_before_measuring(
    content: bytes, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "run", lambda *_: pytest.fail("measured"))
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    result = bench("--out", str(tmp_path))
    assert result.exit_code == 2
    assert f"{path}: {problem}" in result.output
    assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("folder", ["/proc", "/proc/results"])
def test_an_unwritable_folder_is_refused_before_measuring(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "run", lambda *_: pytest.fail("measured"))
    result = bench("--out", folder)
    assert result.exit_code == 2
    assert f"can't write to {folder}" in result.output


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "'no-such-compiler' is no executable"), ("", "")]
)
def test_torch_compile_is_unavailable_without_what_it_needs(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an executable in $CXX; without Python.h."""
    if not compiler:
        compiler, reason = sys.executable, f"{tmp_path / 'Python.h'} is missing"
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    case = Case(plan.BENCHMARKS["squared_relu"], (2, 4), "fp32", CPU)
    provider = case.benchmark.providers[1]
    with pytest.raises(Unavailable, match=re.escape(reason)):
        provider.build(case, "fwd")
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", sys.executable)
    assert callable(provider.build(case, "fwd"))


# Command


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--op", "softmax"], ["unknown op 'softmax'", "gated_residual", "squared_relu"]),
        (["--provider", "jax"], ["unknown provider 'jax'", "eager, compile, ours", "liger"]),
        (["--op", "gated_residual", "--provider", "liger"], ["eager, compile, ours"]),
        (["--dtype", "int8"], ["unknown dtype 'int8'", "fp32, bf16, fp16"]),
        (["--mode", "bwd"], ["unknown mode 'bwd'", "fwd, fwd_bwd"]),
        (["--shape", "2048"], ["shape '2048'", "rowsxwidth", "2048x2048"]),
        (["--shape", "0x8"], ["shape '0x8'"]),
        (["--shape", "axb"], ["shape 'axb'"]),
        (["--shape", "99999999999999999999x2"], ["shape '99999999999999999999x2'", "2**59"]),
        (["--shape", "9999999999x9999999999"], ["2**59 elements"]),
        (["--shape", "9" * 5000 + "x2"], ["2**59 elements"]),
        (["--shape", "1x2x3"], ["shape '1x2x3'", "rowsxwidth"]),
        (
            ["--op", "masked_cross_attention", "--shape", "8x8"],
            ["BxLxNxHxDxR", "8x256x5x16x128x64"],
        ),
        (["growth", "--shape", "8x8"], ["growth chooses its shapes"]),
        (["growth", "--op", "squared_relu"], ["unknown op 'squared_relu'", ATTENTION.name]),
        (["--out", __file__], ["is a file"]),
        (["speed"], ["suite: expected some of ops, modules, decode", "got 'speed'"]),
        (["memory", "--dtype", "int8"], ["unknown dtype 'int8'"]),
        (["table3", "--scale", "huge"], ["scale: expected one of full, half, mini, micro"]),
        (["table3", "--rows", "every_5th"], ["rows: expected some of baseline", "'every_5th'"]),
        (["table3", "--impl", "cuda"], ["impl: expected one of auto, reference, peer"]),
        (["model", "--preset", "flamingo-4b"], ["preset: ", "'flamingo-4b'"]),
    ],
)
def test_a_wrong_option_is_named(args: list[str], expected: list[str], tmp_path: Path) -> None:
    result = bench("--out", str(tmp_path), *args)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    # The message comes in a box, broken into lines.
    words = " ".join(result.output.replace("│", " ").split())
    for text in expected:
        assert text in words
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("bench")
    args = "--op gated_residual_rms_norm --op squared_relu --quick --shape 16x64 --dtype bf16"
    return bench(*args.split(), "--out", str(out)), out


def test_a_quick_run_writes_its_numbers(quick_run: tuple[Result, Path]) -> None:
    result, out = quick_run
    assert result.exit_code == 0, result.output
    rows = rows_of(out / "results.csv")
    found = {(r["kernel"], r["provider"], r["mode"], r["shape"], r["metric"]) for r in rows}
    for op in ("gated_residual_rms_norm", "squared_relu"):
        for provider in ("eager", "ours"):
            for mode in MODES:
                for metric in ("time", "speedup", "bandwidth", "of_copy_ceiling", "peak_memory"):
                    assert (op, provider, mode, "16x64", metric) in found
                assert (op, provider, mode, "1x64", "cpu_time_per_call") in found
            assert (op, provider, "fwd_bwd", "16x64", "saved_for_backward") in found
            assert (op, provider, "fwd", "16x64", "saved_for_backward") not in found
    assert {("copy", "bandwidth"), ("matmul", "rate")} <= {(r["kernel"], r["metric"]) for r in rows}
    for row in rows:
        counted = row["metric"] in ("peak_memory", "saved_for_backward")
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) < math.inf or counted
        assert int(row["samples"]) >= (1 if counted else MIN_ROUNDS)
        assert row["unit"] and row["device"] and row["torch"] == torch.__version__
    speedups = [r for r in rows if r["metric"] == "speedup" and r["provider"] == "eager"]
    assert {row["p50"] for row in speedups} == {"1"}


def test_bandwidth_is_useful_bytes_over_time(quick_run: tuple[Result, Path]) -> None:
    rows = rows_of(quick_run[1] / "results.csv")
    value = {
        row["metric"]: float(row["p50"])
        for row in rows
        if (row["kernel"], row["provider"], row["mode"]) == ("squared_relu", "ours", "fwd")
        and row["shape"] == "16x64"
    }
    assert value["bandwidth"] * value["time"] * 1e6 == pytest.approx(2 * 16 * 64 * 2, rel=0.01)


def test_a_quick_run_draws_and_reports(quick_run: tuple[Result, Path]) -> None:
    result, out = quick_run
    image = (out / "ops.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    markdown = (out / "report.md").read_text()
    for text in ("x vs eager", "GB/s", "% of copy", "Measured ceilings", "16x64", "us |"):
        assert text in markdown
    assert str(out / "report.md") in result.output
    # Nothing that was not run is passed over.
    assert "left out of a quick run" in markdown and "Liger's kernels need a GPU" in markdown


@pytest.mark.skipif(torch.cuda.is_available(), reason="predictions stand in for a GPU")
def test_predictions_are_labelled_and_apart(quick_run: tuple[Result, Path]) -> None:
    result, out = quick_run
    measured, _, predicted = (out / "report.md").read_text().partition("## Predicted")
    for gpu in roofline.GPUS:
        assert gpu.name in predicted and gpu.source in predicted
        assert gpu.name not in measured
    assert all(assumption in predicted for assumption in roofline.ASSUMPTIONS)
    assert "Predicted GPU time" in result.output
    assert "H100" not in (out / "results.csv").read_text()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"flamingo_fast\[bench\]"):
        plot.import_pyplot()


# Gate


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", plan.BENCHMARKS.values(), ids=lambda b: b.name)
def test_eager_and_ours_pass_the_gate(op: Benchmark, dtype: str) -> None:
    case = Case(op, small_shape(op), dtype, CPU)
    for mode in MODES:
        assert problems(case, op.build_eager(case, False), mode) == []
        assert problems(case, op.ours, mode) == []


def wrong_value(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, 1.1 * y, gate)


def wrong_row(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    last = torch.arange(x.shape[0])[:, None] == x.shape[0] - 1
    return flamingo_fast.gated_residual(x, y.masked_fill(last, 0), gate)


def wrong_gradient(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate) + 0 * y.detach() + 0.1 * (gate - gate.detach())


def not_finite(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate) / torch.zeros(())


def wrong_dtype(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate).double()


def raising(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no reason")


@pytest.mark.parametrize(
    ("function", "mode", "problem"),
    [
        (wrong_value, "fwd", "out: RMS error"),
        (wrong_row, "fwd", "out: largest error"),
        (wrong_gradient, "fwd_bwd", "dgate: RMS error"),
        (not_finite, "fwd", "out: not finite"),
        (wrong_dtype, "fwd", "out: (4096, 64) torch.float64, expected (4096, 64) torch.bfloat16"),
        (raising, "fwd", "ZeroDivisionError: no reason"),
    ],
)
def test_the_gate_catches(function: Callable[..., Any], mode: str, problem: str) -> None:
    case = Case(plan.BENCHMARKS["gated_residual"], (4096, 64), "bf16", CPU)
    found = problems(case, function, mode)
    assert len(found) == 1 and found[0].startswith(problem)


def test_a_missing_output_is_caught() -> None:
    case = Case(plan.BENCHMARKS["gated_residual_rms_norm"], (4, 64), "fp32", CPU)
    found = problems(case, lambda *inputs: case.benchmark.ours(*inputs)[0], "fwd")
    assert found == ["ValueError: 1 tensors, expected residual, normed"]


def test_the_gate_leaves_its_inputs_alone() -> None:
    # dx is the incoming gradient itself, which must survive being compared.
    case = Case(plan.BENCHMARKS["gated_residual"], (4, 64), "fp32", CPU)
    call = case.call(case.benchmark.build_eager(case, False), "fwd_bwd")
    before = case.named(call())["dx"].clone()
    assert not disagreements(case.named(call()), case.expected)
    assert torch.equal(case.named(call())["dx"], before)


def replace_benchmark(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    wrong = dataclasses.replace(plan.BENCHMARKS["gated_residual"], **changes)
    monkeypatch.setattr(plan, "BENCHMARKS", {"gated_residual": wrong})


def wrong_unless_reference(*inputs: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    if impl == "reference":
        return flamingo_fast.gated_residual(*inputs, impl=impl)
    return wrong_value(*inputs)


def test_a_wrong_provider_gets_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_benchmark(monkeypatch, ours=wrong_unless_reference)
    result = bench("--quick", "--shape", "16x64", "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "FAILED: gated_residual 16x64 bf16 fwd, ours: out: RMS error" in result.output
    assert "## Failed" in (tmp_path / "report.md").read_text()
    providers = {r["provider"] for r in rows_of(tmp_path / "results.csv")}
    assert providers == {"torch", "eager"}


def test_nothing_is_compared_to_a_wrong_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_benchmark(monkeypatch, build_eager=plain(wrong_value))
    result = bench("--quick", "--shape", "16x64", "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert {r["provider"] for r in rows_of(tmp_path / "results.csv")} == {"torch"}
    assert not (tmp_path / "ops.png").exists()


def rounds_badly(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return wrong_value(x, y, gate) if x.dtype == torch.bfloat16 else x + gate.tanh() * y


def test_a_baseline_that_only_rounds_badly_is_measured_and_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_benchmark(monkeypatch, build_eager=plain(rounds_badly))
    args = ("--quick", "--shape", "16x64", "--mode", "fwd", "--dtype", "bf16")
    result = bench(*args, "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "Note: gated_residual 16x64 bf16 fwd, eager: out: RMS error" in result.output
    assert {r["provider"] for r in rows_of(tmp_path / "results.csv")} == {"torch", "eager", "ours"}


def test_running_out_of_memory_is_a_failure_without_a_traceback(tmp_path: Path) -> None:
    shape = "1000000000x1000000"
    args = ("--op", "squared_relu", "--quick", "--shape", shape, "--dtype", "fp32")
    result = bench(*args, "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"FAILED: squared_relu {shape} fp32: " in result.output


# Attention


def attention_provider(name: str, case: Case, mode: str) -> Callable[..., Any]:
    return next(p for p in case.benchmark.providers if p.name == name).build(case, mode)


@pytest.mark.parametrize(
    ("op", "shape", "provider"),
    [
        *(
            ("", shape, provider)
            for shape in ((2, 300, 3, 2, 16, 8), (1, 1, 5, 2, 16, 8))
            for provider in ("sdpa", "open_flamingo")
        ),
        ("_all_previous", (2, 300, 3, 2, 16, 8), "sdpa"),
        *(("_all_previous", (1, 1, 5, 2, 16, 8), name) for name in ("eager", "ours", "sdpa")),
        *((f"_{name}", (2, 50, 8, 2, 24, 8), "sdpa") for name in ("idefics", "random", "sparse")),
        ("_mllama", (2, 300, 3, 4, 2, 16, 2, 8), "sdpa"),
        *(("_mllama", (1, 1, 1, 4, 2, 16, 4, 5), name) for name in ("eager", "ours", "sdpa")),
        *(("_pairs", (5, 32, 2, 16, 8), provider) for provider in ("sdpa", "ours_padded")),
        *(("_pairs_layer", (5, 32, 2, 16, 8, 24), name) for name in ("eager", "sdpa")),
        ("_pairs_layer", (5, 32, 2, 16, 8, 24), "ours_padded"),
    ],
)
def test_attention_providers_pass_the_gate(op: str, shape: tuple[int, ...], provider: str) -> None:
    case = Case(plan.BENCHMARKS[ATTENTION.name + op], shape, "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider(provider, case, mode), mode) == []


@pytest.mark.parametrize(
    "op",
    [latent.NAME, *(ATTENTION.name + variant for variant in ("", "_even", "_idefics", "_pairs"))],
)
def test_libraries_that_need_a_gpu_say_so(op: str) -> None:
    benchmark = plan.BENCHMARKS[op]
    case = Case(benchmark, benchmark.tiny_shape, "bf16", CPU)
    for library in ("varlen", "flash_attn", "xformers"):
        with pytest.raises(Unavailable, match="its kernels need a GPU"):
            attention_provider(library, case, "fwd")


@pytest.mark.parametrize("shortest", [9, 20])
def test_sdpa_of_latents_passes_the_gate(shortest: int) -> None:
    case = Case(plan.BENCHMARKS[latent.NAME], (3, 6, 20, 4, 2, 16, shortest), "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider("sdpa", case, mode), mode) == []


@pytest.mark.parametrize("op", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
def test_flamingo_pytorch_passes_the_gate(op: str) -> None:
    case = Case(plan.BENCHMARKS[op], (2, 12, 3, 16, 16), "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider("flamingo_pytorch", case, mode), mode) == []
    case = Case(plan.BENCHMARKS[op], (2, 12, 3, 16, 24), "fp32", CPU)
    with pytest.raises(Unavailable, match="as wide as its text"):
        attention_provider("flamingo_pytorch", case, "fwd")


@pytest.mark.parametrize(
    "op", ["GatedCrossAttentionBlock", "GatedCrossAttentionBlock_decode", "PerceiverResampler"]
)
def test_the_floor_is_the_products_of_the_module(op: str) -> None:
    """Those that ours does, in FLOPs; of the resampler's first layer ours does latents once."""
    case = Case(plan.BENCHMARKS[op], small_shape(plan.BENCHMARKS[op]), "fp32", CPU)
    counts = {}
    for name in ("ours", "floor"):
        function = attention_provider(name, case, "fwd")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            case.call(function, "fwd")()
        flops = counter.get_flop_counts()["Global"]
        counts[name] = sum(flops.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert counts["ours"] <= counts["floor"] * 1.001
    if op != "PerceiverResampler":
        assert counts["ours"] == counts["floor"] > 0


def test_the_gate_compares_the_tokens_of_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(plan.BENCHMARKS[pairs.NAME], (5, 64, 2, 16, 8), "fp32", CPU)
    padded = attention_provider("ours_padded", case, "fwd_bwd")
    with_next_image = dataclasses.replace(
        padded, function=lambda q, k, v, layout: padded.function(q, k, v.roll(1, 0), layout)
    )
    found = problems(case, with_next_image, "fwd_bwd")
    assert [line.partition(":")[0] for line in found] == ["out", "dq", "dk", "dv"]
    # Compiled it is the function inside, not what is around it.
    monkeypatch.setattr(registry, "require_inductor", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = attention_provider("compile", case, "fwd_bwd")
    assert problems(case, compiled, "fwd_bwd") == []


# Layouts of the attention benchmarks


def test_mllama_masks_are_those_of_its_processor() -> None:
    pytest.importorskip("transformers")
    for media in (1, 3):
        mask = several_media.tile_mask((2, 40, media, 1, 1, 1, 4, 1))
        ids = torch.zeros(2, 40, dtype=torch.int64)
        ids[:, mask[0, :, :, 0].argmax(0)] = 7
        theirs = peers.mllama_cross_attention_mask(ids.tolist(), 7, [[4] * media] * 2)
        assert torch.equal(mask, theirs)
        last = several_media.tile_mask((2, 1, media, 1, 1, 1, 4, 1))
        assert torch.equal(last, theirs[:, -1:])
    layout = several_media.mllama_layout((1, 40, 1, 1, 1, 1, 4, 5), CPU)
    assert layout.attends()[0].tolist() == [False] + 39 * [True]
    assert layout.media_seqlens.tolist() == [20]


def test_idefics_masks_are_those_of_its_processor() -> None:
    pytest.importorskip("transformers")
    mask = several_media.one_hot_mask((3, 90, 8))
    counts = mask.sum(2)
    # There is text before the first image, and between the end of a document and the next image.
    assert counts.unique().tolist() == [0, 1]
    assert (counts.diff(dim=1) < 0).any() and (counts.diff(dim=1) > 0).sum() > 3
    ids = torch.zeros(3, 90, dtype=torch.int64)
    ids[:, :-1][counts.diff(dim=1) < 0] = 2
    ids.scatter_(1, mask.int().argmax(1), 7)
    assert torch.equal(mask, peers.idefics_image_attention_mask(ids, 7, 2, 8).bool())


def test_masks_with_holes() -> None:
    shape = (2, 512, 8)
    random = several_media.random_mask(shape)
    assert random.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (random[:, 1:] == random[:, :-1]).float().mean() == pytest.approx(0.5, abs=0.02)
    sparse = several_media.sparse_mask((*shape, 1, 1, 1))
    last = attention.media_layout((*shape, 1, 1, 1), CPU).media_end
    for sample, token in itertools.product(range(2), range(0, 512, 7)):
        attended = sparse[sample, token].nonzero().flatten().tolist()
        count = int(last[sample, token])
        assert attended == sorted({0, count - 1} if count else ())


@pytest.mark.parametrize(("longest", "mean"), [(64, 20.5), (32, 12.4)])
def test_lengths_of_pairs(longest: int, mean: float) -> None:
    """Geometric, before what is longer is cut off."""
    lengths = pairs.text_lengths((512, longest))
    cut_mean = sum((1 - 1 / mean) ** count for count in range(longest))
    assert lengths.double().mean() == pytest.approx(cut_mean, rel=0.01)
    assert cut_mean == pytest.approx(mean, rel=0.1)
    assert (lengths.min(), lengths.max()) == (1, longest)
    of_the_longest = float((lengths == longest).double().mean())
    assert of_the_longest == pytest.approx((1 - 1 / mean) ** (longest - 1), abs=0.01)
    assert lengths.median() == pytest.approx(mean * math.log(2), abs=1)
    assert torch.equal(lengths, pairs.text_lengths((512, longest)))
    assert not torch.equal(lengths, lengths.sort().values)


def test_pairs_are_packed_and_padded() -> None:
    shape = (6, 32, 1, 16, 4)
    lengths = pairs.text_lengths(shape)
    packed, padded = pairs.packed_layout(shape, CPU), pairs.padded_layout(shape, CPU)
    expected = torch.arange(6).repeat_interleave(lengths)
    assert torch.equal(packed.media_start[0].long(), expected)
    assert torch.equal(packed.media_end[0].long(), expected + 1)
    assert (padded.media_start.shape, padded.max_media_per_token) == ((6, 32), 1)
    assert padded.attends().all()


# Work of the attention benchmarks


def _layouts_with_heads() -> dict[str, tuple[MediaLayout, int, int, bool]]:
    """Layout, query and key heads, whether tokens without a medium attend to everything."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 9, 4, generator=generator) < 0.3
    lengths = torch.tensor([5, 0, 3, 7, 1, 5, 5, 2])
    return {
        "holes": (MediaLayout.from_media_mask(mask, media_seqlens=lengths), 2, 2, False),
        "dense": (MediaLayout.from_media_mask(mask, media_seqlens=lengths), 4, 2, True),
        "all_previous": (
            attention.media_layout((2, 9, 4, 1, 1, 1), CPU, attend="all_previous"),
            *(2, 1, False),
        ),
        "packed": (pairs.packed_layout((4, 16), CPU), 2, 2, False),
        "unequal": (
            MediaLayout.from_media_locations(torch.eye(3, 7).bool(), [2, 0, 3]),
            *(2, 2, False),
        ),
    }


@pytest.mark.parametrize("name", ["holes", "dense", "all_previous", "packed", "unequal"])
def test_useful_work_counted_one_by_one(name: str) -> None:
    layout, heads, kv_heads, dense = _layouts_with_heads()[name]
    num_keys, head_dim, itemsize = 6, 16, 2
    cu_media = layout.cu_media.tolist()
    lengths = [num_keys] * layout.media_total
    if layout.media_seqlens is not None:
        lengths = [min(length, num_keys) for length in layout.media_seqlens.tolist()]
    scores, read = 0, set()
    for sample, row in enumerate(layout.to_mask().tolist()):
        first, last = cu_media[sample : sample + 2]
        for attended in row:
            keys = {
                (first + medium, key)
                for medium, attends in enumerate(attended)
                if attends
                for key in range(lengths[first + medium])
            }
            if dense and not keys:
                keys = set(itertools.product(range(first, last), range(num_keys)))
            read |= keys
            scores += len(keys) * heads
    row_bytes = layout.media_start.numel() * heads * head_dim * itemsize
    key_bytes = 2 * kv_heads * head_dim * itemsize
    read_bytes, all_bytes = len(read) * key_bytes, layout.media_total * num_keys * key_bytes
    lse = layout.media_start.numel() * heads * 4
    for mode, loaded, stored, products in (
        ("fwd", row_bytes + read_bytes, row_bytes, 2),
        ("bwd", 2 * row_bytes + read_bytes + lse, row_bytes + all_bytes, 5),
        (
            *("fwd_bwd", 3 * row_bytes + 2 * read_bytes + lse),
            *(2 * row_bytes + all_bytes + lse, 7),
        ),
    ):
        found = several_media_work.attention_of_layout(
            layout, heads, kv_heads, head_dim, num_keys, itemsize, mode, dense=dense
        )
        assert (found.loaded, found.stored) == (loaded, stored), mode
        assert found.matmul_flops == products * 2 * scores * head_dim, mode


def test_useful_work_of_one_medium_a_token_is_that_formula() -> None:
    shape = (2, 12, 3, 2, 16, 8)
    locations = torch.zeros(2, 12, dtype=torch.bool)
    locations[:, [0, 5, 8]] = True
    layout = MediaLayout.from_media_locations(locations, 3)
    for mode in ("fwd", "fwd_lse", "bwd", "fwd_bwd"):
        found = several_media_work.attention_of_layout(layout, 2, 2, 16, 8, 2, mode)
        assert found == work.masked_cross_attention(shape, 2, mode)


@pytest.mark.parametrize("shortest", [3, 9])
def test_useful_work_of_latents_is_that_of_a_layout(shortest: int) -> None:
    """Of one medium a sample, whose keys are the valid features and the latents."""
    shape = (4, 5, 9, 4, 2, 16, shortest)
    lengths = latent.media_seqlens(shape)
    assert lengths is None or (lengths.tolist(), shortest) == ([9, 7, 5, 3], 3)
    start = torch.zeros(4, 5, dtype=torch.int64)
    valid = None if lengths is None else lengths + 5
    layout = MediaLayout.from_intervals(start, start + 1, 1, 1, media_seqlens=valid)
    for mode in ("fwd", "fwd_lse", "bwd", "fwd_bwd"):
        expected = several_media_work.attention_of_layout(layout, 4, 2, 16, 14, 2, mode)
        assert latent.attention_work(shape, 2, mode) == expected


def test_useful_work_grows_with_attended_media() -> None:
    """In proportion where all before are attended to; with a sparse mask it stays."""
    few, many = ((1, 2048, media, 8, 64, 64) for media in (8, 64))
    ratios = []
    for op in (several_media.ALL_PREVIOUS, several_media.SPARSE):
        flops = [plan.BENCHMARKS[op].work(shape, 2, "fwd").matmul_flops for shape in (few, many)]
        ratios.append(flops[1] / flops[0])
    assert ratios[0] > 6
    assert ratios[1] < 1.5


def test_flex_attention_has_the_right_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: that takes seconds, and a compiler."""
    case = Case(ATTENTION, (2, 150, 3, 2, 16, 8), "fp32", CPU)
    monkeypatch.setattr(attention, "require_inductor", lambda device: None)
    with pytest.raises(Unavailable, match="no backward on a CPU"):
        attention_provider("flex_attention", case, "fwd_bwd")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    function = attention_provider("flex_attention", case, "fwd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert problems(case, function, "fwd") == []


@pytest.mark.parametrize("positions", ["random", "even"])
def test_the_blocked_reference_is_the_reference(positions: str) -> None:
    """300 tokens are two blocks, and a medium lies in both."""
    shape = (2, 300, 3, 2, 16, 8)
    layout = attention.media_layout(shape, CPU, even=positions == "even")
    assert layout.media_end[0, 255] == layout.media_end[0, 256] > 0
    q = torch.randn(2, 300, 2, 16, requires_grad=True)
    k, v = (torch.randn(2, 3, 8, 2, 16, requires_grad=True) for _ in range(2))
    results = []
    for function in (ATTENTION.ours, flamingo_fast.masked_cross_attention):
        out = function(q, k, v, layout, impl="reference")
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for blocked, whole in zip(*results, strict=True):
        torch.testing.assert_close(blocked, whole)


def test_dense_scores_too_many_for_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(ATTENTION, (1, 16, 2, 1, 16, 8), "fp32", CPU)
    monkeypatch.setattr(attention, "num_scores", lambda case: 8192 * 8192 * 16)
    for provider in ("eager", "compile", "sdpa", "open_flamingo"):
        with pytest.raises(Unavailable, match="1.1e\\+09 scores of all tokens and keys"):
            attention_provider(provider, case, "fwd")
    assert callable(attention_provider("ours", case, "fwd"))


def test_without_a_baseline_there_are_times_but_no_ratios(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(attention, "num_scores", lambda case: 2**40)
    args = ["--op", ATTENTION.name, "--shape", "1x64x2x1x16x8", "--mode", "fwd", "--quick"]
    result = bench(*args, "--dtype", "fp32", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = [row for row in rows_of(tmp_path / "results.csv") if row["shape"]]
    assert {row["provider"] for row in rows} == {"ours"}
    metrics = {row["metric"] for row in rows}
    assert "speedup" not in metrics and {"time", "peak_memory", "rate"} <= metrics
    assert (
        "| eager (masked_cross_attention) | 1.1e+12 scores" in (tmp_path / "report.md").read_text()
    )
    assert (tmp_path / "ops.png").exists()


def test_shapes_without_ops_are_for_the_ops_that_can_have_them() -> None:
    for shape, dims in (("8x64", 2), ("1x64x2x1x16x8", 6)):
        chosen = plan.make_plan(shapes=(shape,)).benchmarks
        assert chosen == tuple(b for b in plan.BENCHMARKS.values() if len(b.dims) == dims)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's allocations")
def test_peak_memory_counts_what_lives_at_once() -> None:
    kilobyte = torch.ones(256)

    def call() -> tuple[torch.Tensor, ...]:
        first = kilobyte.neg()
        second = first.neg()
        del first
        return (second.neg(),)

    assert bench_run.peak_bytes(call, CPU) == 2048


def test_saved_memory_is_what_is_kept_beside_the_inputs() -> None:
    case = registry.Case(plan.BENCHMARKS["squared_relu"], (4, 64), "fp32", CPU)
    assert bench_run.saved_bytes(case, lambda x: x.relu().square()) == 4 * 64 * 4
    assert bench_run.saved_bytes(case, case.benchmark.ours) == 0


def test_a_layout_is_an_input() -> None:
    benchmark = plan.BENCHMARKS["masked_cross_attention"]
    case = registry.Case(benchmark, benchmark.tiny_shape, "fp32", CPU)

    def keeps_the_layout(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        return q * layout.media_end[:, :, None, None]

    assert bench_run.saved_bytes(case, keeps_the_layout) == 0


GROWING = (ATTENTION.name, several_media.SPARSE)


@pytest.fixture(scope="module")
def growth_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("growth")
    ops = [argument for op in GROWING for argument in ("--op", op)]
    return bench("growth", "--quick", *ops, "--dtype", "fp32", "--out", str(out)), out


def test_growth_measures_time_and_memory_by_images_and_tokens(
    growth_run: tuple[Result, Path],
) -> None:
    result, out = growth_run
    assert result.exit_code == 0, result.output
    found = {
        (row["kernel"], row["provider"], row["mode"], row["shape"], row["metric"]): float(
            row["p50"]
        )
        for row in rows_of(out / "results.csv")
    }
    few, many, short = "1x128x1x2x32x16", "1x128x4x2x32x16", "1x64x4x2x32x16"
    for provider in ("eager", "ours", "sdpa"):
        for mode in MODES:
            for op, shape in [(GROWING[0], few), *((GROWING[1], shape) for shape in (few, short))]:
                assert found[op, provider, mode, shape, "time"] > 0
                assert found[op, provider, mode, many, "time"] > 0
    eager, ours = (
        found[ATTENTION.name, provider, "fwd", many, "peak_memory"]
        - found[ATTENTION.name, provider, "fwd", few, "peak_memory"]
        for provider in ("eager", "ours")
    )
    # Two of its tensors of all scores are alive at once, at least.
    assert eager >= 2 * 3 * (128 * 16 * 2 * 4) / 1e6
    assert ours <= 0.05 * eager
    assert {op for op, *_ in found} == {"copy", "matmul", *GROWING}


def test_growth_is_drawn(growth_run: tuple[Result, Path]) -> None:
    result, out = growth_run
    for name in (f"growth_{op}.png" for op in GROWING):
        image = (out / name).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 10_000
        assert str(out / name) in result.output
    assert not (out / "ops.png").exists()


def test_growth_is_of_one_size_at_a_time() -> None:
    by_images = [(1, 8, n, 1, 1, 1) for n in (4, 1, 2)]
    shapes = [*by_images, (1, 2, 4, 1, 1, 1)]
    assert growth.series(shapes, 2) == sorted(by_images)
    assert growth.series(shapes, 1) == [(1, 2, 4, 1, 1, 1), (1, 8, 4, 1, 1, 1)]


# Tables and suite


def test_markdown_table() -> None:
    table = tables.Table("Title", ("op", "GPU\nours"), [["a", "1.0"]], 1, ["note"])
    assert table.markdown().splitlines() == [
        *("## Title", "", "| op | GPU ours |", "| --- | ---: |", "| a | 1.0 |", "", "- note")
    ]


def test_every_dtype_has_a_peak() -> None:
    for gpu in roofline.GPUS:
        assert set(gpu.matmul) == set(DTYPES)


@pytest.mark.skipif(not records.IN_CHECKOUT, reason="bench/suite is not installed")
def test_the_suite_runs() -> None:
    root = Path(__file__).parents[1]
    case = "squared_relu-2048x2048-fp32-fwd and (eager or ours or liger)"
    options = ["--benchmark-only", "--benchmark-max-time=0.1", "-p", "no:cacheprovider", "-k", case]
    command = [sys.executable, "-m", "pytest", "bench/suite", "-q", *options]
    # Of a worker of pytest-xdist a child process would think that it is one too.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    # fwd_bwd is selected too; Liger is there on a GPU only.
    assert "4 passed" in done.stdout or "6 passed" in done.stdout
