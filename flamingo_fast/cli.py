"""The `flamingo-fast` command. Exit codes: 0 done, 1 a check failed, 2 bad usage.

Commands stay thin: they turn options into one call of bench, profiling, testing or a model, and
import it when they run, so that `--help` is quick and no command needs another's extra.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import flamingo_fast
from flamingo_fast.ops.dispatch import BackendUnavailableError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Fused kernels, modules and benchmarks for Flamingo.",
    no_args_is_help=True,
    add_completion=False,
    # Its tracebacks with local variables would show every failure, a user's mistake too.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(flamingo_fast.__version__)
        raise typer.Exit


def _check_writable(option: str, file: Path | None) -> None:
    """Before any work whose results would go there."""
    if file is not None and not file.exists():
        try:
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise typer.BadParameter(f"{option}: can't write {file}: {error}") from error


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices and which backends work here, or why not.

    Exits with 1 if something that is installed and has its device fails.
    """
    from flamingo_fast.doctor import examine, render

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console().print(render(report))
    if report.broken:
        raise typer.Exit(1)


@app.command()
def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="Architecture, e.g. sm_90; may be repeated. Default: all."),
    ] = None,
    case: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    changed: Annotated[
        bool, typer.Option("--changed", help="Only kernels whose source is not their golden's.")
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, help="Only (or, with --changed, also) as many that HEAD chooses.")
    ] = 0,
    update: Annotated[
        bool, typer.Option("--update", help="Write the numbers as goldens of this Triton version.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", dir_okay=False, writable=True, help="Write the numbers to this file."
        ),
    ] = None,
) -> None:
    """Compile the kernels for GPUs that need not be there and check what comes out.

    Exits with 1 if a kernel spills, needs too much shared memory or is worse than its golden.
    """
    _check_writable("json", json_file)

    from rich.progress import track

    from flamingo_fast.testing.aot import TARGETS, Compiler
    from flamingo_fast.testing.aot_gate import BadSelectionError, Selection, render, run_gate

    try:
        selection = Selection(tuple(target or TARGETS), case, changed, sample)
        with Compiler() as compiler:
            report = run_gate(
                compiler,
                selection,
                update=update,
                progress=lambda outcomes, total: track(
                    outcomes, "Compiling", total, console=Console(stderr=True), transient=True
                ),
            )
    except BadSelectionError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        verdicts = [verdict.as_dict() for verdict in report.verdicts]
        json_file.write_text(json.dumps(verdicts, indent=1) + "\n")
    # A log file would fold the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(render(report))
    if not report.passed:
        raise typer.Exit(1)


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


@app.command()
def bench(
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
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of results.csv, report.md and report.png (growth.png). "
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
    if model is not None:
        _bench_model(model, (dtype or ["bf16"])[0], device)
        return
    out = out or records.DEFAULT_OUT
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
def params(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Such as flamingo-3b; may be repeated. Default: all presets."),
    ] = None,
    table3: Annotated[
        bool, typer.Option("--table3", help="The rows of the paper's table 3 in place of presets.")
    ] = False,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", dir_okay=False, writable=True, help="Write the counts to this file, too."
        ),
    ] = None,
) -> None:
    """Count a model's parameters, part by part, beside what the paper prints.

    No weights are made, so the largest takes seconds. Footnotes say where counts print otherwise.
    """
    if preset and table3:
        raise typer.BadParameter("table3: these are other models than those of --preset")
    _check_writable("csv", csv_file)

    from flamingo_fast.models.config import ConfigError
    from flamingo_fast.models.params import preset_rows, render, table3_rows, write_csv
    from flamingo_fast.models.presets import PRESETS

    try:
        rows = table3_rows() if table3 else preset_rows(preset or PRESETS)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if csv_file is not None:
        write_csv(rows, csv_file)
    # A log file would fold the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(render(rows))


@app.command()
def table3(
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", dir_okay=False, writable=True, help="Write the numbers to this file, too."
        ),
    ] = None,
) -> None:
    """Predict the step times of the rows of the paper's table 3, beside the printed ones.

    From each model's operations and trainable parameters: nothing is trained, no weights are made.
    """
    _check_writable("csv", csv_file)

    from flamingo_fast.bench.table3 import predict, render, write_csv

    with Console(stderr=True).status("Counting"):
        predictions = predict()
    if csv_file is not None:
        write_csv(predictions, csv_file)
    # A log file would fold the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(render(predictions))


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder of save_pretrained, with a tokenizer."
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="Text, with the model's image token (such as <image>) where images are; without "
            "any they come first."
        ),
    ],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image's file; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens.")] = 32,
    beams: Annotated[int, typer.Option(min=1, help="Of beam search; 1: greedy.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1. Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Print how a model goes on after a prompt of text and images."""
    import torch

    from flamingo_fast.models.folder import processor_of, prompt_parts
    from flamingo_fast.models.generation import generate as generate_tokens
    from flamingo_fast.models.saving import from_pretrained

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"device: can't use {device}: {reason}") from error
    try:
        config, processor = processor_of(model)
        parts = prompt_parts(prompt, image or [], processor.image_token)
        batch = processor([parts], padding_side="left").to(device)
        flamingo = from_pretrained(model, device=device, config=config)
        if (largest := int(batch.input_ids.max())) >= flamingo.num_tokens:
            raise ValueError(
                f"{model}: expected a tokenizer of the model's {flamingo.num_tokens} tokens, got "
                f"token {largest} of the prompt"
            )
        output = generate_tokens(
            flamingo,
            batch.input_ids,
            videos=batch.media,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            return_cache=False,
        )
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(processor.decode(output.sequences[0]))


def main() -> None:
    """Runs the command; an expected error becomes one line on stderr and exit code 1.

    FLAMINGO_FAST_DEBUG=1 shows its traceback instead.
    """
    try:
        app()
    # ImportError: an extra that a command needs is not installed; its message names the extra.
    except (BackendUnavailableError, ImportError, OSError) as error:
        if os.environ.get("FLAMINGO_FAST_DEBUG") == "1":
            raise
        typer.echo(f"flamingo-fast: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
