"""Commands about models."""

from pathlib import Path
from typing import Annotated

import typer

from flamingo_fast.cli.app import app, check_writable, usable_device, wide_console


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
    check_writable("csv", csv_file)

    from flamingo_fast.models.config import ConfigError
    from flamingo_fast.models.params import preset_rows, render, table3_rows, write_csv
    from flamingo_fast.models.presets import PRESETS

    try:
        rows = table3_rows() if table3 else preset_rows(preset or PRESETS)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if csv_file is not None:
        write_csv(rows, csv_file)
    wide_console().print(render(rows))


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
    from flamingo_fast.models.folder import processor_of, prompt_parts
    from flamingo_fast.models.generation import generate as generate_tokens
    from flamingo_fast.models.saving import from_pretrained

    target = usable_device(device)
    try:
        config, processor = processor_of(model)
        parts = prompt_parts(prompt, image or [], processor.image_token)
        batch = processor([parts], padding_side="left").to(target)
        flamingo = from_pretrained(model, device=target, config=config)
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
