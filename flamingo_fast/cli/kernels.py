"""Commands about this machine and the kernels."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flamingo_fast.cli.app import app, check_writable, wide_console


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices and which backends work here, or why not.

    Exits with 1 if something that is installed and has its device fails.
    """
    from flamingo_fast.doctor import examine, render

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console().print(render(report))
    if report.broken:
        raise typer.Exit(1)


@app.command()
def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="Architecture, e.g. sm_90; may be repeated. Default: all."),
    ] = None,
    case: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    changed: Annotated[
        bool, typer.Option("--changed", help="Only kernels whose source is not their golden's.")
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, help="Only (or, with --changed, also) as many that HEAD chooses.")
    ] = 0,
    update: Annotated[
        bool, typer.Option("--update", help="Write the numbers as goldens of this Triton version.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", dir_okay=False, writable=True, help="Write the numbers to this file."
        ),
    ] = None,
) -> None:
    """Compile the kernels for GPUs that need not be there and check what comes out.

    Exits with 1 if a kernel spills, needs too much shared memory or is worse than its golden.
    """
    check_writable("json", json_file)

    from rich.progress import track

    from flamingo_fast.testing.aot import TARGETS, Compiler
    from flamingo_fast.testing.aot_gate import BadSelectionError, Selection, render, run_gate

    try:
        selection = Selection(tuple(target or TARGETS), case, changed, sample)
        with Compiler() as compiler:
            report = run_gate(
                compiler,
                selection,
                update=update,
                progress=lambda outcomes, total: track(
                    outcomes, "Compiling", total, console=Console(stderr=True), transient=True
                ),
            )
    except BadSelectionError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        verdicts = [verdict.as_dict() for verdict in report.verdicts]
        json_file.write_text(json.dumps(verdicts, indent=1) + "\n")
    wide_console().print(render(report))
    if not report.passed:
        raise typer.Exit(1)
