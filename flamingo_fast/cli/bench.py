"""Commands that measure."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flamingo_fast.cli.app import app, check_writable, wide_console

if TYPE_CHECKING:
    import torch


def _bench_packing(device: "torch.device") -> None:
    from flamingo_fast.bench import packed_training, records

    records.set_threads()
    try:
        measured = packed_training.run(device)
    except ImportError as error:
        raise typer.BadParameter(f"packing: {error}") from error
    Console().print(packed_training.render(measured))


def _bench_model(preset: str, dtype: str, device: "torch.device") -> None:
    from flamingo_fast.bench import records, whole_model
    from flamingo_fast.bench.registry import DTYPES
    from flamingo_fast.models.config import ConfigError

    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    records.set_threads()
    try:
        steps = whole_model.run(preset, DTYPES[dtype], device)
    except (ConfigError, ImportError) as error:
        raise typer.BadParameter(f"model: {error}") from error
    Console().print(whole_model.render(preset, DTYPES[dtype], steps))


def _bench_patch(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    quick: bool,
    out: Path,
    device: "torch.device",
) -> None:
    from flamingo_fast.bench import patching, patching_models, plan, records, report

    try:
        plan.check_dtypes(dtypes)
        chosen = patching_models.selected(names, quick)
        report.check_out(out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    records.set_threads()
    with Console(stderr=True).status("") as status:
        results = patching.run(chosen, dtypes, device, quick=quick, progress=status.update)
    patching.show(results)
    for path in patching.write(results, out):
        typer.echo(path)
    if results.failures:
        raise typer.Exit(1)


@app.command()
def bench(
    family: Annotated[
        list[str] | None,
        typer.Argument(
            help="With --patch: models, such as idefics, or a case of one, such as "
            "idefics.decode_16. Default: all.",
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
        bool, typer.Option("--quick", help="One small shape, short, without torch.compile.")
    ] = False,
    growth: Annotated[
        bool,
        typer.Option("--growth", help="Attention's time and memory with more and more images."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead: build this preset with random weights, run it and generate 8 tokens; "
            "in bf16, or the first --dtype."
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            help="Instead: train flamingo-mini on image-text pairs, several in a row or one.",
        ),
    ] = False,
    patch: Annotated[
        bool,
        typer.Option(
            "--patch",
            help="Instead: peers' whole models, before and after patch; all, or those named.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of results.csv, report.md and report.png (growth.png, patching.md). "
            "Default: bench/results in a checkout, else bench_results.",
        ),
    ] = None,
) -> None:
    """Time our ops against PyTorch's and others', interleaved, after checking their results.

    Exits with 1 if a provider's outputs or gradients are wrong; it then has no numbers.
    """
    import torch

    from flamingo_fast.bench import plan, records, report, run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = out or records.DEFAULT_OUT
    if patch:
        dtypes = tuple(dict.fromkeys(dtype or ("fp32", "bf16")))
        _bench_patch(tuple(family or ()), dtypes, quick, out, device)
        return
    if family:
        raise typer.BadParameter(f"{family[0]}: expected --patch with it")
    if model is not None:
        _bench_model(model, (dtype or ["bf16"])[0], device)
        return
    if packing:
        _bench_packing(device)
        return
    try:
        chosen = plan.make_plan(
            ops=op or (),
            shapes=shape or (),
            dtypes=dtype or (),
            modes=mode or (),
            providers=provider or (),
            quick=quick,
            growth=growth,
        )
        report.prepare(out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    records.set_threads()
    with Console(stderr=True).status("") as status:
        results = run.run(chosen, device, status.update)
    report.show(results)
    for path in report.write(results, out):
        typer.echo(path)
    if results.failures:
        raise typer.Exit(1)


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
            help="Measure, too: train models of the rows, made smaller. micro: minutes on 2 cores."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="With --scale: rows, such as every_4th,mlp. Default: all."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(min=1, help="With --scale: steps of each row, and of the baseline with it."),
    ] = 7,
    device: Annotated[
        str | None,
        typer.Option(help="With --scale: such as cuda:1. Default: a GPU if there is one."),
    ] = None,
) -> None:
    """Predict the step times of the rows of the paper's table 3, beside the printed ones.

    From each model's operations and trainable parameters: nothing is trained, no weights are made,
    unless --scale is given.
    """
    check_writable("csv", csv_file)
    if scale is not None:
        _table3_measured(scale, rows, steps, device, csv_file)
        return
    if rows is not None or device is not None:
        name = "rows" if rows is not None else "device"
        raise typer.BadParameter(f"{name}: expected --scale with it; predictions are of all rows")

    from flamingo_fast.bench.table3 import predict, render, write_csv

    with Console(stderr=True).status("Counting"):
        predictions = predict()
    if csv_file is not None:
        write_csv(predictions, csv_file)
    wide_console().print(render(predictions))


def _table3_measured(
    scale: str, rows: str | None, steps: int, device: str | None, csv_file: Path | None
) -> None:
    import torch
    from rich.progress import track

    from flamingo_fast.bench import records, table3_measured
    from flamingo_fast.bench.table3 import predict
    from flamingo_fast.bench.table3_scales import SCALES

    if scale not in SCALES:
        raise typer.BadParameter(f"scale: expected one of {', '.join(SCALES)}; got {scale!r}")
    try:
        chosen = table3_measured.check_rows(filter(None, (rows or "").split(",")))
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=target)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(reason) from error
    if not chosen:
        raise typer.BadParameter("rows: expected others than the baseline, with which they go")
    records.set_threads()
    console = Console(stderr=True)
    with console.status("Counting"):
        predictions = predict()
    measurements = list(
        track(
            table3_measured.measure(SCALES[scale], chosen, steps, target),
            "Measuring",
            total=len(chosen),
            console=console,
            transient=True,
        )
    )
    if csv_file is not None:
        table3_measured.write_csv(measurements, predictions, csv_file)
    out = wide_console()
    out.print(table3_measured.render(measurements, predictions, SCALES[scale]))
    out.print(str(records.environment(target)))
