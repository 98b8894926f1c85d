"""`flamingo-fast profile report` of Nsight Systems' tables: ranges, kernels, gaps, differences."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
from profile_cases import AUTOGRAD, MS, PROCESS, NsysTables, gpu_step, write_session

from flamingo_fast import cli
from flamingo_fast.profiling import profile_report
from flamingo_fast.profiling.analysis import Analysis, RangeTime, kernel_base, kind
from flamingo_fast.profiling.traces import ReportError

KERNELS = {
    "[copy host to device]": 0.5,
    "_latent_forward_kernel": 1,
    "_several_media_forward_kernel": 2,
    "void gemm<float>(float*)": 2,
    "_several_media_backward_kernel": 4,
}
CEILINGS = {
    "gb_s": 2000,
    "fp32_tflop_s": 50,
    "matmul_tflop_s": {"fp32": 50, "bf16": 500},
    "source": "a data sheet",
}


def analysed(path: Path) -> Analysis:
    found = profile_report.read(path)
    assert isinstance(found, Analysis)
    return found


def by_name(analysis: Analysis) -> dict[str, RangeTime]:
    """Of the case, where no two have one name."""
    return {row.path[-1]: row for row in analysis.ranges}


def work(kernel: str, **changes: object) -> dict[str, object]:
    return {
        "kernel": kernel,
        "calls": 1,
        "dtype": "bf16",
        "bytes": 0,
        "vector_flops": 0,
        "matmul_flops": 0,
    } | changes


def test_ranges_nest_over_threads_and_their_own_times_are_the_step(tmp_path: Path) -> None:
    analysis = analysed(gpu_step(tmp_path / "a.sqlite"))
    lm, gated = "lm layer 0 (2, 32, 64)", "gated block 0 (2, 32, 64)"
    expected = {
        ("step",): (20, 1),
        ("step", "vision (2, 3, 32, 32)"): (4, 4),
        ("step", lm): (6, 3),
        ("step", lm, gated): (3, 1),
        ("step", lm, gated, "attention"): (2, 2),
        ("step", "backward"): (9, 3),
        ("step", "backward", f"{lm} backward"): (6, 3),
        ("step", "backward", f"{lm} backward", "gated block 0 backward"): (3, 3),
    }
    assert {r.path: (r.total_ns / 2 / MS, r.self_ns / 2 / MS) for r in analysis.ranges} == expected
    assert [row.path for row in analysis.ranges] == [*expected]
    assert {row.calls for row in analysis.ranges} == {2}
    assert analysis.step_s == 0.02
    assert analysis.covered == 0.95
    assert sum(row.self_ns for row in analysis.ranges) == analysis.steps_ns


def test_kernels_belong_to_the_range_that_launched_them(tmp_path: Path) -> None:
    analysis = analysed(gpu_step(tmp_path / "a.sqlite"))
    own = {row.path[-1]: row.gpu_self_ns / 2 / MS for row in analysis.ranges if row.gpu_self_ns}
    assert own == {
        "vision (2, 3, 32, 32)": 1.5,
        "attention": 2,
        "lm layer 0 (2, 32, 64)": 2,
        "gated block 0 backward": 4,
    }
    rows = by_name(analysis)
    assert rows["step"].gpu_ns == 2 * 9.5 * MS
    assert rows["backward"].gpu_ns == 2 * 4 * MS
    assert rows["lm layer 0 (2, 32, 64)"].launches == 2 * 2
    assert {row.name: row.total_ns / 2 / MS for row in analysis.kernels} == KERNELS
    assert [row.calls for row in analysis.kernels] == [2] * 5
    assert analysis.kernels[0].name == "_several_media_backward_kernel"


def test_a_launch_without_a_range_counts_in_its_step_and_one_outside_does_not(
    tmp_path: Path,
) -> None:
    tables = NsysTables(tmp_path / "a.sqlite")
    tables.range("step", 10, 20)
    tables.range("loss", 12, 14)
    tables.kernel("unknown_launch", 12.5, 13)
    tables.kernel("other_thread", 15, 16, launch=13, thread=AUTOGRAD, correlationId=77)
    tables.kernel("warm_up", 2, 9, launch=1)
    tables.kernel("after", 25, 26, launch=22)
    # The same correlation id in another process is another launch.
    other = (PROCESS + 1) << 24 | 1
    tables.kernel("other_process", 13, 14, launch=30, thread=other, correlationId=77)
    tables.fill(16, 17, launch=15)
    analysis = analysed(tables.close())
    assert {row.name for row in analysis.kernels} == {"unknown_launch", "other_thread", "[fill]"}
    rows = by_name(analysis)
    assert rows["loss"].gpu_ns == MS
    assert rows["step"].gpu_self_ns == MS


def test_gaps_are_where_no_stream_runs(tmp_path: Path) -> None:
    analysis = analysed(gpu_step(tmp_path / "a.sqlite"))
    gap = {"device": 0, "step_ns": 20 * MS, "idle_ns": 11.5 * MS, "gaps": 5, "largest_ns": 5 * MS}
    assert [vars(each) for each in analysis.gaps] == [{"step": i} | gap for i in (0, 1)]
    # Of a kernel that is 3 ms longer and bridges the one before the backward.
    analysis = analysed(gpu_step(tmp_path / "b.sqlite", kernel_ms=5))
    assert [(each.idle_ns, each.gaps, each.largest_ns) for each in analysis.gaps] == [
        (9.5 * MS, 5, 3 * MS)
    ] * 2


def test_launch_bound_are_ranges_in_which_the_gpu_waits(tmp_path: Path) -> None:
    tables = NsysTables(tmp_path / "a.sqlite")
    tables.range("step", 0, 40)
    tables.range("many launches", 0, 10)
    tables.kernel("short", 4, 5, launch=2)
    tables.range("long kernels", 10, 20)
    tables.kernel("long", 11, 25, launch=10.5)
    # The GPU is busy with what came before, and hardly waits.
    tables.range("ahead of the GPU", 20, 26)
    tables.kernel("later", 25.5, 27, launch=21)
    tables.range("data wait", 27, 40)
    analysis = analysed(tables.close())
    names = [row.path[-1] for row in analysis.launch_bound]
    assert names == ["step", "data wait", "many launches"]
    assert [row.idle_ns / MS for row in analysis.launch_bound] == [9 + 1 + 0.5 + 13, 13, 9]


def test_rates_are_of_the_work_of_a_step(tmp_path: Path) -> None:
    entries = [
        # 2 GB and 0.26 TFLOP in 2 ms, in two dtypes.
        work("_several_media_forward_kernel", bytes=1e9, matmul_flops=25e10),
        work("_several_media_forward_kernel", bytes=1e9, matmul_flops=1e10, dtype="fp32"),
        # More in vectors than in matrices, by their ceilings.
        work("_latent_forward_kernel", bytes=1e6, matmul_flops=1e9, vector_flops=1e10, calls=3),
        work("gemm", bytes=1e6, vector_flops=5e10),
    ]
    folder = write_session(tmp_path / "s", work=entries, ceilings=CEILINGS).parent
    gpu_step(folder / "report.sqlite")
    rows = {row.name: row for row in analysed(folder).kernels}
    both = rows["_several_media_forward_kernel"]
    assert both.gb_s == pytest.approx(1000) and both.of_bandwidth == pytest.approx(0.5)
    assert both.tflop_s == pytest.approx(130)
    assert both.of_compute == pytest.approx((0.25 / 500 + 0.01 / 50) / 0.002)
    assert rows["_latent_forward_kernel"].of_compute == pytest.approx(0.01 / 50 / 0.001)
    assert rows["void gemm<float>(float*)"].tflop_s == pytest.approx(25)
    assert rows["_several_media_backward_kernel"].gb_s is None
    notes = [n for t in profile_report.report([folder]).sections[1].tables for n in t.notes]
    assert "_latent_forward_kernel: 1 calls in a step, and the formula is of 3." in notes


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("_several_media_forward_kernel", "_several_media_forward_kernel"),
        ("_several_media_forward_kernel_0d1d2de3c", "_several_media_forward_kernel"),
        ("void at::native::gemm<float, (int)4>(float*)", "at::native::gemm"),
        ("(anonymous namespace)::f(int)", "(anonymous namespace)::f(int)"),
        ("sm90_gemm_128x64", "sm90_gemm_128x64"),
    ],
)
def test_names_of_kernels(name: str, base: str) -> None:
    assert kernel_base(name) == base


def test_kinds_of_ranges_have_neither_index_nor_shape() -> None:
    assert kind("lm layer 12 (2, 32, 64) backward") == kind("lm layer 3 backward")
    assert kind("dataset m3w") == "dataset m3w"


def test_the_step_stands_beside_the_drivers_clock(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "s", step_s=[0.025, 0.0249, 0.0251]).parent
    gpu_step(folder / "report.sqlite")
    for path in (folder, folder / "session.json", folder / "report.sqlite"):
        assert analysed(path).driver_s == 0.025
    (sentence,) = profile_report.report([folder]).sections[0].sentences
    assert "20 ms (25 ms by the driver's clock, 20.0% apart), which has 3 steps" in sentence


def test_a_difference_finds_what_is_slower_new_and_gone(tmp_path: Path) -> None:
    before, after = gpu_step(tmp_path / "a.sqlite"), tmp_path / "b.sqlite"
    tables = NsysTables(after)
    tables.range("step", 0, 30)
    tables.range("vision (8, 3, 32, 32)", 0, 10)
    tables.range("loss", 10, 12)
    tables.kernel("_several_media_forward_kernel", 1, 6, launch=0.5)
    tables.kernel("fresh", 8, 9, launch=0.5)
    tables.close()
    rows = profile_report.report([before, after]).rows
    changes = {name: values for name, *values in rows["diff_ranges"][1]}
    # Of another batch, but the same part of the step.
    assert changes["step / vision"] == [4, 10, 2.5, 6]
    assert changes["step / loss"] == [None, 2, None, 2]
    assert changes["step / backward"] == [9, None, None, -9]
    changes = {name: values for name, *values in rows["diff_kernels"][1]}
    assert changes["_several_media_forward_kernel"] == [2, 5, 2.5, 3]
    assert changes["fresh"] == [None, 1, None, 1]
    assert changes["_latent_forward_kernel"] == [1, None, None, -1]
    largest = [abs(row[-1]) for row in rows["diff_kernels"][1]]
    assert largest == sorted(largest, reverse=True)


def test_only_captured_steps_of_one_process_count(tmp_path: Path) -> None:
    tables = NsysTables(tmp_path / "a.sqlite")
    tables.range("step", 0, 5)
    tables.range("capture", 9, 41, eventType=60)
    tables.range("step", 10, 20)
    tables.range("step", 30, 40)
    tables.range("lm layer 0", 31, None)
    other = (PROCESS + 1) << 24 | 1
    tables.execute(
        "INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) "
        f"VALUES (0, 75, 'flamingo_fast', {other}, 3)"
    )
    tables.range("capture", 9, 41, other, eventType=60)
    tables.range("step", 10, 40, other)
    analysis = analysed(tables.close())
    assert [step.ns / MS for step in analysis.trace.steps] == [10, 10]
    assert analysis.trace.notes == [
        "Left out, as they had not ended with the recording: 1 ranges.",
        "2 processes have steps; this is the first one's.",
    ]


def test_the_command_writes_a_page_with_all_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    gpu_step(tmp_path / "a.sqlite")
    out = tmp_path / "out"
    arguments = ["profile", "report", str(tmp_path / "a.sqlite"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    printed = capsys.readouterr().out
    assert re.search(r"gated block 0 backward +1 +3\.00 +3\.00 +15\.0", printed)
    assert {each.name for each in out.iterdir()} == {
        *("index.html", "timeline.png"),
        *("ranges.csv", "kernels.csv", "gpu_gaps.csv", "launch_bound.csv"),
    }
    page = (out / "index.html").read_text()
    assert "<svg" in page and "gated block 0 backward" in page
    assert "gemm&lt;float&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    with (out / "ranges.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    row = rows["step / backward"]
    assert (row["depth"], float(row["total_ms"]), float(row["self_ms"])) == ("1", 9, 3)
    with (out / "kernels.csv").open(newline="") as file:
        times = {row["name"]: float(row["total_ms"]) for row in csv.DictReader(file)}
    assert times == KERNELS


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    path.write_bytes(b"%PDF-1.7\n" * 1000)


def _truncated(path: Path) -> None:
    gpu_step(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _other_tables(path: Path) -> None:
    tables = NsysTables(path)
    for name in ("NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL"):
        tables.execute(f"DROP TABLE {name}")
    tables.close()


def _other_columns(path: Path) -> None:
    tables = NsysTables(path)
    tables.execute("ALTER TABLE NVTX_EVENTS DROP COLUMN globalTid")
    tables.close()


def _no_numbers(path: Path) -> None:
    tables = NsysTables(path)
    tables.range("step", 0, 1)
    tables.execute("UPDATE NVTX_EVENTS SET start = 'noon'")
    tables.close()


def _no_step(path: Path) -> None:
    tables = NsysTables(path)
    tables.range("iteration", 0, 1)
    tables.close()


def _no_captured_step(path: Path) -> None:
    tables = NsysTables(path)
    tables.range("capture", 10, 20, eventType=60)
    tables.range("step", 0, 1)
    tables.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (_empty, "expected a report of Nsight Systems, got an empty file"),
        (_foreign, "nsys export.*file is not a database"),
        (_truncated, "nsys export.*truncated"),
        (_other_tables, "expected the table NVTX_EVENTS.*CUPTI_ACTIVITY_KIND_MEMCPY"),
        (_other_columns, "columns.*of NVTX_EVENTS, which lacks globalTid"),
        (_no_numbers, "truncated or something else: .*integer"),
        (_no_step, "expected ranges 'step' around steps, found 'iteration'"),
        (_no_captured_step, "inside of a range 'capture'"),
    ],
)
def test_bad_tables_are_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: object,
    reason: str,
) -> None:
    path = tmp_path / "a.sqlite"
    make(path)  # type: ignore[operator]
    with pytest.raises(ReportError, match=f"^{re.escape(str(path))}: .*{reason}") as error:
        profile_report.read(path)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "profile", "report", str(path)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema: expected 1, got 2"),
        ({"tool": "perf"}, "tool: expected one of nsys, ncu, torch; got 'perf'"),
        ({"step_s": [0.1, "x"]}, "step_s: expected a number from 0, got 'x'"),
        ({"step_s": [float("nan")]}, "step_s: expected a number from 0, got nan"),
        ({"work": [{"kernel": "k"}]}, "work\\[0\\].calls: expected int, got nothing"),
        ({"work": [7]}, "work\\[0\\].kernel: expected str, got nothing"),
        ({"ceilings": {"gb_s": 1}}, "ceilings.matmul_tflop_s: expected dict, got nothing"),
        ({}, "expected one of report.sqlite, report.nsys-rep, report.qdstrm beside it"),
    ],
)
def test_bad_sessions_are_refused_by_field(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    path = write_session(tmp_path / "s", **changes)
    with pytest.raises(ReportError, match=f"^{re.escape(str(path))}: .*{reason}"):
        profile_report.read(path.parent)


def test_what_is_no_session_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="with a session.json in it"):
        profile_report.read(tmp_path)
    (tmp_path / "session.json").write_text('{"schema": 1')
    with pytest.raises(ReportError, match="expected a session as JSON"):
        profile_report.read(tmp_path)
    (tmp_path / "session.json").write_text(json.dumps([1]))
    with pytest.raises(ReportError, match="schema: expected 1, got None"):
        profile_report.read(tmp_path)
    other = tmp_path / "other" / "notes.txt"
    other.parent.mkdir()
    other.write_text("x")
    with pytest.raises(ReportError, match="expected a session's folder, .nsys-rep"):
        profile_report.read(other)


def test_three_traces_are_too_many(tmp_path: Path) -> None:
    path = gpu_step(tmp_path / "a.sqlite")
    with pytest.raises(ReportError, match="got 3 traces and 0 of ncu"):
        profile_report.report([path] * 3)
