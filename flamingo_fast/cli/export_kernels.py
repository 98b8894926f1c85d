"""The command that writes a repository for Hugging Face's `kernels`."""

from pathlib import Path
from typing import Annotated

import typer

from flamingo_fast.cli.app import app


@app.command()
def export_kernels(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Of the repository: empty, or not there yet.")
    ],
) -> None:
    """Write the ops as a repository for Hugging Face's kernels library.

    Layers for kernelize, and functions for get_local_kernel; nothing of models or training.
    """
    from flamingo_fast.hub.export import export

    try:
        files = export(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    variants = sorted({file.parts[1] for file in files if file.parts[0] == "build"})
    typer.echo(f"{folder}: {len(files)} files; build/{{{','.join(variants)}}}")
