"""What a run shows of itself, and the file of its metrics."""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from flamingo_fast.training.step import StepResult
from flamingo_fast.training.throughput import Amount


class Metrics:
    """A file of lines of JSON, each a dict with its "step".

    Arguments:
        path: of the file.
        step: that the run goes on from. Lines of later steps, which a run that was killed left
            there, are cut off, and so is a line that is not complete.
    """

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        self._path = Path(path)
        kept = []
        if self._path.exists():
            for line in self._path.read_bytes().splitlines(keepends=True):
                try:
                    values = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or values["step"] > step:
                    break
                kept.append(line)
        temporary = self._path.with_name(f".{self._path.name}")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, which is on the disk when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps(_finite(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


_OF_ALL_RANKS = ("loss_sums", "loss_tokens", "grad_norms", "finite_steps")


@dataclasses.dataclass
class Interval:
    """Sums over the steps since the last line of metrics. What is of all ranks goes to checkpoints.

    Attributes:
        loss_sums, loss_tokens: of each dataset, over its predicted tokens, of all ranks.
        grad_norms: sum of the finite ones; `finite_steps`: how many those are.
        amount: what was in this rank's batches.
        seconds: that steps took; `data_seconds` of them went by waiting for data.
        timed_steps: how many took them.
    """

    loss_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    loss_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    grad_norms: float = 0.0
    finite_steps: int = 0
    amount: Amount = Amount()
    seconds: float = 0.0
    data_seconds: float = 0.0
    timed_steps: int = 0

    def add(self, result: StepResult, amount: Amount) -> None:
        """A step, and what was in its batches."""
        self.timed_steps += 1
        self.amount += amount
        for name, tokens in result.loss_tokens.items():
            loss = result.losses[name] * tokens
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + loss
            self.loss_tokens[name] = self.loss_tokens.get(name, 0) + tokens
        if math.isfinite(result.grad_norm):
            self.grad_norms += result.grad_norm
            self.finite_steps += 1

    def losses(self) -> dict[str, float]:
        """Of each dataset the mean over its predicted tokens; NaN where there were none."""
        return {
            name: self.loss_sums[name] / tokens if tokens else math.nan
            for name, tokens in self.loss_tokens.items()
        }

    def grad_norm(self) -> float:
        """The mean of the finite ones; NaN where there were none."""
        return self.grad_norms / self.finite_steps if self.finite_steps else math.nan

    def state(self) -> dict[str, Any]:
        """What a run that goes on needs to write the same next line."""
        return {name: getattr(self, name) for name in _OF_ALL_RANKS}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Interval":
        """Of what `state` returned; time and what is measured by it start anew."""
        return cls(**{name: state[name] for name in _OF_ALL_RANKS})


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU; of a CPU, that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(line: Mapping[str, Any], steps: int) -> str:
    """A line of metrics as text."""
    parts = [f"step {line['step']} of {steps}"]
    parts.append("loss " + ", ".join(f"{name} {x:.4f}" for name, x in line["loss"].items()))
    parts.append(f"grad norm {line['grad_norm']:.3g}")
    parts += [f"{value} {unit}".strip() for _, value, unit in _speeds(line)]
    parts += _warnings(line)
    return " | ".join(parts)


def _speeds(line: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    speed = line["speed"]
    left = datetime.timedelta(seconds=round(speed["seconds_left"]))
    return [
        ("tokens/s", _short(speed["tokens_per_second"]), "tokens/s"),
        ("images/s", _short(speed["images_per_second"]), "images/s"),
        ("MFU", f"{speed['mfu']:.1%}", "MFU"),
        ("memory", f"{speed['peak_memory_bytes'] / 1e9:.2f} GB", ""),
        ("time left", str(left), "left"),
    ]


def _warnings(line: Mapping[str, Any]) -> list[str]:
    found = []
    if line["skipped"]:
        found.append(f"{line['skipped']} updates skipped: NaN or infinity")
    for name, counts in line["bad_samples"].items():
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            found.append(f"bad samples in {name}: {reasons}")
    if line["speed"]["data_share"] > 0.2:
        found.append(f"{line['speed']['data_share']:.0%} of the time waits for data")
    return found


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.1f}"


class Progress:
    """Shows a run: a bar and a table where there is a terminal, otherwise a line now and then.

    Arguments:
        console: where; None: nowhere, as on ranks but the first.
        steps: of the run.
        step: that it starts from.
    """

    def __init__(self, console: Console | None, steps: int, step: int = 0) -> None:
        self._console, self._steps = console, steps
        self._line: Mapping[str, Any] | None = None
        self._live: Live | None = None
        if console is not None and console.is_terminal:
            self._bar = Bar(
                TextColumn("step"), BarColumn(None), MofNCompleteColumn(), console=console
            )
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._live = Live(self._table(), console=console, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """A step was made."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)

    def show(self, line: Mapping[str, Any]) -> None:
        """A line of metrics."""
        self._line = line
        if self._live is not None:
            self._live.update(self._table())
        else:
            self.say(describe(line, self._steps))

    def say(self, text: str) -> None:
        """Something that stays."""
        if self._console is not None:
            # Names of datasets and paths aren't markup, and a log isn't folded.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        if self._line is None:
            return self._bar
        losses = Table("dataset", "loss", "bad samples", expand=True)
        for name, loss in self._line["loss"].items():
            counts = self._line["bad_samples"].get(name, {})
            bad = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            losses.add_row(escape(name), f"{loss:.4f}", bad)
        speeds = _speeds(self._line)
        speeds.insert(0, ("grad norm", f"{self._line['grad_norm']:.3g}", ""))
        numbers = Table(*(name for name, _, _ in speeds), expand=True)
        numbers.add_row(*(value for _, value, _ in speeds))
        notes = [each for each in _warnings(self._line) if not each.startswith("bad samples")]
        return Group(losses, numbers, *notes, self._bar)
