"""`flamingo-fast profile run`."""

from pathlib import Path
from typing import Annotated

import typer

from flamingo_fast.cli.profile import profile_app


@profile_app.command()
def run(
    target: Annotated[
        str,
        typer.Argument(
            help="train[:SCALE], table3:ROW[:SCALE], decode[:SCALE], OP[:SHAPE[:DTYPE[:MODE]]] of "
            "`bench`, or PEER.CASE[:unpatched[:DTYPE]] of `bench patch`."
        ),
    ],
    tool: Annotated[
        str | None,
        typer.Option(help="nsys, ncu or torch. Default: nsys where it is found, else torch."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Default: a new folder in profiling/reports."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="That are recorded. Default: 3; 1 under ncu.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before these.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: a GPU, if there is one.")
    ] = None,
    kernel: Annotated[
        str, typer.Option(help="Of ncu: only kernels whose name this regular expression matches.")
    ] = "",
    launches: Annotated[
        int | None, typer.Option(min=1, help="Of ncu: the most that it looks at. Default: all.")
    ] = None,
) -> None:
    """Record a few steps of something with a profiler, with named ranges.

    nsys and ncu are looked for in $PATH, or are what $FLAMINGO_FAST_NSYS and $FLAMINGO_FAST_NCU
    say. Exits with 1 if the tool or the target fails, 2 if there is no such target or tool.
    """
    from flamingo_fast.profiling.run import FailedSessionError, SessionError
    from flamingo_fast.profiling.run import run as run_tool
    from flamingo_fast.profiling.targets import TargetError

    try:
        found = run_tool(
            target,
            tool=tool,
            out=out,
            steps=steps,
            warmup=warmup,
            device=device,
            kernel=kernel,
            launches=launches,
        )
    except FailedSessionError as error:
        typer.echo(f"profile run: {error}", err=True)
        raise typer.Exit(1) from None
    except (TargetError, SessionError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{found}; flamingo-fast profile report {found} says what is in it")
