"""Tables of a report, and the same numbers as rows for CSV files."""

from collections.abc import Sequence

from flamingo_fast.bench.tables import Table, digits
from flamingo_fast.profiling.analysis import (
    IDLE_SHARE,
    Analysis,
    Change,
    RangeTime,
    Rates,
    work_of,
)
from flamingo_fast.profiling.ncu_trace import Launch
from flamingo_fast.profiling.recorded_session import RecordedSession

Cell = str | int | float | None
Rows = tuple[Sequence[str], list[list[Cell]]]

_NAME_WIDTH = 100


def range_rows(analysis: Analysis, ranges: Sequence[RangeTime]) -> Rows:
    """A row for each path of ranges; times are of a mean step."""
    steps = analysis.steps
    header = (
        "path name depth calls total_ms self_ms total_percent self_percent gpu_total_ms "
        "gpu_self_ms launches gpu_idle_ms"
    ).split()
    return header, [
        [
            *(" / ".join(row.path), row.path[-1], len(row.path) - 1, row.calls / steps),
            *(row.total_ns / steps / 1e6, row.self_ns / steps / 1e6),
            *(100 * row.total_ns / analysis.steps_ns, 100 * row.self_ns / analysis.steps_ns),
            *(row.gpu_ns / steps / 1e6, row.gpu_self_ns / steps / 1e6),
            *(row.launches / steps, row.idle_ns / steps / 1e6),
        ]
        for row in ranges
    ]


def kernel_rows(analysis: Analysis) -> Rows:
    """A row for each kernel; times and calls are of a mean step."""
    steps = analysis.steps
    header = (
        "name calls total_ms percent_of_step mean_us gb_s percent_of_bandwidth tflop_s "
        "percent_of_compute expected_calls"
    ).split()
    return header, [
        [
            *(row.name, row.calls / steps, row.total_ns / steps / 1e6),
            100 * row.total_ns / analysis.steps_ns,
            row.total_ns / row.calls / 1e3,
            *(row.gb_s, _percent(row.of_bandwidth), row.tflop_s, _percent(row.of_compute)),
            row.expected_calls,
        ]
        for row in analysis.kernels
    ]


def gap_rows(analysis: Analysis) -> Rows:
    """A row for each step and GPU."""
    header = "step gpu step_ms idle_ms idle_percent gaps largest_gap_ms".split()
    return header, [
        [
            *(row.step, row.device, row.step_ns / 1e6, row.idle_ns / 1e6),
            *(100 * row.idle_ns / row.step_ns, row.gaps, row.largest_ns / 1e6),
        ]
        for row in analysis.gaps
    ]


def change_rows(changes: Sequence[Change]) -> Rows:
    header = "name before_ms after_ms ratio difference_ms".split()
    return header, [
        [
            each.name,
            *(None if ns is None else ns / 1e6 for ns in (each.before, each.after)),
            *(each.ratio, each.difference / 1e6),
        ]
        for each in changes
    ]


def launch_rows(launches: Sequence[Launch], session: RecordedSession) -> Rows:
    """A row for each kernel that ncu profiled: means over its launches."""
    header = (
        "name launches mean_us compute_percent memory_percent dram_percent "
        "occupancy_percent registers dram_mb dram_over_useful_bytes gb_s "
        "percent_of_bandwidth tflop_s percent_of_compute top_stalls"
    ).split()
    by_kernel: dict[str, list[Launch]] = {}
    for each in launches:
        by_kernel.setdefault(each.kernel, []).append(each)
    rows = []
    for name, found in by_kernel.items():
        ns = _mean([each.ns for each in found])
        moved = _mean([each.dram_bytes for each in found])
        work = work_of(name, session)
        calls = sum(each.calls for each in work)
        rates = Rates.of(work, session, ns, 1 / calls) if ns and calls else None
        useful = sum(each.bytes for each in work) / calls if calls else 0
        rows.append(
            [
                *(name, len(found), None if ns is None else ns / 1e3),
                *(
                    _mean([getattr(each, field) for each in found])
                    for field in ("compute", "memory", "dram", "occupancy", "registers")
                ),
                *(
                    None if moved is None else moved / 1e6,
                    moved / useful if moved and useful else None,
                ),
                *((rates.gb_s, _percent(rates.of_bandwidth)) if rates else (None, None)),
                *((rates.tflop_s, _percent(rates.of_compute)) if rates else (None, None)),
                _stalls(found),
            ]
        )
    rows.sort(key=lambda row: -(row[1] * (row[2] or 0)))
    return header, rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _stalls(launches: Sequence[Launch]) -> str:
    """The three reasons for which warps wait longest, with shares of all waiting."""
    reasons = {reason for each in launches for reason in each.stalls}
    shares = {
        reason: sum(each.stalls.get(reason, 0) for each in launches) / len(launches)
        for reason in reasons
    }
    top = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:3]
    return ", ".join(f"{reason} {share:.0%}" for reason, share in top)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def range_table(analysis: Analysis, ranges: Sequence[RangeTime], title: str) -> Table:
    """As a tree; columns of the GPU only if it did something."""
    on_gpu = bool(analysis.kernels)
    header, rows = range_rows(analysis, ranges)
    columns = ["calls", "total_ms", "self_ms", "total_percent", "self_percent"]
    columns += ["gpu_total_ms", "gpu_self_ms"] if on_gpu else []
    # HTML would drop common spaces.
    indented = ["\N{NO-BREAK SPACE}" * 2 * (len(row.path) - 1) + row.path[-1] for row in ranges]
    return _table(
        title,
        header,
        rows,
        columns,
        names=indented,
        notes=(
            "Of a mean step. self: what no range inside has.",
            *(["GPU: work that was launched in the range, whenever it ran."] if on_gpu else []),
        ),
    )


def kernel_table(analysis: Analysis) -> Table:
    header, rows = kernel_rows(analysis)
    columns = ["calls", "total_ms", "percent_of_step", "mean_us"]
    columns += [
        column
        for place, column in enumerate(header)
        if column in ("gb_s", "percent_of_bandwidth", "tflop_s", "percent_of_compute")
        and any(row[place] is not None for row in rows)
    ]
    notes = ["Of a mean step; kernels of several streams run at once."]
    if "gb_s" in columns:
        notes.append("GB/s and TFLOP/s: useful bytes and operations, by formula, over the time.")
        if analysis.session.ceilings:
            notes.append(f"% of: {analysis.session.ceilings.source}.")
    for row in analysis.kernels:
        calls = row.calls / analysis.steps
        if row.expected_calls is not None and calls != row.expected_calls:
            notes.append(
                f"{short_name(row.name)}: {calls:g} calls in a step, and the formula is of "
                f"{row.expected_calls}."
            )
    return _table("Kernels", header, rows, columns, notes=notes)


def gap_table(analysis: Analysis) -> Table:
    header, rows = gap_rows(analysis)
    names = [f"{row[0]}" for row in rows]
    columns = header[1:] if len({row[1] for row in rows}) > 1 else header[2:]
    return _table("GPU idle in each step", header, rows, columns, names=names)


def launch_bound_table(analysis: Analysis) -> Table:
    bound = analysis.launch_bound
    header, rows = range_rows(analysis, bound)
    columns = ("total_ms", "gpu_total_ms", "gpu_idle_ms", "launches")
    names = [" / ".join(row.path[1:]) or row.path[0] for row in bound]
    notes = (
        "Its GPU work is shorter than it, and the GPU was idle for over "
        f"{IDLE_SHARE:.0%} of its time.",
    )
    return _table("Launch-bound ranges", header, rows, columns, names=names, notes=notes)


def change_table(title: str, changes: Sequence[Change], of: str = "Of a mean step.") -> Table:
    header, rows = change_rows(changes)
    for row, each in zip(rows, changes, strict=True):
        row[3] = "new" if each.before is None else "gone" if each.after is None else row[3]
    notes = (f"{of} ratio: after over before, below 1 is faster.",)
    return _table(title, header, rows, header[1:], notes=notes)


def launch_table(launches: Sequence[Launch], session: RecordedSession) -> Table:
    header, rows = launch_rows(launches, session)
    columns = [
        column
        for place, column in enumerate(header[1:], 1)
        if any(row[place] not in (None, "") for row in rows)
    ]
    notes = ["Means over launches. compute, memory: % of what the units sustain at best."]
    if "gb_s" in columns and session.ceilings:
        notes.append(f"GB/s, TFLOP/s: useful work by formula; % of: {session.ceilings.source}.")
    return _table("Kernels that ncu profiled", header, rows, columns, notes=notes)


_HEADERS = {
    "gb_s": "GB/s",
    "tflop_s": "TFLOP/s",
    "percent_of_step": "% of step",
    "percent_of_bandwidth": "% of GB/s",
    "percent_of_compute": "% of TFLOP/s",
    "total_percent": "total %",
    "self_percent": "self %",
    "dram_over_useful_bytes": "DRAM / useful",
}


def _header(column: str) -> str:
    if column in _HEADERS:
        return _HEADERS[column]
    words = column.replace("gpu", "GPU").replace("dram", "DRAM").split("_")
    if words[-1] in ("ms", "us", "mb", "percent"):
        unit = {"mb": "MB", "percent": "%"}.get(words[-1], words[-1])
        return f"{' '.join(words[:-1])}, {unit}"
    return " ".join(words)


def _table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    columns: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    shown = names or [short_name(str(row[0])) for row in rows]
    return Table(
        title,
        (_header(header[0]) if names is None else "", *map(_header, columns)),
        [
            [name, *(_text(row[header.index(c)], c) for c in columns)]
            for name, row in zip(shown, rows, strict=True)
        ],
        1,
        notes,
        has_groups=False,
    )


def _text(cell: Cell, column: str) -> str:
    if cell is None or isinstance(cell, str):
        return cell or ""
    # A whole number in most sessions.
    if isinstance(cell, int) or column in ("calls", "launches", "registers"):
        return f"{cell:g}"
    return f"-{digits(-cell)}" if cell < 0 else digits(cell)


def short_name(name: str) -> str:
    """Of a kernel, without its arguments; a long one without its middle."""
    name = name.removeprefix("void ")
    if name.endswith(")"):
        # From its last bracket that closes all to the one that opens it.
        depth = 0
        for place in range(len(name) - 1, -1, -1):
            depth += (name[place] == ")") - (name[place] == "(")
            if depth == 0:
                name = name[:place] or name
                break
    half = _NAME_WIDTH // 2 - 1
    return name if len(name) <= _NAME_WIDTH else f"{name[:half]} … {name[-half:]}"
