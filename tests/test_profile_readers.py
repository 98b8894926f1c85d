"""`flamingo-fast profile report` of torch.profiler, Nsight Compute, and what nsys must convert."""

import gzip
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_cases import gpu_step, write_session
from torch.profiler import ProfilerActivity, profile, record_function

from flamingo_fast.profiling import profile_report
from flamingo_fast.profiling.analysis import Analysis
from flamingo_fast.profiling.ncu_trace import read_ncu
from flamingo_fast.profiling.profile_report import Kernels
from flamingo_fast.profiling.traces import ReportError


def analysed(path: Path) -> Analysis:
    found = profile_report.read(path)
    assert isinstance(found, Analysis)
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps by torch.profiler."""
    path = tmp_path_factory.mktemp("torch") / "trace.json"
    matrix = torch.randn(200, 200)
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        for _ in range(2):
            with record_function("flamingo_fast: step"):
                with record_function("flamingo_fast: lm layer 0 (200, 200)"):
                    with record_function("flamingo_fast: attention"):
                        matrix @ matrix
                    with record_function("somebody else's"):
                        matrix @ matrix
                with record_function("flamingo_fast: loss"):
                    matrix.sum()
    recording.export_chrome_trace(str(path))
    return path


def test_a_trace_of_torch_profiler(recorded: Path, tmp_path: Path) -> None:
    analysis = analysed(recorded)
    assert [row.path for row in analysis.ranges] == [
        ("step",),
        ("step", "lm layer 0 (200, 200)"),
        ("step", "lm layer 0 (200, 200)", "attention"),
        ("step", "loss"),
    ]
    assert [row.calls for row in analysis.ranges] == [2] * 4
    assert analysis.kernels == [] and analysis.launch_bound == []
    events = json.loads(recorded.read_text())["traceEvents"]
    durations = [each["dur"] for each in events if each["name"] == "flamingo_fast: step"]
    assert analysis.step_s == pytest.approx(sum(durations) / 2 / 1e6, abs=1e-8)
    assert 0 < analysis.covered < 1
    zipped = tmp_path / "trace.json.gz"
    zipped.write_bytes(gzip.compress(recorded.read_bytes()))
    assert analysed(zipped).ranges == analysis.ranges


def test_kernels_of_a_torch_trace_belong_to_ranges_over_threads(tmp_path: Path) -> None:
    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict:
        return {**dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, pid=9, tid=tid), "args": args}

    events = [
        {"ph": "M", "name": "process_name", "ts": 0, "pid": 9, "tid": 0},
        event("user_annotation", "flamingo_fast: step", 1000, 1000),
        event("user_annotation", "flamingo_fast: backward", 1500, 400),
        event("user_annotation", "flamingo_fast: loss backward", 1600, 200, tid=2),
        # What the profiler copies of ranges to the GPU is no range of the program.
        event("gpu_user_annotation", "flamingo_fast: step", 1100, 800),
        event("cuda_runtime", "cudaLaunchKernel", 1650, 5, tid=2, correlation=7),
        event("cuda_driver", "cuLaunchKernelEx", 1550, 5, correlation=8),
        event("cuda_runtime", "cudaMemcpyAsync", 1100, 5, correlation=9),
        event("kernel", "in_autograd", 1700, 50, tid=20, device=0, stream=20, correlation=7),
        event("kernel", "_triton_kernel", 1600, 25, tid=20, device=0, stream=20, correlation=8),
        event("gpu_memcpy", "Memcpy HtoD", 1200, 10, device=0, stream=21, correlation=9),
    ]
    for each in events:
        if each.get("cat") in ("kernel", "gpu_memcpy"):
            each["pid"] = 0
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    analysis = analysed(path)
    assert {row.path: row.gpu_self_ns for row in analysis.ranges} == {
        ("step",): 10_000,
        ("step", "backward"): 25_000,
        ("step", "backward", "loss backward"): 50_000,
    }
    (gaps,) = analysis.gaps
    assert (gaps.idle_ns, gaps.gaps, gaps.largest_ns) == (915_000, 4, 390_000)
    assert {row.name for row in analysis.kernels} == {
        *("in_autograd", "_triton_kernel", "[Memcpy HtoD]")
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "got an empty file"),
        (lambda content: content[: len(content) // 2], "it is truncated or none"),
        (lambda content: b"\x7fELF\xff\xfe", "it is truncated or none"),
        (lambda content: b'{"nodes": []}', "JSON without a list 'traceEvents'"),
        (lambda content: b"[1, 2]", "JSON without a list 'traceEvents'"),
        (lambda content: b'{"traceEvents": [7]}', "expected ranges 'step'.*found no range"),
        (
            lambda content: content.replace(b"flamingo_fast: step", b"flamingo_fast: turn"),
            "expected ranges 'step' around steps, found 'attention'",
        ),
        (
            lambda content: content.replace(b'"dur"', b'"duration"'),
            "event [0-9]+: expected pid, tid, ts and dur of a user_annotation: KeyError",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_bad_torch_traces_are_refused_by_name(
    recorded: Path, tmp_path: Path, change: Callable[[bytes], bytes], reason: str, suffix: str
) -> None:
    path = tmp_path / f"t{suffix}"
    content = change(recorded.read_bytes())
    if content and suffix == ".json.gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    with pytest.raises(ReportError, match=f"^{re.escape(str(path))}: .*{reason}"):
        profile_report.read(path)


def test_a_truncated_gzip_file_is_refused(recorded: Path, tmp_path: Path) -> None:
    content = gzip.compress(recorded.read_bytes())
    path = tmp_path / "t.json.gz"
    for broken in (content[: len(content) // 2], b"no gzip", content[:40] + b"\0" * 400):
        path.write_bytes(broken)
        with pytest.raises(ReportError, match="it is truncated or none"):
            profile_report.read(path)


NCU_COLUMNS = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def _line(cells: list[str]) -> str:
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


def raw_page(us: float = 2.0) -> str:
    """As `ncu --csv --page raw` prints it, of two launches of a kernel and one of another."""
    metrics = {
        "gpu__time_duration.sum": "usecond",
        COMPUTE: "%",
        MEMORY: "%",
        DRAM: "%",
        OCCUPANCY: "%",
        "launch__registers_per_thread": "register/thread",
        "dram__bytes_read.sum": "Mbyte",
        "dram__bytes_write.sum": "Kbyte",
        STALL.format("long_scoreboard"): "inst",
        STALL.format("barrier"): "inst",
        STALL.format("selected"): "inst",
    }
    stalls = ["6", "2", "1"]
    rows = [
        ["_latent_forward_kernel", f"{us}", "40", "70", "60", "50", "128", "1", "500", *stalls],
        ["_latent_forward_kernel", f"{us}", "20", "70", "60", "50", "128", "1", "500", *stalls],
        ["void f<int>(int, char)", "1,000", "1", "1", "n/a", "1", "32", "3", "0", *stalls],
    ]
    text = "==PROF== Connected to process 1234\n" + _line([*NCU_COLUMNS, *metrics])
    text += _line([""] * len(NCU_COLUMNS) + [*metrics.values()])
    for number, (name, *values) in enumerate(rows):
        text += _line([str(number), "1", "python", "host", name, "1", "7", *values])
    return text


def details_page() -> str:
    """As `ncu --csv` prints it: a row for each metric, and for each rule."""
    columns = [*NCU_COLUMNS, "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule"]
    metrics = [
        ("Duration", "us", "2.00"),
        ("Memory Throughput", "%", "70"),
        ("Memory Throughput", "byte/second", "12,943,820"),
        ("Compute (SM) Throughput", "%", "30"),
        ("DRAM Throughput", "%", "60"),
        ("Achieved Occupancy", "%", "50"),
        ("Registers Per Thread", "register/thread", "128"),
        ("", "", ""),
    ]
    first = ["0", "1", "python", "host", "_latent_forward_kernel", "1", "7", "section"]
    return _line(columns) + "".join(_line([*first, *metric]) for metric in metrics)


def test_kernels_of_ncu_with_shares_stalls_and_rates(tmp_path: Path) -> None:
    entry = {
        **{"kernel": "_latent_forward_kernel", "calls": 4, "dtype": "bf16"},
        **{"bytes": 4e6, "vector_flops": 0, "matmul_flops": 4e8},
    }
    best = {"gb_s": 1000, "fp32_tflop_s": 50, "matmul_tflop_s": {"bf16": 500}, "source": "s"}
    folder = write_session(tmp_path / "s", tool="ncu", work=[entry], ceilings=best).parent
    (folder / "report.csv").write_text(raw_page())
    found = profile_report.report([folder])
    header, rows = found.rows["ncu"]
    slow, latent = (dict(zip(header, row, strict=True)) for row in rows)
    assert (slow["name"], slow["mean_us"], slow["dram_percent"]) == (
        *("void f<int>(int, char)", 1000),
        None,
    )
    assert slow["gb_s"] is None
    assert {name: latent[name] for name in header[1:9]} == {
        **{"launches": 2, "mean_us": 2, "compute_percent": 30, "memory_percent": 70},
        **{"dram_percent": 60, "occupancy_percent": 50, "registers": 128, "dram_mb": 1.5},
    }
    assert latent["top_stalls"] == "long_scoreboard 75%, barrier 25%"
    # A call has a quarter of a step's work: 1 MB and 0.1 GFLOP in 2 us.
    assert latent["gb_s"] == pytest.approx(500)
    assert latent["percent_of_bandwidth"] == pytest.approx(50)
    assert latent["tflop_s"] == pytest.approx(50)
    assert latent["percent_of_compute"] == pytest.approx(10)
    assert latent["dram_over_useful_bytes"] == pytest.approx(1.5)


def test_the_details_page_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "details.csv"
    path.write_text(details_page())
    (launch,) = read_ncu(path)
    assert (launch.kernel, launch.ns) == ("_latent_forward_kernel", 2000)
    assert (launch.compute, launch.memory, launch.dram, launch.occupancy) == (30, 70, 60, 50)
    assert launch.registers == 128


def test_two_reports_of_ncu_are_compared_and_one_stands_beside_a_trace(tmp_path: Path) -> None:
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    before.write_text(raw_page(us=2))
    after.write_text(raw_page(us=3))
    trace = gpu_step(tmp_path / "t.sqlite")
    found = profile_report.report([before, after, trace])
    changes = {name: values for name, *values in found.rows["diff_ncu"][1]}
    assert changes["_latent_forward_kernel"] == [0.002, 0.003, 1.5, 0.001]
    assert [section.name for section in found.sections] == [
        *("summary", "trace", "ncu", "ncu", "difference")
    ]


def _cut_row(text: str) -> str:
    return text.rstrip("\n").rsplit(",", 4)[0] + "\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "got an empty file"),
        ("a,b,c\n1,2,3\n", "whose header begins with \"ID\"; it begins with 'a,b,c'"),
        ('"ID","Name"\n"1","x"\n', "expected a column 'Kernel Name' of ncu"),
        (_cut_row(raw_page()), "row 6 has 14 fields, expected 18: truncated"),
        (raw_page() + '"3","py', "truncated or broken"),
        ("\n".join(raw_page().splitlines()[:3]) + "\n", "with kernels in it, found none"),
        (_line([*NCU_COLUMNS, "Metric Name"]), "expected the columns"),
        (_cut_row(details_page()), "row 9 ends before its value: truncated"),
        (b"\xff\xfe\x00", "expected the CSV of ncu"),
    ],
)
def test_bad_csv_files_are_refused_by_name(tmp_path: Path, text: str | bytes, reason: str) -> None:
    path = tmp_path / "n.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReportError, match=f"^{re.escape(str(path))}: .*{reason}"):
        profile_report.read(path)


def _program(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def test_a_report_of_ncu_is_read_by_its_module_or_else_by_ncu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.ncu-rep"
    path.write_bytes(b"report")
    monkeypatch.setitem(sys.modules, "ncu_report", None)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(ReportError, match="needs the module ncu_report, or ncu in"):
        profile_report.read(path)
    (tmp_path / "printed").write_text(raw_page())
    ncu = _program(tmp_path / "ncu", f'[ "$2" = {path} ] && /bin/cat {tmp_path}/printed')
    monkeypatch.setenv("FLAMINGO_FAST_NCU", str(ncu))
    by_program = profile_report.read(path)
    assert isinstance(by_program, Kernels)
    assert [each.ns for each in by_program.launches] == [2e3, 2e3, 1e6]
    _program(ncu, "echo '==ERROR== Failed to load report'; exit 1")
    with pytest.raises(ReportError, match="ncu says: ==ERROR== Failed to load report"):
        profile_report.read(path)

    metric = types.SimpleNamespace(value=lambda: 2000, unit=lambda: "ns")
    action = types.SimpleNamespace(
        name=lambda: "k",
        metric_names=lambda: ["gpu__time_duration.sum"],
        metric_by_name=lambda name: metric,
    )
    of_range = types.SimpleNamespace(num_actions=lambda: 1, action_by_idx=lambda index: action)
    context = types.SimpleNamespace(num_ranges=lambda: 1, range_by_idx=lambda index: of_range)
    module = types.SimpleNamespace(load_report=lambda name: context)
    monkeypatch.setitem(sys.modules, "ncu_report", module)
    by_module = profile_report.read(path)
    assert isinstance(by_module, Kernels)
    assert [(each.kernel, each.ns) for each in by_module.launches] == [("k", 2000)]


@pytest.fixture
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that copies the "report" to --output, as nsys exports it."""
    copy = 'while [ "$1" != --output ]; do shift; done; exec /bin/cp "$3" "$2"'
    program = _program(tmp_path / "nsight" / "target-linux-x64" / "nsys", copy)
    monkeypatch.setenv("FLAMINGO_FAST_NSYS", str(program))
    return program


@pytest.mark.parametrize("suffix", [".nsys-rep", ".qdstrm"])
def test_reports_are_exported_by_nsys_and_streams_imported_first(
    tmp_path: Path, nsys: Path, suffix: str
) -> None:
    folder = write_session(tmp_path / "s", step_s=[0.02, 0.02]).parent
    recorded = gpu_step(tmp_path / "a.sqlite").rename(folder / f"report{suffix}")
    if suffix == ".qdstrm":
        with pytest.raises(ReportError, match="needs host-linux-x64/QdstrmImporter"):
            profile_report.read(folder)
        importer = nsys.parents[1] / "host-linux-x64" / "QdstrmImporter"
        _program(importer, '[ "$1 $3" = "-i -o" ] && exec /bin/cp "$2" "$4"')
    assert analysed(folder).step_s == 0.02
    assert {each.name for each in folder.iterdir()} == {"session.json", recorded.name}
    _program(nsys, "echo 'Failed to load the report' >&2; exit 1")
    with pytest.raises(ReportError, match="nsys can't read it and says: Failed to load"):
        profile_report.read(folder)


@pytest.mark.parametrize("suffix", [".nsys-rep", ".qdstrm", ".ncu-rep"])
def test_empty_reports_are_refused_before_any_tool_is_asked(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ReportError, match="got an empty file"):
        profile_report.read(path)


def test_without_nsys_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.nsys-rep"
    path.write_bytes(b"report")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("FLAMINGO_FAST_NSYS", "")
    with pytest.raises(ReportError, match="needs nsys, and it is not in .PATH or .CUDA_HOME"):
        profile_report.read(path)
    monkeypatch.setenv("FLAMINGO_FAST_NSYS", "/nowhere/nsys")
    with pytest.raises(ReportError, match="FLAMINGO_FAST_NSYS, /nowhere/nsys, is no program"):
        profile_report.read(path)


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_tools_are_also_those_of_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    path = tmp_path / f"a.{tool}-rep"
    path.write_bytes(b"report")
    _program(tmp_path / "bin" / tool, "echo 'not mine' >&2; exit 1")
    monkeypatch.setitem(sys.modules, "ncu_report", None)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv(f"FLAMINGO_FAST_{tool.upper()}", "")
    with pytest.raises(ReportError, match="says: not mine"):
        profile_report.read(path)
