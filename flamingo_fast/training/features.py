"""What a frozen vision encoder made of images and videos, on disk.

A folder is of one encoder, its weights, and the size and preprocessing of images; its name has the
encoder's, the size and a fingerprint. In it are files of safetensors with a few hundred entries
each. An entry's name is a hash of a medium's bytes and of how they are decoded, so that neither
datasets nor the names of their samples matter. A medium that can't be used has an entry that says
why.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.config import ConfigError, VisionConfig
from flamingo_fast.models.extras import require
from flamingo_fast.models.vision import data_config
from flamingo_fast.training.bad_samples import BadSample
from flamingo_fast.training.samples import Limits, Medium

_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
_OPEN_FILES = 64
_HEADER_BYTES = 8


class FeatureError(RuntimeError):
    """A medium without an entry, or a file that is none of features."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Of a medium.

    Attributes:
        features: (F, S, width).
        is_unusual: whether it had to be converted, see `DatasetConfig.unusual_images`.
    """

    features: torch.Tensor
    is_unusual: bool


def entry_name(medium: Medium, limits: Limits, num_frames: int) -> str:
    """Of a medium: a hash of its bytes, and of what decides how they are decoded."""
    frames = num_frames if medium.is_video else 0
    settings = f"{limits.max_image_pixels} {limits.unusual_images} {frames}\n"
    return hashlib.sha256(settings.encode() + medium.data).hexdigest()


def fingerprint(encoder: nn.Module) -> str:
    """Of a vision encoder's weights, in bf16: the same whether it was cast to that or not.

    Raises:
        ValueError: weights on "meta", which have no values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if tensor.is_meta:
            raise ValueError(f"encoder: expected weights with values, {name} is on meta")
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def folder_name(config: VisionConfig, encoder_fingerprint: str) -> str:
    """Of an encoder, its weights, and images as they become its input."""
    transform = json.dumps(data_config(config), sort_keys=True)
    digest = hashlib.sha256(f"{encoder_fingerprint}\n{transform}".encode()).hexdigest()[:16]
    return f"{_prefix(config)}{digest}"


def find_folder(
    root: str | Path, config: VisionConfig, encoder_fingerprint: str | None = None
) -> Path:
    """The folder of an encoder's features within `root`, or `root` itself if it is that.

    Arguments:
        encoder_fingerprint: `fingerprint` of the weights; None: there is a folder of one such
            encoder only.

    Raises:
        ConfigError: there is none, or several.
    """
    root = Path(root)
    again = "make them by `flamingo-fast data encode`"
    if not root.is_dir():
        raise ConfigError(f"datasets.features: there is no folder {root}: {again}")
    if encoder_fingerprint is not None:
        name = folder_name(config, encoder_fingerprint)
        found = [each for each in (root, root / name) if each.name == name and each.is_dir()]
        if not found:
            raise ConfigError(
                f"datasets.features: there are none of this vision encoder in {root}, expected "
                f"{name}: {again}"
            )
        return found[0]
    prefix = _prefix(config)
    if root.name.startswith(prefix):
        return root
    found = sorted(each for each in root.iterdir() if each.name.startswith(prefix))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise ConfigError(
            f"datasets.features: expected a folder {prefix}* in {root}, got {names}"
            + ("; name one of them" if found else f": {again}")
        )
    return found[0]


class FeatureCache(Mapping[str, dict[str, Any]]):
    """Entries of a folder: names, and what else is known of each.

    Can be forked and pickled.

    Arguments:
        folder: of `data encode`.

    Raises:
        FeatureError: a file in it that is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: list[Path] = []
        self._entries: dict[str, tuple[int, dict[str, Any]]] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            self._add(path)
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def _add(self, path: Path) -> None:
        self._files.append(path)
        for name, info in _read_entries(path).items():
            self._entries[name] = (len(self._files) - 1, info)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._entries[name][1]

    def load(self, medium: Medium, limits: Limits, num_frames: int) -> Features:
        """Features of a medium.

        Raises:
            BadSample: it can't be used.
            FeatureError: there is no entry of it.
        """
        name = entry_name(medium, limits, num_frames)
        if name not in self._entries:
            raise FeatureError(
                f"there are no features of {medium.member} in {self.folder}: run "
                "`flamingo-fast data encode` again"
            )
        file, info = self._entries[name]
        if "reason" in info:
            raise BadSample(info["reason"], info["detail"])
        if file not in self._open:
            self._open[file] = require("safetensors").safe_open(self._files[file], "pt")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return Features(self._open[file].get_tensor(name), info.get("is_unusual", False))


class FeatureWriter:
    """Adds entries to a folder, a file at a time; a file is there in full or not at all.

    Arguments:
        cache: of the folder, which exists; gets each file's entries when it is written.
        entries: of a file.
    """

    def __init__(self, cache: FeatureCache, entries: int = 256) -> None:
        self._cache, self._most = cache, entries
        self._tensors: dict[str, torch.Tensor] = {}
        self._infos: dict[str, dict[str, Any]] = {}
        # Of a run that was killed.
        for path in cache.folder.glob(f"*{_PARTIAL}"):
            path.unlink()

    def __contains__(self, name: str) -> bool:
        return name in self._infos or name in self._cache

    def add(self, name: str, features: torch.Tensor, *, is_unusual: bool) -> None:
        # A part of a batch would keep all of it, and safetensors wants none that share memory.
        self._tensors[name] = features.cpu().clone(memory_format=torch.contiguous_format)
        self._put(name, {"is_unusual": True} if is_unusual else {})

    def add_bad(self, name: str, error: BadSample) -> None:
        self._put(name, {"reason": error.reason, "detail": error.detail})

    def _put(self, name: str, info: dict[str, Any]) -> None:
        self._infos[name] = info
        if len(self._infos) >= self._most:
            self.flush()

    def flush(self) -> None:
        """Writes what was added.

        Raises:
            OSError: it can't be written.
        """
        if not self._infos:
            return
        # Of its entries, so that no two files have one name.
        digest = hashlib.sha256("".join(sorted(self._infos)).encode()).hexdigest()[:16]
        path = self._cache.folder / f"{digest}{_SUFFIX}"
        partial = path.with_name(path.name + _PARTIAL)
        try:
            require("safetensors.torch").save_file(
                self._tensors, partial, metadata={"entries": json.dumps(self._infos)}
            )
        except require("safetensors").SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"can't write {path}: {error}") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        self._cache._add(path)
        self._tensors, self._infos = {}, {}


def _prefix(config: VisionConfig) -> str:
    name = re.sub(r"[^\w.-]", "_", config.encoder)
    return f"{name}-{config.image_size}px-"


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Without its tensors."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_HEADER_BYTES), "little")
            size = os.fstat(file.fileno()).st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        if _HEADER_BYTES + length + max(ends, default=0) != size:
            raise ValueError("its end is missing")
        return json.loads(header["__metadata__"]["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise FeatureError(f"{path}: expected a file of features ({error})") from None
