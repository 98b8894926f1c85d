"""The `flamingo-fast` command. Exit codes: 0 done, 1 a check failed, 2 bad usage.

Commands stay thin: they turn options into one call of bench, profiling, testing, training or a
model, and import it when they run, so that `--help` is quick and no command needs another's extra.
"""

import importlib
import os
import sys
from typing import Annotated

import typer

import flamingo_fast
from flamingo_fast.cli.app import app

_MACHINE = ("kernels", "bench", "tune", "accept", "profile", "profile_run", "export_kernels")
# In the order that --help has.
for _name in (*_MACHINE, "models", "patch", "data", "train", "demo", "verify"):
    importlib.import_module(f"flamingo_fast.cli.{_name}")


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


def _expected_errors() -> tuple[type[Exception], ...]:
    # ImportError: an extra that a command needs is not installed; its message names the extra.
    expected: tuple[type[Exception], ...] = (ImportError, OSError)
    # Where ops were not imported none can have raised its error, and PyTorch need not be.
    dispatch = sys.modules.get("flamingo_fast.ops.dispatch")
    return expected if dispatch is None else (*expected, dispatch.BackendUnavailableError)


def main() -> None:
    """Runs the command; an expected error becomes one line on stderr and exit code 1.

    FLAMINGO_FAST_DEBUG=1 shows its traceback instead.
    """
    try:
        app()
    except _expected_errors() as error:
        if os.environ.get("FLAMINGO_FAST_DEBUG") == "1":
            raise
        typer.echo(f"flamingo-fast: {error}", err=True)
        sys.exit(1)
