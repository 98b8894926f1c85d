"""The `flamingo-fast` command. Exit codes: 0 done, 1 a check failed, 2 bad usage.

Commands stay thin: they turn options into one call of bench, profiling, testing or a model, and
import it when they run, so that `--help` is quick and no command needs another's extra.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import flamingo_fast
from flamingo_fast.ops.dispatch import BackendUnavailableError

app = typer.Typer(
    help="Fused kernels, modules and benchmarks for Flamingo.",
    no_args_is_help=True,
    add_completion=False,
    # Its tracebacks with local variables would show every failure, a user's mistake too.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(flamingo_fast.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


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
    if json_file is not None and not json_file.exists():
        try:
            tempfile.TemporaryFile(dir=json_file.parent).close()
        except OSError as error:
            raise typer.BadParameter(f"json: can't write {json_file}: {error}") from error

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
    # A log file would fold the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(render(report))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Op; may be repeated. Default: all.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Such as 2048x2048; may be repeated. Default: each op's own."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; may be repeated. Default: fp32 and bf16."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="fwd or fwd_bwd; may be repeated. Default: both.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Beside eager, which always runs; may be repeated. Default: all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One small shape, short, without torch.compile.")
    ] = False,
    growth: Annotated[
        bool,
        typer.Option("--growth", help="Attention's time and memory with more and more images."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of results.csv, report.md and report.png (growth.png). "
            "Default: bench/results in a checkout, else bench_results.",
        ),
    ] = None,
) -> None:
    """Time our ops against PyTorch's and others', interleaved, after checking their results.

    Exits with 1 if a provider's outputs or gradients are wrong; it then has no numbers.
    """
    import torch

    from flamingo_fast.bench import plan, records, report, run

    out = out or records.DEFAULT_OUT
    try:
        chosen = plan.make_plan(
            ops=op or (),
            shapes=shape or (),
            dtypes=dtype or (),
            modes=mode or (),
            providers=provider or (),
            quick=quick,
            growth=growth,
        )
        report.prepare(out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    records.set_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Console(stderr=True).status("") as status:
        results = run.run(chosen, device, status.update)
    report.show(results)
    for path in report.write(results, out):
        typer.echo(path)
    if results.failures:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command; an expected error becomes one line on stderr and exit code 1.

    FLAMINGO_FAST_DEBUG=1 shows its traceback instead.
    """
    try:
        app()
    # ImportError: an extra that a command needs is not installed; its message names the extra.
    except (BackendUnavailableError, ImportError, OSError) as error:
        if os.environ.get("FLAMINGO_FAST_DEBUG") == "1":
            raise
        typer.echo(f"flamingo-fast: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
