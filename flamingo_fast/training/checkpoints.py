"""Checkpoints of a run: torch.distributed.checkpoint in folders that appear only when complete.

A checkpoint of step 20 is the folder step-00000020, with extra.json and, in state/, the tensors as
`torch.distributed.checkpoint` writes them: a file for each rank, which any number of ranks can
load. Whoever kills a run at any moment leaves the last complete one: a checkpoint is written, and
synced to the disk, under another name, and renamed when all is there.

All ranks have to see the same folder.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from flamingo_fast.models.saving import CheckpointError, some_of
from flamingo_fast.training.pieces import checkpointable

_T = TypeVar("_T")

_EXTRA = "extra.json"
_STATE = "state"
_COMPLETE = re.compile(r"step-(\d{8,})")
# Complete, and only to be read where the one that takes its place isn't there (yet).
_REPLACED = re.compile(r"\.replaced-step-(\d{8,})")
_PARTIAL = (".saving-", ".removing-")


class SaveError(OSError):
    """A checkpoint that could not be written; says of which step, where and why."""


class Checkpoints:
    """The checkpoints of a run.

    With torch.distributed initialised, all ranks call each method, with the same arguments; what
    goes wrong on one is raised on all. Nothing is written before the first `save` or `clean`.

    Arguments:
        folder: made if it is not there.
        keep: of the last checkpoints; older ones are removed after a newer one is there, so that
            the disk needs place for one more.

    Raises:
        ValueError: keep below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """The folders of complete checkpoints, by step."""
        return list(self._by_step().values())

    def latest(self) -> Path | None:
        """The last of them; None: there is none."""
        return on_first_rank(lambda: next(reversed(self._by_step().values()), None))

    def clean(self) -> None:
        """Removes what saves that were killed left.

        `save` does it first of all, too. Not while another process saves to the folder.

        Raises:
            SaveError: it can't be removed.
        """
        with self._errors("can't clean"):
            on_first_rank(self._clean)

    def save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then removes old ones; returns its folder.

        One of the same step is replaced, and there until it is.

        Arguments:
            step: how many were made.
            state: tensors, DTensors among them, by name, in dicts as deep as you like. A DTensor is
                written by the ranks that have its shards, other tensors by one of the ranks.
            extra: what else there is, of which JSON keeps all: keys of dicts are strings, and
                tuples become lists. The first rank's is written.

        Raises:
            SaveError: it could not be written, such as on a full disk. Nothing of it stays, and all
                earlier checkpoints do.
            TypeError: a value of state that isn't a tensor, or of extra that JSON doesn't have.
            ValueError: step below 0.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        tensors = _flattened(state)
        final = self.folder / f"step-{step:08}"
        partial = self.folder / f".saving-{final.name}"

        def begin() -> None:
            # Before all: what JSON doesn't have should not cost the time of a checkpoint.
            text = json.dumps({"step": step, "extra": extra})
            self._clean()
            partial.mkdir(parents=True)
            _write(partial / _EXTRA, text)

        def finish() -> None:
            for folder in (partial / _STATE, partial):
                _sync(folder)
            replaced = self.folder / f".replaced-{final.name}"
            # A folder can't take the place of another one in one go.
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            _sync(self.folder)
            if replaced.exists():
                shutil.rmtree(replaced)
            for old in self.all()[: -self.keep]:
                _remove(old)

        with self._errors(f"can't save step {step}"):
            try:
                on_first_rank(begin)
                _dcp_save(tensors, partial / _STATE)
                on_first_rank(finish)
            except BaseException:
                if is_first_rank():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        return final

    def extra(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The `extra` of the save, of the checkpoint `path`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: a broken file.
        """
        return on_first_rank(lambda: _read_extra(Path(path)))

    def load(
        self,
        state: Mapping[str, Any],
        path: str | os.PathLike[str] | None = None,
        *,
        partial: bool = False,
    ) -> dict[str, Any]:
        """Fills the tensors of `state` in place; returns the `extra` of the save.

        Arguments:
            state: as `save` takes it, from the model as it is now: on any number of ranks, and
                sharded as they are.
            path: of a checkpoint; by default the latest.
            partial: whether the checkpoint may have more than `state`.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: names, shapes or dtypes other than the checkpoint's, or a broken file.
                In the first case nothing was loaded.
        """
        folder = self.latest() if path is None else Path(path)
        if folder is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        tensors = _flattened(state)

        def begin() -> tuple[dict[str, Any], dict[str, str]]:
            extra = _read_extra(folder)
            try:
                saved = _Reader(folder / _STATE).read_metadata().state_dict_metadata
                return extra, {str(name): _described(each) for name, each in saved.items()}
            # A broken pickle makes it raise nearly anything, or is of other things.
            except Exception as error:
                raise CheckpointError(f"{folder}: broken checkpoint ({_one_line(error)})") from None

        extra, saved = on_first_rank(begin)
        if partial:
            saved = {name: each for name, each in saved.items() if name in tensors}
        _check_same(folder, tensors, saved)
        try:
            with _one_process_is_meant():
                dcp.load(tensors, storage_reader=_Reader(folder / _STATE))
        except CheckpointException as error:
            reason = _one_line(_failure(error))
            raise CheckpointError(f"{folder}: broken checkpoint ({reason})") from None
        return extra

    def _by_step(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        found = {}
        # A pattern that comes later wins.
        for pattern in (_REPLACED, _COMPLETE):
            for path in self.folder.iterdir():
                if match := pattern.fullmatch(path.name):
                    found[int(match[1])] = path
        return dict(sorted(found.items()))

    def _clean(self) -> None:
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            if path.name.startswith(_PARTIAL):
                shutil.rmtree(path)
            elif _REPLACED.fullmatch(path.name):
                final = path.with_name(path.name.removeprefix(".replaced-"))
                if final.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(final)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns those of the system into one, which says what was done where."""
        try:
            yield
        except OSError as error:
            raise SaveError(f"{what} in {self.folder}: {_one_line(error)}") from error


class _Writer(FileSystemWriter):
    def write_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().write_data(*arguments, **options)
        except RuntimeError as error:
            # torch.save says of a full disk that its position in the file isn't what it should be.
            # The context, where the system's error is, doesn't survive the way to other ranks.
            raise _system_error(error) or error from None


class _Reader(FileSystemReader):
    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Of torch.distributed.checkpoint's metadata: a pickle, which otherwise may run any code."""

    _ALLOWED = frozenset(
        [
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not of a checkpoint")


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without the warning that torch.distributed isn't initialised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _dcp_save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        with _one_process_is_meant():
            dcp.save(tensors, storage_writer=_Writer(folder))
    except CheckpointException as error:
        raise _failure(error) from None


def _failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks where something did."""
    return error.failures[min(error.failures)][0]


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _check_same(
    folder: Path, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, str]
) -> None:
    missing = [name for name in tensors if name not in saved]
    if missing:
        raise CheckpointError(f"{folder}: expected {some_of(missing)}, which are not in it")
    unknown = [name for name in saved if name not in tensors]
    if unknown:
        raise CheckpointError(f"{folder}: has {some_of(unknown)}, which are not of this run")
    for name, tensor in tensors.items():
        if saved[name] != (expected := f"{tuple(tensor.shape)} {tensor.dtype}"):
            raise CheckpointError(f"{folder}: {name}: expected {expected}, got {saved[name]}")


def _described(saved: Any) -> str:
    if not isinstance(saved, TensorStorageMetadata):
        return "no tensor"
    return f"{tuple(saved.size)} {saved.properties.dtype}"


def _flattened(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = _flattened(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            inner = {name: checkpointable(value)}
        else:
            raise TypeError(f"state: {name}: expected a tensor, got {type(value).__name__}")
        if twice := found.keys() & inner.keys():
            raise ValueError(f"state: expected different names, got {sorted(twice)[0]} twice")
        found |= inner
    return found


def _read_extra(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint {folder}")
    try:
        extra: dict[str, Any] = json.loads((folder / _EXTRA).read_text())["extra"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder}: broken checkpoint ({_one_line(error)})") from None
    return extra


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Of a folder: the names in it, without which its files are lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Under another name first, so that half of it is never taken for all."""
    removing = path.with_name(f".removing-{path.name}")
    path.rename(removing)
    shutil.rmtree(removing)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first_rank() -> bool:
    """Whether this process is the first of all, or the only one."""
    return not _is_distributed() or dist.get_rank() == 0


def on_first_rank(action: Callable[[], _T]) -> _T:
    """What it returns there, on all ranks; they all raise what it raises, too.

    Both are pickled.
    """
    outcome: list[Any] = [None, None]
    if is_first_rank():
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if _is_distributed():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _one_line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason.strip().partition("\n")[0]
