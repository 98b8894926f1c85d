"""The command that shows all promises with what shows them."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flamingo_fast.cli.app import app


@app.command()
def verify(
    pytest_arguments: Annotated[
        list[str] | None,
        typer.Argument(help="For pytest, after --, such as -- -n auto --sample 2."),
    ] = None,
    junit: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="Junit file of pytest, or a folder of such, in place of running tests; may be "
            "repeated.",
        ),
    ] = None,
    table3: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="table3.csv of `bench table3`, for the figure. Default: predictions alone.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of the report. Default: build/verify."),
    ] = None,
) -> None:
    """Check every promise of docs/promises/: run what shows it, and write one table of all.

    Tests that an earlier run left out, by --sample, are said and fail nothing. Exits with 1 if a
    promise has no evidence or some of it fails. Needs a checkout with the extra dev.
    """
    from flamingo_fast.bench import records
    from flamingo_fast.bench import verify as verify_

    if not records.IN_CHECKOUT:
        raise typer.BadParameter(f"expected to run in a checkout, got {records.ROOT}")
    if junit and pytest_arguments:
        raise typer.BadParameter("junit: expected no arguments for pytest with it; nothing is run")
    command = shlex.join(["flamingo-fast", *sys.argv[1:]])
    try:
        code = verify_.verify(
            records.ROOT,
            unknown,
            junit or (),
            pytest_arguments or (),
            table3,
            out,
            command,
        )
    except ValueError as error:
        typer.echo(f"flamingo-fast: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(code)


def unknown(arguments: Sequence[str]) -> str:
    """What `flamingo-fast` doesn't know of these arguments; empty if it knows all.

    A command's name and the names of options are looked at, not their values.
    """
    # Whichever click typer brings.
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while (commands := getattr(command, "commands", None)) is not None:
        name = words.pop(0) if words else ""
        if name not in commands:
            return f"there is no command {name!r}"
        command = commands[name]
    options = {each for param in command.params for each in (*param.opts, *param.secondary_opts)}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    missing = sorted(set(given) - options - {"--", "--help"})
    return f"there is no option {', '.join(missing)}" if missing else ""
