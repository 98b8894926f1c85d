"""Commands about this machine and the kernels."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

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
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline",
            help="Predict times of the benchmarks' shapes on GPUs instead. Minutes; --case takes "
            "a part of op/shape/dtype, and without it only bf16 is shown.",
        ),
    ] = False,
    sass: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="KERNEL ARCH",
            help="Show the hot loop of a kernel's machine code and its live registers instead, "
            "such as one_medium_fwd sm_90.",
        ),
    ] = None,
) -> None:
    """Compile the kernels for GPUs that need not be there and check what comes out.

    Exits with 1 if a kernel spills, needs too much shared memory or is worse than its golden.
    """
    check_writable("json", json_file)
    of_the_gate = {"changed": changed, "sample": sample, "update": update}
    if sass is not None:
        _refuse("sass", of_the_gate | {"roofline": roofline, "target": target, "json": json_file})
        return _show_sass(*sass, case)
    if roofline:
        _refuse("roofline", of_the_gate)
        return _show_roofline(target or [], case, json_file)

    from flamingo_fast.testing.aot import TARGETS, Compiler
    from flamingo_fast.testing.aot_gate import BadSelectionError, Selection, render, run_gate

    try:
        selection = Selection(tuple(target or TARGETS), case, changed, sample)
        with Compiler() as compiler:
            report = run_gate(
                compiler,
                selection,
                update=update,
                progress=lambda outcomes, total: _track(outcomes, "Compiling", total),
            )
    except BadSelectionError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        verdicts = [verdict.as_dict() for verdict in report.verdicts]
        json_file.write_text(json.dumps(verdicts, indent=1) + "\n")
    wide_console().print(render(report))
    if not report.passed:
        raise typer.Exit(1)


def _track(things: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    from rich.progress import track

    return track(things, what, total, console=Console(stderr=True), transient=True)


def _refuse(option: str, others: Mapping[str, object]) -> None:
    if given := [f"--{name}" for name, value in others.items() if value]:
        raise typer.BadParameter(f"{option}: goes without {', '.join(given)}")


def _show_sass(kernel: str, arch: str, case: str) -> None:
    from flamingo_fast.profiling.sass import DoesNotCompileError, NoSuchKernelError, show_hot_loop
    from flamingo_fast.testing.aot import Compiler

    try:
        with Compiler(workers=1) as compiler:
            typer.echo(show_hot_loop(compiler, kernel, arch, case))
    except NoSuchKernelError as error:
        raise typer.BadParameter(str(error)) from error
    except DoesNotCompileError as error:
        typer.echo(f"flamingo-fast: {error}", err=True)
        raise typer.Exit(1) from error


def _show_roofline(targets: list[str], case: str, json_file: Path | None) -> None:
    from flamingo_fast.profiling import roofline, roofline_table
    from flamingo_fast.testing.aot import Compiler

    try:
        chosen, cases = roofline.check_targets(targets), roofline.choose_cases(case)
    except roofline.NoSuchCaseError as error:
        raise typer.BadParameter(str(error)) from error
    with Compiler("flamingo_fast.profiling.roofline_cases") as compiler:
        rows = roofline.run_roofline(compiler, cases, chosen, _track)
    if json_file is not None:
        json_file.write_text(json.dumps(roofline_table.as_json(rows), indent=1) + "\n")
    wide_console().print(roofline_table.render(rows, chosen))
