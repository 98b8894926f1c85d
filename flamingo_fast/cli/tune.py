"""The command that tunes launch configurations."""

from pathlib import Path
from typing import Annotated

import typer

from flamingo_fast.cli.app import app


@app.command()
def tune(
    device: Annotated[
        str, typer.Option(help="Such as cuda:1; cpu, with --quick, interprets the kernels.")
    ] = "cuda",
    op: Annotated[
        list[str] | None,
        typer.Option(help="Such as latent_fwd, or latent; may be repeated. Default: all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes, and fewer candidates for each.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which nothing new begins.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of the file. Default: the one that kernels read, $FLAMINGO_FAST_CACHE or "
            "the user's cache folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find faster launch configurations of the kernels on this device, and keep them for it.

    A candidate must be right, and 3 % faster in four of five rounds.
    """
    from flamingo_fast.profiling import tune as tuning

    tuning.prepare(device)
    try:
        result = tuning.tune(
            device,
            quick=quick,
            out_dir=out,
            budget_s=budget,
            ops=tuple(op or ()),
            progress=lambda line: typer.echo(line, err=True),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(tuning.render(result))
