"""A frozen vision encoder over all media of some datasets, once: `flamingo-fast data encode`."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from flamingo_fast.models.config import ConfigError, VisionConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.vision import VisionEncoder, data_config
from flamingo_fast.training.bad_samples import BadSample
from flamingo_fast.training.config import DatasetConfig
from flamingo_fast.training.decoding import decode
from flamingo_fast.training.features import (
    FeatureCache,
    FeatureWriter,
    entry_name,
    fingerprint,
    folder_name,
)
from flamingo_fast.training.samples import Limits, Medium, parse
from flamingo_fast.training.shards import ShardSet
from flamingo_fast.training.transforms import Transform

# Media that are decoded while others are encoded, for each that is encoded at once.
_AHEAD = 2


@dataclasses.dataclass
class Encoded:
    """What was done.

    Attributes:
        folder: of the features.
        samples: that were read; `bad_samples` of them have no media to look for.
        encoded: media whose features were added.
        present: media that had theirs, of this run or an earlier one, or stand in several places.
        bad: media that can't be used, which has been put down.
        bytes: of all files in the folder.
    """

    folder: Path
    samples: int = 0
    bad_samples: int = 0
    encoded: int = 0
    present: int = 0
    bad: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Task:
    name: str
    medium: Medium
    limits: Limits
    num_frames: int


def encode_features(
    datasets: Sequence[DatasetConfig],
    config: VisionConfig,
    encoder: VisionEncoder,
    out: str | Path,
    *,
    batch_size: int = 32,
    num_threads: int = 1,
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> Encoded:
    """Features of all images and videos, where they are not there yet.

    Not augmented. May be killed and started again: at most the last file's entries are made anew.

    Arguments:
        datasets: whose media; of their images all, since a page's window is another one each epoch.
        config: of the encoder.
        encoder: on its device and of its dtype, which the features have.
        out: the root; the encoder's own folder is made in it.
        batch_size: frames at once, up to one video's more: it is not split.
        num_threads: that decode.
        progress: is called with how many more samples were read, and how many there are.

    Raises:
        ConfigError: an encoder that is trained, or shards that there are not.
        FeatureError: a broken file in the folder.
    """
    if not encoder.is_frozen:
        raise ConfigError(
            "vision.is_frozen: expected a frozen encoder, whose features stay as they are"
        )
    folder = Path(out) / folder_name(config, fingerprint(encoder))
    folder.mkdir(parents=True, exist_ok=True)
    writer = FeatureWriter(FeatureCache(folder))
    transform = Transform(require("timm.data").create_transform(**data_config(config)))
    done = Encoded(folder)

    def prepare(task: _Task) -> tuple[torch.Tensor, bool] | BadSample:
        try:
            decoded = decode(task.medium, task.limits, task.num_frames)
        except BadSample as error:
            return error
        return torch.stack([transform(each) for each in decoded.frames]), decoded.is_unusual

    waiting: list[tuple[str, torch.Tensor, bool]] = []
    tasks = _tasks(datasets, writer, done, progress)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for task, made in _in_order(pool, prepare, tasks, _AHEAD * batch_size):
            if isinstance(made, BadSample):
                writer.add_bad(task.name, made)
                done.bad += 1
                continue
            waiting.append((task.name, *made))
            if sum(len(pixels) for _, pixels, _ in waiting) >= batch_size:
                _encode(encoder, waiting, writer)
                done.encoded += len(waiting)
                waiting = []
    if waiting:
        _encode(encoder, waiting, writer)
        done.encoded += len(waiting)
    writer.flush()
    done.bytes = sum(each.stat().st_size for each in folder.iterdir())
    return done


def _tasks(
    datasets: Sequence[DatasetConfig],
    writer: FeatureWriter,
    done: Encoded,
    progress: Callable[[int, int], None],
) -> Iterator[_Task]:
    """Media without an entry, each once."""
    seen: set[str] = set()
    shard_sets = [ShardSet(dataset.shards) for dataset in datasets]
    total = sum(map(len, shard_sets))
    for dataset, shards in zip(datasets, shard_sets, strict=True):
        limits = Limits.of(dataset)
        for index in range(len(shards)):
            done.samples += 1
            progress(1, total)
            try:
                sample = parse(shards[index], dataset.kind, limits)
            except BadSample:
                done.bad_samples += 1
                continue
            for part in sample.parts:
                if isinstance(part, str):
                    continue
                name = entry_name(part, limits, dataset.num_frames)
                if name in seen or name in writer:
                    done.present += 1
                    continue
                seen.add(name)
                yield _Task(name, part, limits, dataset.num_frames)


def _in_order(
    pool: concurrent.futures.Executor,
    prepare: Callable[[_Task], "tuple[torch.Tensor, bool] | BadSample"],
    tasks: Iterator[_Task],
    ahead: int,
) -> "Iterator[tuple[_Task, tuple[torch.Tensor, bool] | BadSample]]":
    """What `prepare` makes of each. `pool.map` would read all of the tasks at once."""
    running: collections.deque[
        tuple[_Task, concurrent.futures.Future[tuple[torch.Tensor, bool] | BadSample]]
    ] = collections.deque()
    for task in tasks:
        running.append((task, pool.submit(prepare, task)))
        if len(running) > ahead:
            first, future = running.popleft()
            yield first, future.result()
    for first, future in running:
        yield first, future.result()


@torch.no_grad()
def _encode(
    encoder: VisionEncoder, waiting: list[tuple[str, torch.Tensor, bool]], writer: FeatureWriter
) -> None:
    device = next(encoder.parameters()).device
    pixels = torch.cat([each for _, each, _ in waiting]).to(device)
    features = encoder(pixels).cpu().split([len(each) for _, each, _ in waiting])
    for (name, _, is_unusual), of_medium in zip(waiting, features, strict=True):
        writer.add(name, of_medium, is_unusual=is_unusual)
