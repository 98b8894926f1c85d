"""The command that trains and shows a whole model in minutes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flamingo_fast.cli.app import app, check_writable, wide_console


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for plots, model, shards and results.")
    ] = Path("demo"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what an earlier demo left in its folder first.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything: the same numbers again.")] = 0,
) -> None:
    """Train a small Flamingo on handwritten digits, on a CPU in minutes.

    A language model learns from text alone and a vision encoder from training
    images alone. Both are frozen, and what is between them learns from
    documents of at most 5 images and their texts. Then images it has not seen
    are captioned after 0, 1, 4 and 32 examples, and once more with images
    shuffled. Nothing is downloaded.

    Exits with 1 if something that must hold doesn't: see the last table.
    """
    from flamingo_fast.training.demo.report import plot, render
    from flamingo_fast.training.demo.run import DemoConfig, remove_run, run_demo

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"out: can't make {out}: {error}") from error
    check_writable("out", out / "results.json")
    if fresh:
        remove_run(out)
    try:
        result = run_demo(out, DemoConfig(seed=seed), console=Console())
    except FileExistsError as error:
        raise typer.BadParameter(f"{error}; --fresh removes it") from error
    pictures = plot(result, out)
    wide_console().print(render(result))
    for picture in pictures:
        typer.echo(f"wrote {picture}")
    typer.echo(
        f"to go on: flamingo-fast generate --model {out / 'model'} "
        f"--image {out / 'images' / '7.png'} --prompt '<image>'"
    )
    if not all(check.holds for check in result.checks()):
        raise typer.Exit(1)
