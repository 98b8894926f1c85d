"""The benchmark's arithmetic, its gate and its files; never how long anything took."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_cases import ATTENTION, CPU, bench, rows_of
from typer.testing import Result

from flamingo_fast.bench import (
    attention,
    growth,
    plan,
    plot,
    records,
    roofline,
    several_media,
    tables,
    timing,
)
from flamingo_fast.bench import run as bench_run
from flamingo_fast.bench.records import Environment, Measurement
from flamingo_fast.bench.registry import MODES, Case, Unavailable
from flamingo_fast.bench.timing import MIN_ROUNDS, Quantiles, interleaved, paired_ratios

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
    assert (
        "takes seconds to compile, and is left out here" in markdown
        and "Liger's kernels need a GPU" in markdown
    )


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


def test_a_shape_that_an_op_refuses_leaves_the_others() -> None:
    # Of the second, three heads of keys for four of queries.
    shapes = ["1x4x8x2x1x16x8", "1x4x8x4x3x16x8"]
    chosen = plan.make_plan(
        ops=["latent_attention"], shapes=shapes, dtypes=["fp32"], modes=["fwd"], quick=True
    )
    results = bench_run.run(chosen, CPU)
    (failure,) = results.failures
    assert failure.startswith("latent_attention 1x4x8x4x3x16x8 fp32: ValueError: ")
    assert {m.shape for m in results.measurements if m.metric == "time"} == {shapes[0]}


def test_shapes_without_ops_are_for_the_ops_that_can_have_them() -> None:
    for shape, dims in (("8x64", 2), ("1x64x2x1x16x8", 6)):
        chosen = plan.make_plan(shapes=(shape,)).benchmarks
        assert chosen == tuple(b for b in plan.BENCHMARKS.values() if len(b.dims) == dims)


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
