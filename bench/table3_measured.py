"""Table 3 of Flamingo (arXiv 2204.14198) measured: real training steps of its rows, made smaller.

A step is what `flamingo_fast.training` does: a batch of each dataset in the proportions of the
paper's ablations, gradients times lambda, AdamW, one update, or one for each dataset. A row's steps
alternate with the baseline's, so that both see the same machine, and each ratio is of neighbours.
"""

import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo_fast import reference
from flamingo_fast.bench.run import peak_bytes
from flamingo_fast.bench.table3 import BASELINE, EXTRA
from flamingo_fast.bench.table3_data import RealData
from flamingo_fast.bench.table3_parts import part_seconds
from flamingo_fast.bench.table3_scales import Scale
from flamingo_fast.bench.table3_steps import Step, precision_of
from flamingo_fast.bench.timing import Interval
from flamingo_fast.models.params import read_table3
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.work import Flops
from flamingo_fast.ops.dispatch import use_impl
from flamingo_fast.testing import eager

# Bytes of two of the paper's models with fp32 master weights, and of their steps.
_TWO_MODELS = 70e9

IMPLS = ("auto", "reference", "peer")
"""Ops of a step: ours; the reference's, of PyTorch's; OpenFlamingo's compositions."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A row's steps and those of the baseline that came with them, in seconds.

    Attributes:
        scale, precision: see `table3_scales` and `table3_steps.PRECISIONS`.
        is_alone: the baseline's steps came before the row's, as one model alone fits in memory.
        data: a folder of real samples; empty: synthetic ones.
        impl: of `other_seconds`, steps of the same row in the same rounds with other ops.
        flops: of a step at this scale, by part; `baseline_flops`: of the baseline's.
        parts: seconds of each, of other steps, see `table3_parts.part_seconds`.
        static_bytes: weights and the optimiser's state.
        step_bytes: what a step holds beside them at most.
    """

    row: str
    seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]
    flops: Flops
    baseline_flops: Flops
    scale: str = ""
    precision: str = ""
    is_alone: bool = False
    impl: str = "auto"
    data: str = ""
    other_seconds: tuple[float, ...] = ()
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    baseline_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    static_bytes: int = 0
    step_bytes: int = 0

    @property
    def ratios(self) -> list[float]:
        """Of the pairs: the row's time over the baseline's."""
        return _ratios(self.seconds, self.baseline_seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> Interval:
        return Interval.of_median(self.ratios)

    @property
    def speedups(self) -> list[float]:
        """Of the pairs: the time with other ops over ours; none if there are none."""
        return _ratios(self.other_seconds, self.seconds) if self.other_seconds else []

    @property
    def flops_ratio(self) -> float:
        return self.flops.total / self.baseline_flops.total

    @property
    def peak_bytes(self) -> int:
        return self.static_bytes + self.step_bytes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measurement":
        """What `to_dict` gave, by way of JSON or not.

        Raises:
            TypeError: it is of another version.
        """
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        for name in ("flops", "baseline_flops"):
            values[name] = Flops(**values.pop(name))
        return cls(**values)


def _ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def check_rows(rows: Iterable[str]) -> list[str]:
    """Those rows in the table's order; none given: table 3's own 18, without other tables'.

    Raises:
        ValueError: a row that there is not.
    """
    known, wanted = list(table3_configs()), list(rows)
    for row in wanted:
        if row not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}; got {row!r}")
    own = [each["row"] for each in read_table3() if each["group"] != EXTRA]
    return [row for row in known if row in (wanted or own)]


@dataclasses.dataclass
class Session:
    """What is measured, and how.

    Attributes:
        pairs: of each row.
        impl: other ops whose steps are timed, too.
        data: real samples; None: synthetic ones.
        progress: is told a row and how many of all steps were made.
        clock: seconds.
    """

    scale: Scale
    rows: Sequence[str]
    pairs: int
    device: torch.device
    impl: str = "auto"
    data: RealData | None = None
    progress: Callable[[str, int], None] = lambda row, steps: None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: pairs below 1; an impl that there is not.
        """
        if self.pairs < 1:
            raise ValueError(f"pairs: expected at least 1, got {self.pairs}")
        if self.impl not in IMPLS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLS)}; got {self.impl!r}")
        self.configs = {row: self.scale.config(each) for row, each in table3_configs().items()}
        if self.data is not None:
            self.configs = {row: self.data.config(each) for row, each in self.configs.items()}
        self._done = 0

    @property
    def is_alone(self) -> bool:
        """Whether one model is all that fits in memory."""
        if self.scale.name != "full":
            return False
        if self.device.type != "cuda":
            return True
        return torch.cuda.get_device_properties(self.device).total_memory < _TWO_MODELS

    @property
    def total_steps(self) -> int:
        kinds = 3 if self.impl != "auto" else 2
        if self.is_alone:
            others = len([row for row in self.rows if row != BASELINE])
            return (1 + others) * ((kinds - 1) * (self.pairs + 1) + 1)
        # The baseline's first steps; of a row the first of each, pairs, and two of its parts.
        return 3 + len(self.rows) * (kinds * (self.pairs + 1) + 2)

    def run(self) -> Iterator[Measurement]:
        """Measures each of the rows, one after the other.

        Raises:
            FloatingPointError: a loss or a gradient isn't finite.
        """
        if self.is_alone:
            yield from self._run_alone()
            return
        baseline = self._step(BASELINE)
        self._timed(baseline, BASELINE)
        base_parts = self._parts(baseline, BASELINE)
        shuffle = random.Random(0).shuffle
        for row in self.rows:
            yield self._beside(baseline, base_parts, row, shuffle)

    def _beside(
        self,
        baseline: Step,
        base_parts: Mapping[str, float],
        row: str,
        shuffle: Callable[[list[Any]], None],
    ) -> Measurement:
        """A row in turns with the baseline; its models are gone afterwards."""
        step = self._step(row)
        calls: dict[str, Callable[[], None]] = {"row": step, "baseline": baseline}
        if self.impl != "auto":
            calls["other"] = _with_ops(self.impl, self._step(row))
        step_bytes = self._step_bytes(step, row)
        # The baseline's caches are the other row's by now.
        for name, call in calls.items():
            if name != "row":
                self._timed(call, row)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.pairs):
            order = list(calls.items())
            shuffle(order)
            for name, call in order:
                seconds[name].append(self._timed(call, row))
        others = tuple(seconds.get("other", ()))
        return self._measurement(
            row, step, step_bytes, seconds["row"], seconds["baseline"], base_parts, others
        )

    def _run_alone(self) -> Iterator[Measurement]:
        baseline = self._alone(BASELINE, None)
        if BASELINE in self.rows:
            yield baseline
        for row in self.rows:
            if row != BASELINE:
                yield self._alone(row, baseline)

    def _alone(self, row: str, baseline: Measurement | None) -> Measurement:
        """A row after the baseline, and its steps with other ops after its own."""
        step = self._step(row)
        calls: list[Callable[[], None]] = [
            step,
            *([_with_ops(self.impl, step)] if self.impl != "auto" else []),
        ]
        step_bytes = self._step_bytes(step, row)
        times: list[list[float]] = []
        for call in calls:
            if call is not step:
                self._timed(call, row)
            times.append([self._timed(call, row) for _ in range(self.pairs)])
        seconds, others = times[0], tuple(itertools.chain(*times[1:]))
        if baseline is None:
            return self._measurement(row, step, step_bytes, seconds, seconds, None, others)
        return self._measurement(
            row, step, step_bytes, seconds, baseline.seconds, baseline.parts, others
        )

    def _measurement(
        self,
        row: str,
        step: Step,
        step_bytes: int,
        seconds: Sequence[float],
        baseline_seconds: Sequence[float],
        baseline_parts: Mapping[str, float] | None,
        other_seconds: tuple[float, ...] = (),
    ) -> Measurement:
        parts = self._parts(step, row)
        return Measurement(
            row=row,
            seconds=tuple(seconds),
            baseline_seconds=tuple(baseline_seconds),
            flops=self.scale.flops(self.configs[row]),
            baseline_flops=self.scale.flops(self.configs[BASELINE]),
            scale=self.scale.name,
            precision=precision_of(self.scale, self.device),
            is_alone=self.is_alone,
            impl=self.impl,
            data="" if self.data is None else str(self.data),
            other_seconds=other_seconds,
            parts=parts,
            baseline_parts=parts if baseline_parts is None else baseline_parts,
            static_bytes=step.static_bytes(),
            step_bytes=step_bytes,
        )

    def _step(self, row: str) -> Step:
        config = self.configs[row]
        batches = None if self.data is None else self.data.batches(config)
        return Step(config, self.scale, self.device, batches=batches)

    def _step_bytes(self, step: Step, row: str) -> int:
        """Of the row's first step, which makes it warm."""
        found = peak_bytes(step, self.device)
        self._count(row)
        return found

    def _parts(self, step: Step, row: str) -> dict[str, float]:
        repeats = 1 if self.is_alone else 2
        found = part_seconds(step, repeats)
        self._count(row, repeats)
        return found

    def _timed(self, call: Callable[[], None], row: str) -> float:
        start = self.clock()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = self.clock() - start
        self._count(row)
        return seconds

    def _count(self, row: str, steps: int = 1) -> None:
        self._done += steps
        self.progress(row, self._done)


def _with_ops(impl: str, step: Step) -> Callable[[], None]:
    """Its steps with other ops than ours."""

    def call() -> None:
        with use_impl("reference"), contextlib.ExitStack() as stack:
            if impl == "peer":
                stack.enter_context(_peers_ops())
            step()

    return call


@contextlib.contextmanager
def _peers_ops() -> Iterator[None]:
    """The reference's ops that have another composition in OpenFlamingo are that."""
    names = ("squared_relu", "gated_residual", "masked_cross_attention", "latent_attention")
    originals = {name: getattr(reference, name) for name in names}
    for name in names:
        setattr(reference, name, _as_reference(getattr(eager, name)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(reference, name, original)


def _as_reference(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Called as the reference is: what is an option there comes by position."""
    if function is eager.masked_cross_attention:

        def attention(*args: Any) -> torch.Tensor:
            *tensors, unattended, past_last, softmax_scale = args
            return eager.masked_cross_attention(
                *tensors,
                unattended=unattended,
                past_last=past_last,
                softmax_scale=softmax_scale,
            )

        return attention
    if function is eager.latent_attention:

        def latent(*args: Any) -> torch.Tensor:
            *tensors, media_seqlens, softmax_scale = args
            return eager.latent_attention(
                *tensors, media_seqlens=media_seqlens, softmax_scale=softmax_scale
            )

        return latent
    return function


class Store:
    """Measurements in a file, a line for each row, so that a run that was stopped can go on.

    Arguments:
        path: of the file, .jsonl.
        about: what they depend on beside the row, such as machine and commit.
        resume: whether to keep what the file has.

    Raises:
        OSError: the file can't be removed.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path, self._about = path, json.loads(json.dumps(about))
        if not resume:
            path.unlink(missing_ok=True)

    def add(self, measurement: Measurement) -> None:
        """
        Raises:
            OSError: the file can't be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # First an end of line: of the last one that may have been cut off.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"about": self._about, **measurement.to_dict()}) + "\n")

    def read(self) -> dict[str, Measurement]:
        """By row, those with the same `about`; a last line that was cut off is left out.

        Raises:
            OSError: the file can't be read.
        """
        found: dict[str, Measurement] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                if values.pop("about") == self._about:
                    each = Measurement.from_dict(values)
                    found[each.row] = each
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
                continue
        return found
