"""The command's app, and what several commands share."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

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


def usable_device(name: str | None) -> "torch.device":
    """The device of that name, on which something was computed; None: a GPU if there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Of "meta" the value is missed alone.
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"device: can't use {name}: {reason}") from error
    return torch.device(name)


def wide_console() -> Console:
    """Of standard output; a log file would fold tables to 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=200)
