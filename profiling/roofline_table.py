"""How the roofline's rows are shown, and written."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flamingo_fast.bench.registry import shape_name
from flamingo_fast.profiling.roofline import ASSUMPTIONS, TARGETS, OnGpu, Row

_COLORS = {"waves": "yellow", "launch": "yellow", "does not fit": "red"}


def render(rows: Sequence[Row], targets: Iterable[str]) -> Table:
    """Cases with a row for each of their kernels, of one call each."""
    notes = [
        "times a call, waves of blocks and occupancy of warps; x6: so many calls alike",
        "counted/formula: bytes that lanes ask for and operations of products, in the interpreter "
        "at a small shape (--json has it), where what",
        "a program loads for itself, which formulas leave out, may be 6 %",
        *ASSUMPTIONS,
    ]
    table = Table(
        box=box.SIMPLE,
        caption="\n".join(notes),
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("case", overflow="fold")
    table.add_column("dtype")
    table.add_column("kernel", no_wrap=True)
    for name in ("bytes", "FLOPs", "counted/\nformula"):
        table.add_column(name, justify="right", no_wrap=True)
    for target in targets:
        table.add_column(f"{TARGETS[target]} (predicted)\n    us waves occ. bound", no_wrap=True)
    for _, group in itertools.groupby(rows, key=lambda row: row.case.name):
        of_case = list(group)
        case = of_case[0].case
        names = [case.op, shape_name(case.shape)]
        names = names if len(of_case) > 1 else [" ".join(names)]
        names += [""] * (len(of_case) - len(names))
        for name, row in zip(names, of_case, strict=True):
            work, kernel = row.shown.work.useful, row.kernel.removeprefix("_")
            calls = f" x{row.shown.calls}" if row.shown.calls > 1 else ""
            table.add_row(
                name,
                case.dtype,
                kernel.removesuffix("_kernel") + calls,
                _scaled(work.bytes),
                _scaled(work.vector_flops + work.matmul_flops),
                _counted(row),
                *(_cell(row.on.get(target)) for target in targets),
            )
        table.add_section()
    return table


def _counted(row: Row) -> str:
    if row.counted is None:
        return "-"
    flops = "" if row.counted.flops is None else f" {row.counted.flops:.2f}"
    return f"{row.counted.bytes:.2f}{flops or '     '}"


def _cell(on: OnGpu | None) -> Text:
    if on is None:
        return Text("-")
    if on.prediction is None:
        return Text(on.error, "red")
    waves, bound = on.prediction.waves, on.prediction.bound
    if on.prediction.us is None:
        return Text(bound, _COLORS[bound])
    numbers = f"{on.prediction.us:6.1f} {waves.waves:5.2f} {waves.occupancy:4.0%} {bound}"
    return Text(numbers, _COLORS.get(bound, ""))


def _scaled(number: float) -> str:
    """With three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"


def as_json(rows: Iterable[Row]) -> dict[str, Any]:
    return {
        "schema": 1,
        "what": "flamingo_fast kernel roofline: predicted, not measured",
        "assumptions": list(ASSUMPTIONS),
        "rows": [row.as_dict() for row in rows],
    }
