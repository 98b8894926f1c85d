"""Reports of Nsight Compute: .ncu-rep, and what `ncu --csv` prints (pages raw and details)."""

import csv
import dataclasses
import io
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flamingo_fast.profiling.processes import find_program
from flamingo_fast.profiling.traces import ReportError

# Names in the page raw, which are those of ncu_report and --metrics, then that of the page details.
_DURATION = ("gpu__time_duration.sum", "Duration")
_PERCENT = {
    "compute": (
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "Compute (SM) Throughput",
        "SM Throughput",
    ),
    "memory": (
        "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
        "Memory Throughput",
    ),
    "dram": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "DRAM Throughput",
    ),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active", "Achieved Occupancy"),
}
_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio$"
)
_SAMPLED_STALL = re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+)$")
# Powers of ten before a unit: both ncu's long names and its short ones.
_TIMES = {"": 1.0, "n": 1.0, "u": 1e3, "m": 1e6}
_SIZES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}

Metrics = Mapping[str, tuple[float, str]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """What ncu measured of one launch; None and nothing for what it was not told to.

    Attributes:
        compute, memory: "speed of light", % of what the units sustain at best.
        dram, occupancy: % of the peak; of the warps that a multiprocessor holds, the active ones.
        dram_bytes: read and written.
        stalls: reason -> its share of the time that warps waited, largest first.
    """

    kernel: str
    ns: float | None
    compute: float | None
    memory: float | None
    dram: float | None
    occupancy: float | None
    registers: float | None
    dram_bytes: float | None
    stalls: dict[str, float]


def mean_times(launches: Iterable[Launch]) -> dict[str, float]:
    """Kernel -> ns of a mean launch, of those whose time was measured."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in launches:
        if each.ns is not None:
            found[each.kernel].append(each.ns)
    return {kernel: sum(times) / len(times) for kernel, times in found.items()}


def read_ncu(path: Path) -> list[Launch]:
    """Of all kernels, in order.

    Raises:
        ReportError: `path` is no report of ncu, is truncated, or there is nothing to read it with.
    """
    if path.stat().st_size == 0:
        raise ReportError(f"{path}: expected a report of Nsight Compute, got an empty file")
    if path.suffix == ".csv":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(f"{path}: expected the CSV of ncu: {error}") from error
        launches = _of_csv(text, path)
    else:
        launches = _of_report(path)
    if not launches:
        raise ReportError(
            f"{path}: expected a report of Nsight Compute with kernels in it, found none: "
            "nothing was profiled, or it is truncated or something else"
        )
    return launches


def _of_report(path: Path) -> list[Launch]:
    try:
        import ncu_report
    except ImportError:
        return _of_csv(_run_ncu(path), path)
    launches = []
    try:
        context = ncu_report.load_report(str(path))
        for range_index in range(context.num_ranges()):
            of_range = context.range_by_idx(range_index)
            for index in range(of_range.num_actions()):
                action = of_range.action_by_idx(index)
                metrics = {
                    name: (float(value), metric.unit() or "")
                    for name in action.metric_names()
                    if (metric := action.metric_by_name(name)) is not None
                    and isinstance(value := metric.value(), int | float)
                }
                launches.append(_launch(action.name(), metrics))
    # Whatever its C++ raises: RuntimeError in one version, its own classes in others.
    except Exception as error:
        raise ReportError(f"{path}: expected a report of Nsight Compute: {error}") from error
    return launches


def _run_ncu(path: Path) -> str:
    ncu = find_program("ncu")
    if ncu is None:
        raise ReportError(
            f"{path}: reading .ncu-rep needs the module ncu_report, or ncu in $PATH, in "
            "$CUDA_HOME/bin or as $FLAMINGO_FAST_NCU, and neither is here; run `ncu --import FILE "
            "--csv --page raw` elsewhere and report on what it prints, as a .csv"
        )
    command = (ncu, "--import", str(path), "--csv", "--page", "raw", "--print-units", "base")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = said[-1].strip() if said else "nothing"
        raise ReportError(f"{path}: expected a report of Nsight Compute; ncu says: {last}")
    return done.stdout


def _of_csv(text: str, path: Path) -> list[Launch]:
    lines = text.splitlines(keepends=True)
    # ncu's own messages come first.
    start = next((i for i, line in enumerate(lines) if line.startswith(('"ID",', "ID,"))), None)
    if start is None:
        first = lines[0].strip()[:80] if lines else ""
        raise ReportError(
            f"{path}: expected the CSV of `ncu --csv --page raw` or `--page details`, whose header "
            f'begins with "ID"; it begins with {first!r}'
        )
    try:
        header, *rows = [*csv.reader(io.StringIO("".join(lines[start:])), strict=True)]
    except csv.Error as error:
        raise ReportError(
            f"{path}: expected the CSV of ncu, truncated or broken: {error}"
        ) from error
    if "Kernel Name" not in header:
        raise ReportError(f"{path}: expected a column 'Kernel Name' of ncu, got {header[:5]}")
    by_metric = "Metric Name" in header
    for number, row in enumerate(rows, start + 2):
        # ncu leaves out what is empty at the end of rows that have rules.
        if row and (len(row) > len(header) or (len(row) < len(header) and not by_metric)):
            raise ReportError(
                f"{path}: row {number} has {len(row)} fields, expected {len(header)}: truncated?"
            )
    rows = [row for row in rows if row]
    return _of_long(header, rows, path) if by_metric else _of_wide(header, rows)


def _of_wide(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Launch]:
    """Of the page raw: a column for each metric; the first row has units."""
    if not rows:
        return []
    name, identity = header.index("Kernel Name"), header.index("ID")
    units, launches = rows[0], rows
    if not rows[0][identity].strip():
        launches = rows[1:]
    else:
        units = [""] * len(header)
    return [
        _launch(
            row[name],
            {
                metric: (value, unit)
                for metric, cell, unit in zip(header, row, units, strict=True)
                if (value := _number(cell)) is not None
            },
        )
        for row in launches
    ]


def _of_long(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> list[Launch]:
    """Of the page details: a row for each metric of each launch."""
    columns = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    if missing := [column for column in columns if column not in header]:
        raise ReportError(f"{path}: expected the columns {', '.join(columns)}; {missing} lack")
    places = [header.index(column) for column in columns]
    found: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    names = {}
    for number, row in enumerate(rows, 2):
        if len(row) <= max(places):
            raise ReportError(f"{path}: row {number} ends before its value: truncated?")
        identity, name, metric, unit, cell = (row[place] for place in places)
        names[identity] = name
        value = _number(cell)
        # "Memory Throughput" is there twice: in %, and in bytes a second.
        if value is not None and (unit == "%" or metric not in found[identity]):
            found[identity][metric] = value, unit
    return [_launch(names[identity], metrics) for identity, metrics in found.items()]


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _launch(kernel: str, metrics: Metrics) -> Launch:
    duration = _first(metrics, _DURATION)
    moved = [metrics[name] for name in _BYTES if name in metrics]
    registers = _first(metrics, ("launch__registers_per_thread", "Registers Per Thread"))
    shares = {
        # On the page details "Memory Throughput" may be bytes a second, too.
        name: value[0] if (value := _first(metrics, names)) and "/" not in value[1] else None
        for name, names in _PERCENT.items()
    }
    return Launch(
        kernel=kernel,
        ns=_nanoseconds(*duration) if duration else None,
        **shares,
        registers=registers[0] if registers else None,
        dram_bytes=sum(_bytes(*each) for each in moved) if len(moved) == len(_BYTES) else None,
        stalls=_stalls(metrics),
    )


def _first(metrics: Metrics, names: Sequence[str]) -> tuple[float, str] | None:
    return next((metrics[name] for name in names if name in metrics), None)


def _nanoseconds(value: float, unit: str) -> float:
    """`unit`: nsecond, usecond, msecond, second, or ns, us, ms, s; ns where it is not said."""
    if unit in ("s", "second"):
        return value * 1e9
    return value * _TIMES.get(unit[:1], 1.0)


def _bytes(value: float, unit: str) -> float:
    """`unit`: byte, Kbyte, Mbyte, Gbyte or B, KB and so on."""
    prefix = unit.lower().removesuffix("byte").removesuffix("b")
    return value * _SIZES.get(prefix, 1.0)


def _stalls(metrics: Metrics) -> dict[str, float]:
    for pattern in (_STALL, _SAMPLED_STALL):
        found = {
            match[1]: value
            for name, (value, _) in metrics.items()
            if (match := pattern.match(name))
            # A warp that was selected does not wait.
            and match[1] != "selected"
            and not match[1].endswith("not_issued")
        }
        if total := sum(found.values()):
            ordered = sorted(found.items(), key=lambda item: -item[1])
            return {reason: value / total for reason, value in ordered if value}
    return {}
