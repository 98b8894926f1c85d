"""What a stage of `accept` is given: where it runs, for how long, and how it tells what it found.

What is told is a line of JSON at once in a file, so that it is there whatever comes after.
"""

import contextlib
import dataclasses
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flamingo_fast.errors import one_line
from flamingo_fast.ops.dispatch import BackendUnavailableError

_OWN = "flamingo_fast"


class Skip(Exception):
    """What is to be checked can't be here; the message says why."""


class OutOfTimeError(Exception):
    """`Context.limit` ended."""


class BrokenDeviceError(RuntimeError):
    """A CUDA error after which nothing works in this process."""


def _missing_package(error: BaseException) -> str | None:
    """The module whose absence caused `error`; None if that is not what happened."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return cause.name
        cause = cause.__cause__ or cause.__context__
    return None


def missing(error: ImportError) -> tuple[str, str]:
    """Status and reason: what isn't installed is skipped, what is ours must be there."""
    package = _missing_package(error)
    if package is None:
        return "failed", one_line(error)
    if package.partition(".")[0] == _OWN:
        return "failed", f"missing {package}, a part of this project"
    return "skipped", f"missing {package.partition('.')[0]}"


@dataclasses.dataclass
class Context:
    """
    Attributes:
        quick: whether shapes are to be small and rounds few.
        work: an empty folder.
        events: the file that is told.
        deadline: of `time.monotonic`, when the process is ended.
        shard, num_shards: processes share the stage's cases: this one takes each
            `num_shards`-th from `shard` on.
    """

    device: torch.device
    quick: bool
    work: Path
    events: Path
    deadline: float
    shard: int = 0
    num_shards: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def tell(self, kind: str, **values: Any) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        print(f"{'passed' if holds else 'FAILED'}: {name}: {detail}", flush=True)
        self.tell("check", name=name, status="passed" if holds else "failed", detail=detail)

    def skip(self, name: str, reason: str) -> None:
        print(f"skipped: {name}: {reason}", flush=True)
        self.tell("check", name=name, status="skipped", detail=reason)

    def row(self, title: str, headers: Sequence[str], cells: Sequence[object]) -> None:
        """Of the table of that title."""
        self.tell("row", title=title, headers=list(headers), cells=[*map(str, cells)])

    def not_exercised(self, what: str) -> None:
        """What of the stage this device can't show."""
        self.tell("not_exercised", text=what)

    def keep(self, path: Path, name: str) -> None:
        """A file of `work` that is to be kept, if there is room; may still change."""
        self.tell("file", path=str(path), name=name)

    def note(self, text: str) -> None:
        """What of the stage was not done, though nothing failed."""
        print(text, flush=True)
        self.tell("note", text=text)

    def mine(self, cases: Sequence[Any]) -> list[Any]:
        """The cases of this process."""
        return list(cases[self.shard :: self.num_shards])

    def attempt(self, name: str, function: Callable[[], str | None]) -> bool:
        """A check that holds if `function` returns, by default its detail; whether it did not fail.

        Raises:
            BrokenDeviceError: nothing works after its CUDA error.
        """
        print(f"{name} ...", flush=True)
        try:
            self.check(name, True, function() or "")
            return True
        except (Skip, BackendUnavailableError) as error:
            self.skip(name, str(error))
            return True
        except OutOfTimeError:
            raise
        # Whatever it raises is what a reader wants to see; the other checks come next.
        except Exception as error:
            detail = str(error) if isinstance(error, AssertionError) else one_line(error)
            if isinstance(error, ImportError):
                status, detail = missing(error)
                if status == "skipped":
                    self.skip(name, detail)
                    return True
            traceback.print_exc()
            self.check(name, False, detail)
            self._check_device(error)
            return False

    def _check_device(self, error: BaseException) -> None:
        try:
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
        except RuntimeError as broken:
            raise BrokenDeviceError(f"the device is lost: {one_line(broken)}") from error

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raises OutOfTimeError inside, once `seconds` have passed or the stage is about to end."""
        seconds = min(seconds, self.seconds_left - 5)
        if seconds <= 0:
            raise OutOfTimeError("no time is left")

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTimeError(f"not done in {seconds:.0f} s")

        earlier = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
