"""Commands about profiling sessions."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flamingo_fast.cli.app import app, wide_console

if TYPE_CHECKING:
    from flamingo_fast.bench.tables import Table
    from flamingo_fast.profiling.profile_report import Report

profile_app = typer.Typer(
    help="Record profiling sessions and report on them.",
    no_args_is_help=True,
)
app.add_typer(profile_app, name="profile")


@profile_app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A folder of `profile run`, or a .nsys-rep, .qdstrm, .sqlite, .ncu-rep, .csv of "
            "ncu, or .json[.gz] of torch.profiler. Two are compared, the earlier first."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder of index.html, CSV files and a picture of one step."
        ),
    ] = None,
) -> None:
    """Show where time goes: by range, by kernel, and while the GPU waits.

    Steps are ranges named "step" in the NVTX domain flamingo_fast, or as a session.json says.
    """
    from flamingo_fast.profiling import profile_report
    from flamingo_fast.profiling.traces import ReportError

    try:
        found = profile_report.report(files, pictures=out is not None)
    except ReportError as error:
        raise typer.BadParameter(str(error)) from error
    _show(found)
    if out is not None:
        command = shlex.join(["flamingo-fast", *sys.argv[1:]])
        written = profile_report.write(found, out, command)
        Console(stderr=True).print(f"{written[0]} and {len(written) - 1} files beside it")


def _show(found: "Report") -> None:
    console = wide_console()
    for section in found.sections[1:]:
        for line in (*section.sentences, *section.notes):
            console.print(line, markup=False, highlight=False)
        for table in section.tables:
            console.print(_escaped(table).rich())


def _escaped(table: "Table") -> "Table":
    """Names of kernels may look like rich's markup."""
    from rich.markup import escape

    rows = [[escape(cell) for cell in row] for row in table.rows]
    return dataclasses.replace(table, rows=rows)
