"""Commands that measure."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flamingo_fast.cli.app import app, check_writable, usable_device, wide_console

if TYPE_CHECKING:
    from flamingo_fast.bench.suites import Settings

_DEFAULT = ("ops", "modules", "decode")
_STEPS = 9
_Scale = Annotated[
    str, typer.Option(help="Of table3: full, half, mini or micro; see docs/benchmarks.md.")
]
_Impl = Annotated[
    str,
    typer.Option(
        help="Of table3: auto, or time each row with other ops, too: reference, peer "
        "(OpenFlamingo's compositions)."
    ),
]


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="ops, modules, decode, model, memory, growth, patch, packing, table3, headline, "
            "or all. Default: ops modules decode.",
            show_default=False,
        ),
    ] = None,
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
        bool, typer.Option("--quick", help="Small shapes, short, without torch.compile.")
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Of patch: such as idefics, or idefics.decode_16. Default: all."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Of model, too: build this preset with random weights, run it and generate 8 "
            "tokens; in bf16, or the first --dtype."
        ),
    ] = None,
    scale: _Scale = "mini",
    rows: Annotated[
        str | None, typer.Option(help="Of table3: such as every_4th,mlp. Default: its 18.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of table3: of each row.")] = _STEPS,
    impl: _Impl = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Of table3: go on from rows that --out has.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of index.html, report.md, results.json and results.csv. Default: "
            "results/<utc>-<commit> in a checkout, else bench_results.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time what we have against PyTorch's and others', interleaved, after checking results.

    Ctrl-C keeps what is finished. Exits with 1 if a provider's outputs or gradients are wrong; it
    then has no numbers.
    """
    import torch

    from flamingo_fast.bench import runner
    from flamingo_fast.bench.suites import ALL, Settings

    names = list(dict.fromkeys(suites or _DEFAULT))
    if "all" in names:
        names = list(ALL)
    _check_resume(resume, out)
    out = out or runner.default_out()
    settings = Settings(
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        ops=tuple(op or ()),
        shapes=tuple(shape or ()),
        dtypes=tuple(dict.fromkeys(dtype or ())),
        modes=tuple(mode or ()),
        providers=tuple(provider or ()),
        quick=quick,
        cases=tuple(case or ()),
        preset=preset,
        scale=scale,
        rows=_split(rows),
        pairs=steps,
        impl=impl,
        out=out,
        resume=resume,
    )
    if preset is not None:
        _check_preset(preset)
    raise typer.Exit(_run(names, settings, out))


def _check_resume(resume: bool, out: Path | None) -> None:
    if resume and out is None:
        raise typer.BadParameter("resume: expected --out with it, where finished rows are")


def _split(names: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (names or "").split(",")))


def _check_preset(preset: str) -> None:
    from flamingo_fast.models.config import ConfigError, FlamingoConfig

    try:
        FlamingoConfig.preset(preset)
    except ConfigError as error:
        raise typer.BadParameter(f"preset: {error}") from error


def _run(names: list[str], settings: "Settings", out: Path) -> int:
    """Measures, writes and prints; 1 if something failed or was interrupted."""
    import dataclasses
    import shlex
    import warnings

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from flamingo_fast.bench import records, runner
    from flamingo_fast.bench.suites import check
    from flamingo_fast.training.stream import StreamError

    try:
        check(names, settings)
        runner.prepare(out)
    except (StreamError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    records.set_threads()
    # Of peers' code, of what it calls.
    warnings.filterwarnings("ignore", category=FutureWarning)
    about = dataclasses.asdict(records.environment(settings.device))
    # Files beside those of the commit, such as results, change nothing.
    about |= {"commit": about["commit"].removesuffix("-dirty"), "changes": records.changes()}
    settings = dataclasses.replace(settings, about=about)
    report = None
    paths: list[Path] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    command = shlex.join(["flamingo-fast", *sys.argv[1:]])
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        reports = runner.run(
            names,
            settings,
            command,
            lambda text, share: bar.update(task, description=text, completed=share),
        )
        for report in reports:
            paths = runner.write(report, out)
            last = report.sections[-1]
            console.print(f"{last.title}: {last.seconds:.0f} s", highlight=False)
    assert report is not None
    runner.show(report)
    for path in (*paths, out):
        typer.echo(path)
    return 1 if report.failures or report.is_interrupted else 0


@app.command()
def bench_compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run of bench, or its results.json.")],
    second: Annotated[Path, typer.Argument(help="Of another run.")],
) -> None:
    """Compare the ratios of two runs of bench: whether their intervals overlap."""
    from flamingo_fast.bench import runner

    try:
        table, _ = runner.compare(first, second)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wide_console().print(table.rich())


@app.command()
def table3(
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", dir_okay=False, writable=True, help="Write the numbers to this file, too."
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="Measure, too: train models of the rows. full: the paper's sizes; half; mini: ten "
            "minutes on 2 cores; micro: five."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="With --scale: rows, such as every_4th,mlp. Default: the table's 18."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --scale: steps of each row, and of the baseline with it. "
            f"Default: {_STEPS}.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="With --scale: such as cuda:1. Default: a GPU if there is one."),
    ] = None,
    impl: _Impl = "auto",
    data: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            help="With --scale: real samples, of a folder with shards m3w-*.tar, align-*.tar, "
            "ltip-*.tar, vtp-*.tar, for its row laion-*.tar, and a tokenizer.json.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="With --scale: a report's folder. Default: as bench's.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="With --scale and --out: go on from the rows that it has."),
    ] = False,
) -> None:
    """Predict the step times of the rows of the paper's table 3, beside the printed ones.

    From each model's operations and trainable parameters: nothing is trained, no weights are made,
    unless --scale is given.
    """
    check_writable("csv", csv_file)
    given: dict[str, Any] = {"rows": rows, "steps": steps, "device": device}
    given |= {"data": data, "out": out}
    given |= {"resume": resume or None, "impl": None if impl == "auto" else impl}
    if scale is None:
        if name := next((name for name, value in given.items() if value is not None), None):
            raise typer.BadParameter(
                f"{name}: expected --scale with it; predictions are of all rows"
            )
        _predict(csv_file)
        return
    _check_resume(resume, out)
    _table3_measured(
        scale, _split(rows), steps or _STEPS, device, impl, data, csv_file, out, resume
    )


def _predict(csv_file: Path | None) -> None:
    from flamingo_fast.bench.table3 import predict, render, write_csv

    with Console(stderr=True).status("Counting"):
        predictions = predict()
    if csv_file is not None:
        write_csv(predictions, csv_file)
    wide_console().print(render(predictions))


def _table3_measured(
    scale: str,
    rows: tuple[str, ...],
    steps: int,
    device: str | None,
    impl: str,
    data: Path | None,
    csv_file: Path | None,
    out: Path | None,
    resume: bool,
) -> None:
    """As `bench table3`."""
    import shutil

    from flamingo_fast.bench import runner
    from flamingo_fast.bench.suites import Settings

    out = out or runner.default_out()
    settings = Settings(
        device=usable_device(device),
        scale=scale,
        rows=rows,
        pairs=steps,
        impl=impl,
        data=data,
        out=out,
        resume=resume,
    )
    code = _run(["table3"], settings, out)
    table = out / "table3.csv"
    if csv_file is not None and table.exists():
        shutil.copyfile(table, csv_file)
    raise typer.Exit(code)
