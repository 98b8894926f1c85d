"""Commands that train."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flamingo_fast.cli.app import app

_Config = Annotated[Path, typer.Argument(help="YAML: see README, Training.")]
_Fresh = Annotated[
    bool, typer.Option("--fresh", help="Remove what an earlier run left in its folder first.")
]
_AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Go on though optimizer, weights and such are not the checkpoint's.",
    ),
]
_Nvtx = Annotated[
    bool, typer.Option("--nvtx", help="Name what is done in NVTX ranges, for nsys: see README.")
]


@app.command()
def train(
    config: _Config,
    fresh: _Fresh = False,
    accept_changes: _AcceptChanges = False,
    nvtx: _Nvtx = False,
) -> None:
    """Train a model, or go on: from the last checkpoint in the run's folder, if there is one.

    Several processes: torchrun --nproc-per-node N -m flamingo_fast.cli train CONFIG.

    SIGTERM and Ctrl-C end the step, write a checkpoint and exit with 0. Exits with 1 if too many
    samples are bad or a file can't be read or written, with 2 if the config is wrong.
    """
    _run(config, {}, fresh, accept_changes, nvtx)


@app.command()
def finetune(
    config: _Config,
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            exists=True,
            file_okay=False,
            help="Folder of save_pretrained, of a checkpoint, or of a run, whose last checkpoint "
            "it is then.",
        ),
    ],
    fresh: _Fresh = False,
    accept_changes: _AcceptChanges = False,
    nvtx: _Nvtx = False,
) -> None:
    """Train a trained model on, for a task: as train, with other defaults.

    The vision encoder is trained too, at 480 x 480; the learning rate is 1e-5 after 100 steps of
    warm-up. The tokenizer is the one in the folder, or of the run's model, if there is one.
    """
    from flamingo_fast.training.config import FINETUNING
    from flamingo_fast.training.model_source import CHECKPOINTS
    from flamingo_fast.training.run_folder import MODEL

    defaults: dict[str, Any] = {**FINETUNING, "model": str(source)}
    run = source.resolve()
    if run.parent.name == CHECKPOINTS:
        run = run.parent.parent
    for folder in (source, run / MODEL):
        if any(folder.glob("tokenizer*")):
            defaults["tokenizer"] = str(folder)
            break
    _run(config, defaults, fresh, accept_changes, nvtx)


def _run(
    path: Path, defaults: dict[str, Any], fresh: bool, accept_changes: bool, nvtx: bool
) -> None:
    from flamingo_fast.models.fields import ConfigError
    from flamingo_fast.models.saving import CheckpointError
    from flamingo_fast.training.bad_samples import BadSamplesError
    from flamingo_fast.training.config import TrainConfig
    from flamingo_fast.training.features import FeatureError
    from flamingo_fast.training.stream import StreamError
    from flamingo_fast.training.trainer import train

    console = Console()
    try:
        try:
            config = TrainConfig.from_yaml(path, defaults)
        except OSError as error:
            raise ConfigError(f"CONFIG: {error}") from None
        if "model" in defaults and config.model != defaults["model"]:
            raise ConfigError(f"model: expected none beside --from, got {config.model!r}")
        watch = None
        if nvtx:
            from flamingo_fast.profiling.annotate import annotate, nvtx_domain

            # Before anything that takes time, an error if the package is missing.
            nvtx_domain()
            watch = annotate
        result = train(
            config, fresh=fresh, accept_changes=accept_changes, console=console, watch=watch
        )
    except ConfigError as error:
        _fail(error, 2)
    except (BadSamplesError, CheckpointError, FeatureError, StreamError) as error:
        _fail(error, 1)
    if not _is_first_rank():
        return
    if result.is_complete:
        typer.echo(f"done: {result.steps} steps; the model is in {result.model}")
    else:
        typer.echo(
            f"stopped after {result.steps} steps"
            + (f", checkpoint {result.checkpoint}" if result.checkpoint else "")
            + "; the same command goes on"
        )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(error: Exception, code: int) -> None:
    """One line; more of bad samples, which come with a list."""
    if os.environ.get("FLAMINGO_FAST_DEBUG") == "1":
        raise error
    # Of a config all ranks say the same.
    if code == 1 or _is_first_rank():
        typer.echo(f"flamingo-fast: {error}", err=True)
    raise typer.Exit(code)
