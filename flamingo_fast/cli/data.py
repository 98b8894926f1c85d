"""Commands about training data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from flamingo_fast.cli.app import app, usable_device, wide_console

if TYPE_CHECKING:
    from flamingo_fast.training.bad_samples import Outcomes
    from flamingo_fast.training.samples import Limits

data_app = typer.Typer(
    help="Pack, check and prepare training data.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")

_MAX_TEXT_CHARS = 100_000
_MAX_IMAGE_PIXELS = 89_478_485
_UNUSUAL_IMAGES = "convert"

Kind = Annotated[str, typer.Argument(help="interleaved, image_text or video_text.")]
Shards = Annotated[
    list[str], typer.Argument(help="Tar files; {000..127} and wildcards are expanded.")
]
MaxTextChars = Annotated[int, typer.Option(min=1, help="Longer texts are bad samples.")]
MaxImagePixels = Annotated[int, typer.Option(min=1, help="Larger images are bad samples.")]
UnusualImages = Annotated[
    str, typer.Option(help="CMYK, 16-bit and animated ones: convert, or skip as bad samples.")
]
MaxBadRate = Annotated[
    float, typer.Option(min=0, max=1, help="Exit with 1 if a larger share of samples is bad.")
]


def _limits(kind: str, text_chars: int, image_pixels: int, unusual_images: str) -> "Limits":
    from flamingo_fast.training.config import KINDS, UNUSUAL_IMAGES
    from flamingo_fast.training.samples import Limits

    if kind not in KINDS:
        raise typer.BadParameter(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if unusual_images not in UNUSUAL_IMAGES:
        expected = " or ".join(UNUSUAL_IMAGES)
        raise typer.BadParameter(f"unusual-images: expected {expected}, got {unusual_images!r}")
    return Limits(text_chars, image_pixels, unusual_images)


def _progress() -> Progress:
    """Gone when it is done; on standard error, so that a table can be piped."""
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _report(outcomes: "Outcomes", max_bad_rate: float) -> None:
    from flamingo_fast.training.checking import outcomes_table

    wide_console().print(outcomes_table(outcomes))
    for path, what in outcomes.broken_shards.items():
        typer.echo(f"broken shard {path}: {what}")
    typer.echo(f"{outcomes.total} samples, {outcomes.bad} of them bad")
    if outcomes.bad > max_bad_rate * outcomes.total:
        typer.echo(
            f"flamingo-fast: {outcomes.bad / outcomes.total:.2%} of the samples are bad, more than "
            f"max-bad-rate, {max_bad_rate:.2%}",
            err=True,
        )
        raise typer.Exit(1)


@data_app.command()
def pack(
    kind: Kind,
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder: of pairs NAME.jpg (or a video) and NAME.txt, of web pages NAME.json "
            "and its images. Or a .csv, .tsv or .jsonl with path and text; of web pages a .jsonl "
            "with one in each line."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; a new one.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Of a shard at most so many MB.")] = 1000,
    shard_count: Annotated[int, typer.Option(min=1, help="And so many samples.")] = 10_000,
    max_text_chars: MaxTextChars = _MAX_TEXT_CHARS,
    max_image_pixels: MaxImagePixels = _MAX_IMAGE_PIXELS,
    unusual_images: UnusualImages = _UNUSUAL_IMAGES,
    max_bad_rate: MaxBadRate = 0.1,
) -> None:
    """Write shards of images, videos and web pages.

    Samples that can't be used are left out; a table says how many and why. Exits with 1 if there
    are too many; the others are packed all the same.
    """
    limits = _limits(kind, max_text_chars, max_image_pixels, unusual_images)

    from flamingo_fast.training.writers import SourceError, write_shards

    try:
        with _progress() as bar:
            task = bar.add_task("pack", total=None)
            outcomes = write_shards(
                kind,
                source,
                out,
                limits=limits,
                shard_bytes=shard_size * 1_000_000,
                shard_samples=shard_count,
                progress=lambda count: bar.advance(task, count),
            )
    except (SourceError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    count = len(list(out.glob("*.tar")))
    typer.echo(f"wrote {count} shard{'' if count == 1 else 's'} to {out}")
    _report(outcomes, max_bad_rate)


@data_app.command()
def check(
    kind: Kind,
    shards: Shards,
    num_frames: Annotated[
        int, typer.Option(min=1, help="Of a video at most so many are decoded.")
    ] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one alone.")] = 0,
    max_text_chars: MaxTextChars = _MAX_TEXT_CHARS,
    max_image_pixels: MaxImagePixels = _MAX_IMAGE_PIXELS,
    unusual_images: UnusualImages = _UNUSUAL_IMAGES,
    max_bad_rate: MaxBadRate = 0.1,
) -> None:
    """Read and decode every sample, and count the bad ones by reason.

    Exits with 1 if there are too many.
    """
    limits = _limits(kind, max_text_chars, max_image_pixels, unusual_images)

    from flamingo_fast.models.fields import ConfigError
    from flamingo_fast.training.checking import check_shards
    from flamingo_fast.training.shards import ShardSet

    try:
        shard_set = ShardSet(shards)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with _progress() as bar:
        task = bar.add_task("check", total=len(shard_set))
        outcomes = check_shards(
            shard_set,
            kind,
            limits,
            num_frames=num_frames,
            num_workers=workers,
            progress=lambda count: bar.advance(task, count),
        )
    _report(outcomes, max_bad_rate)


@data_app.command()
def index(shards: Shards) -> None:
    """Write where samples start beside each shard, so that opening them is quick.

    Shards of `data pack` have this. Exits with 1 if a shard can't be read in full.
    """
    from flamingo_fast.models.fields import ConfigError
    from flamingo_fast.training.shards import expand_paths, write_index

    try:
        paths = expand_paths(shards)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    broken = 0
    for path in paths:
        problem = write_index(path)
        if problem is not None:
            broken += 1
            typer.echo(f"broken shard {path}: {problem}")
    typer.echo(f"indexed {len(paths) - broken} of {len(paths)} shards")
    if broken:
        raise typer.Exit(1)


@data_app.command()
def encode(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="YAML, as for `train`.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False, help="Folder for features; what `features` of a dataset names."
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Frames that are encoded at once.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="That decode images and videos.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1. Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Run the frozen vision encoder over all images and videos, and keep what it makes of them.

    Training then reads it in place of running the encoder, where a dataset has `features: OUT`.
    What is there already is not made again, so that it may be stopped and started again. Media
    that can't be used are put down as such, with the reason.
    """
    from flamingo_fast.models.fields import ConfigError
    from flamingo_fast.models.saving import CheckpointError
    from flamingo_fast.training.config import DTYPES, TrainConfig
    from flamingo_fast.training.encoding import encode_features
    from flamingo_fast.training.features import FeatureError
    from flamingo_fast.training.model_source import find_source, make_vision_encoder

    try:
        train = TrainConfig.from_yaml(config)
        source = find_source(train)
        target = usable_device(device or train.device)
        encoder = make_vision_encoder(source, train.seed).to(target, DTYPES[train.precision])
        with _progress() as bar:
            task = bar.add_task("encode", total=None)
            done = encode_features(
                train.datasets,
                source.config.vision,
                encoder,
                out,
                batch_size=batch_size,
                num_threads=threads,
                progress=lambda count, total: bar.update(task, advance=count, total=total),
            )
    except (ConfigError, CheckpointError, FeatureError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(
        f"{done.samples} samples, {done.bad_samples} of them bad; {done.encoded} media encoded, "
        f"{done.present} there before, {done.bad} that can't be used"
    )
    typer.echo(f"{done.folder}: {done.bytes / 1e6:.1f} MB")
