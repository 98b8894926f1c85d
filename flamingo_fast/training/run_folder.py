"""The folder of a run: who may write there, what an earlier run left, and whether it fits."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.training.config import TrainConfig
from flamingo_fast.training.model_source import CHECKPOINTS, ModelSource

METRICS = "metrics.jsonl"
MODEL = "model"
BAD_SAMPLES = "bad_samples.json"
_LOCK = ".lock"

# Fields that may be others when a run goes on: what is computed stays the same but for rounding.
# What is in shards and in a folder of features is known by its own names.
_FREE = frozenset(
    "steps out tokenizer checkpoint_every keep_checkpoints log_every num_workers device "
    "micro_batch_size parallel shards features max_bad_rate".split()
)
# Those that may where the user says so: the state of the run fits all the same.
_ACCEPTABLE = frozenset(
    "optimizer optimisation precision weight augment space_probability max_images num_frames "
    "max_text_chars max_image_pixels unusual_images".split()
)


class Lock:
    """Keeps other processes out of a folder, until it is closed or this one ends.

    Raises:
        OSError: another has it, or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / _LOCK).open("w")
        except OSError as error:
            raise OSError(f"out: can't write {folder}: {error.strerror}") from None
        try:
            import fcntl
        except ImportError:
            # Windows has other locks.
            return
        # Not flock: a data worker that outlives the run for a second would keep that.
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise OSError(f"out: another run writes to {folder}") from None
        except OSError:
            # A file system without locks.
            pass

    def close(self) -> None:
        """Lets others in."""
        self._file.close()


def remove_run(folder: Path) -> None:
    """What `train` writes; other files stay."""
    for name in (CHECKPOINTS, MODEL):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in (METRICS, BAD_SAMPLES):
        (folder / name).unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """In place of what is there, whole at any moment."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(temporary, path)


def recorded(config: TrainConfig, source: ModelSource) -> dict[str, Any]:
    """The config as plain values, for checkpoints.

    `model` is the path that `source` found, or the fields of the file that it names.
    """
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    if source.path is not None and isinstance(config.model, str):
        values["model"] = str(source.path.resolve())
    return values | {"model": _anywhere(values["model"])}


def _anywhere(model: Any) -> Any:
    """What names the same model from any folder, and shows where its file is another one."""
    if isinstance(model, dict) and "folder" in model:
        return model | {"folder": str(Path(str(model["folder"])).resolve())}
    if isinstance(model, str) and Path(model).is_file():
        return json.loads(FlamingoConfig.from_file(model).to_json())
    return model


def check_same_run(
    earlier: Mapping[str, Any], now: Mapping[str, Any], accept_changes: bool = False
) -> None:
    """Whether a run of the config `now` may go on from a checkpoint of `earlier`.

    Raises:
        ConfigError: the fields that are others, by name, and what they were.
    """
    old, new = dict(_flat(earlier)), dict(_flat(now))
    # A run of before fields were recorded has the name of their file.
    old["model"] = _anywhere(old["model"])
    # Of fields that another version had there is nothing to compare.
    common = [name for name in old if name in new]
    changed = [name for name in common if old[name] != new[name] and not _is_of(name, _FREE)]
    if accept_changes:
        changed = [name for name in changed if not _is_of(name, _ACCEPTABLE)]
    if not changed:
        return
    name = changed[0]
    others = f"; so are {', '.join(changed[1:4])}" if changed[1:] else ""
    ways = "another out, or --fresh to start over"
    if all(_is_of(each, _ACCEPTABLE) for each in changed):
        ways = f"--accept-changes to go on all the same, {ways}"
    raise ConfigError(
        f"{name}: expected {old[name]!r}, of the checkpoint that is gone on from, got "
        f"{new[name]!r}{others}. Put it back, or give {ways}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path == "datasets":
            yield path, [each["name"] for each in value]
            for each in value:
                yield from _flat(each, f"datasets.{each['name']}.")
        # A model's fields as they are: they say one thing together.
        elif isinstance(value, Mapping) and path != "model":
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _is_of(path: str, names: frozenset[str]) -> bool:
    first, _, rest = path.partition(".")
    if first == "datasets" and rest:
        # A dataset's name may have dots.
        return path.rpartition(".")[2] in names
    return first in names
