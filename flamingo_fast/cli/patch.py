"""What `flamingo_fast.patch` would do to a model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flamingo_fast.cli.app import app, wide_console


@app.command()
def patch(
    model_dir: Annotated[
        Path, typer.Argument(help="Folder of transformers' save_pretrained; config.json is enough.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report; without it there is nothing to do.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cross_attention: Annotated[
        bool, typer.Option(help="Attention of text over media, and the masks made for it.")
    ] = True,
    resampler: Annotated[
        bool, typer.Option(help="Attention of latents over a medium's features.")
    ] = True,
    gated_residual: Annotated[
        bool, typer.Option(help="x + tanh(gate) * y in one operation.")
    ] = True,
    norm: Annotated[
        bool, typer.Option(help="RMS norms, and norms with the residual before them.")
    ] = True,
    media_kv_cache: Annotated[
        bool, typer.Option(help="Keep keys and values of media while tokens are generated.")
    ] = True,
    unattended: Annotated[
        str | None,
        typer.Option(
            help="What tokens get that attend to nothing: zero (of attention) or zero_block. "
            "Default: what the model gives them."
        ),
    ] = None,
    unknown: Annotated[
        str,
        typer.Option(
            help="Modules whose source is no known version: leave, or probe, which loads the "
            "weights and tries them."
        ),
    ] = "leave",
) -> None:
    """Show which modules of a model flamingo_fast.patch would make faster, and why not others.

    Nothing is changed or downloaded, and weights are read only to probe.
    """
    from torch import nn

    from flamingo_fast.patching import engine, folder

    if not dry_run:
        raise typer.BadParameter(
            "dry-run: expected; patching changes a model in memory and none of its files. After "
            "loading it in Python: flamingo_fast.patch(model)"
        )
    options: dict[str, Any] = {
        "cross_attention": cross_attention,
        "resampler": resampler,
        "gated_residual": gated_residual,
        "norm": norm,
        "media_kv_cache": media_kv_cache,
        "unattended": unattended,
        "unknown": unknown,
        "dry_run": True,
    }
    try:
        # Before a model is made.
        engine.patch(nn.Identity(), **options)
        model = folder.model_of(model_dir, with_weights=unknown == "probe")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    report = engine.patch(model, **options)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        wide_console().print(report)
