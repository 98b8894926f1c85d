"""The command's app, and what several commands share."""

import sys
import tempfile
from pathlib import Path

import typer
from rich.console import Console

app = typer.Typer(
    help="Fused kernels, modules and benchmarks for Flamingo.",
    no_args_is_help=True,
    add_completion=False,
    # Its tracebacks with local variables would show every failure, a user's mistake too.
    pretty_exceptions_enable=False,
)


def check_writable(option: str, file: Path | None) -> None:
    """Before any work whose results would go there."""
    if file is not None and not file.exists():
        try:
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise typer.BadParameter(f"{option}: can't write {file}: {error}") from error


def wide_console() -> Console:
    """Of standard output; a log file would fold tables to 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=200)
