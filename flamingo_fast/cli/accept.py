"""The command that accepts the project on a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from flamingo_fast.cli.app import app


@app.command()
def accept(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and few rounds.")] = False,
    stage: Annotated[
        list[str] | None, typer.Option(help="Stage; may be repeated. Default: all.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Add to the results in --out, what is missing there.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of results.json, report.html and log.txt. Default: "
            "results/accept-<utc>-<commit> in a checkout, else accept_results.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check this machine's GPU, in 25 minutes: kernels, CUDA graphs, tuning, benchmarks, profilers.

    Stages run one after the other, each for a limited time, whatever the others do: doctor, parity,
    sanitizer, graphs, backends, launch, tuning, bench, table3, sessions. Needs PyTorch, Triton and
    NumPy; what needs more is skipped, and says what.

    Exits with 1 if a stage failed.
    """
    from flamingo_fast.profiling.accept import accept as run

    try:
        code = run(device=device, quick=quick, stages=stage or (), resume=resume, out=out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(code)
