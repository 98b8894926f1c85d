"""Table 3 of Flamingo (arXiv 2204.14198) measured: real training steps of its rows, made smaller.

A step is what `flamingo_fast.training` does: a batch of each dataset in the proportions of the
paper's ablations, gradients times lambda, AdamW, one update, or one for each dataset. Data are
random numbers of the shapes of real ones. A row's steps alternate with the baseline's, so that both
see the same machine, and each ratio is of neighbours.
"""

import csv
import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table

from flamingo_fast.bench.agreement import Agreement
from flamingo_fast.bench.table3 import BASELINE, CONTROLS, Prediction, ratios
from flamingo_fast.bench.table3_scales import WEIGHTS, Scale
from flamingo_fast.models import work
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.parallel import prepare
from flamingo_fast.training.step import TrainStep

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """Between which a median is, with the probability `confidence`."""

    low: float
    high: float
    confidence: float

    @classmethod
    def of_median(cls, samples: Sequence[float]) -> "Interval":
        """Of independent samples of any distribution: two of them, by their ranks.

        The narrowest with a confidence of 0.95, as near around the median as there is one; of
        fewer than six samples it is all of them, and less sure.
        """
        ordered, count = sorted(samples), len(samples)
        for skipped in range((count - 1) // 2, -1, -1):
            # The median is outside if at most `skipped` samples are on one of its sides.
            outside = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
            if 1 - outside >= _CONFIDENCE or not skipped:
                return cls(ordered[skipped], ordered[-1 - skipped], 1 - outside)
        raise ValueError("samples: expected at least one, got none")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A row's steps and those of the baseline that came with them, in seconds.

    Attributes:
        flops: of a step at this scale.
        baseline_flops: of the baseline's.
    """

    row: str
    seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]
    flops: int
    baseline_flops: int

    @property
    def ratios(self) -> list[float]:
        """Of the pairs: the row's time over the baseline's."""
        pairs = zip(self.seconds, self.baseline_seconds, strict=True)
        return [mine / baseline for mine, baseline in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> Interval:
        return Interval.of_median(self.ratios)

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.baseline_flops


def check_rows(rows: Iterable[str]) -> list[str]:
    """Those rows in the table's order, without the baseline; none given: all.

    Raises:
        ValueError: a row that there is not.
    """
    known, wanted = list(table3_configs()), list(rows)
    for row in wanted:
        if row not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}; got {row!r}")
    return [row for row in known if row != BASELINE and (not wanted or row in wanted)]


def measure(
    scale: Scale,
    rows: Sequence[str],
    pairs: int,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Measurement]:
    """Measures each of the rows against the baseline, one after the other.

    A pair is a step of the row and one of the baseline, in random order. On a GPU weights are bf16
    with fp32 master weights, as in the paper; on a CPU, which is slow in bf16, all is fp32.

    Raises:
        ValueError: pairs below 1.
        FloatingPointError: a loss or a gradient isn't finite.
    """
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    configs = {row: scale.config(config) for row, config in table3_configs().items()}
    timed = functools.partial(_timed, device=device, clock=clock)
    baseline = Step(configs[BASELINE], scale, device)
    timed(baseline)
    shuffle = random.Random(0).shuffle
    for row in rows:
        step = Step(configs[row], scale, device)
        # The baseline's caches are the other row's by now.
        for each in (step, baseline):
            timed(each)
        seconds: dict[str, list[float]] = {row: [], BASELINE: []}
        for _ in range(pairs):
            order = [(row, step), (BASELINE, baseline)]
            shuffle(order)
            for name, call in order:
                seconds[name].append(timed(call))
        yield Measurement(
            row,
            tuple(seconds[row]),
            tuple(seconds[BASELINE]),
            scale.flops(configs[row]).total,
            scale.flops(configs[BASELINE]).total,
        )


class Step:
    """A model with random weights, and its data; each call is a training step.

    Arguments:
        config: at this scale.

    Attributes:
        train_step: has the model.
        batches: of each dataset, or of each of its passes.
    """

    def __init__(self, config: FlamingoConfig, scale: Scale, device: torch.device) -> None:
        torch.manual_seed(0)
        model = Flamingo(config)
        precision = "bf16" if device.type == "cuda" else "fp32"
        prepare(model, ParallelConfig(fsdp=False), precision, device)
        passes = scale.passes(config)
        self.train_step = TrainStep(
            model,
            OptimizerConfig(),
            weights={name: WEIGHTS[name.partition(".")[0]] for name in passes},
            optimisation=config.optimisation,
        )
        self.batches = {
            name: synthetic_batch(config, sizes, device) for name, sizes in passes.items()
        }

    def __call__(self) -> None:
        """
        Raises:
            FloatingPointError: a loss or a gradient isn't finite: such a step makes no update.
        """
        if self.train_step(self.batches).skipped:
            raise FloatingPointError("a loss or a gradient is not finite")


def synthetic_batch(config: FlamingoConfig, sizes: work.Batch, device: torch.device) -> Batch:
    """Random text, pixels and places of media: an `<EOC>` before each but the first (section 2.4).

    Of several media, text attends to the next one in half of the samples (appendix A.3.2), unless
    the config says all.
    """
    generator = torch.Generator().manual_seed(0)
    samples, tokens, media = sizes.samples, sizes.tokens, sizes.media
    ids = torch.randint(
        config.image_token_id + 2, config.lm.vocab_size, (samples, tokens), generator=generator
    )
    # The first medium comes first; the others are where there is place for their `<EOC>` too.
    for row in ids:
        places = 2 * torch.randperm((tokens - 1) // 2, generator=generator)[: media - 1] + 2
        row[0] = row[places] = config.image_token_id
        if config.eoc_token_id is not None:
            row[places - 1] = config.eoc_token_id
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    labels[:, 0] = -100
    size = config.vision.image_size
    shape = (samples * media, sizes.frames, 3, size, size)
    attend = None
    if media > 1 and config.conditioning.attend == "previous":
        attend = ["next" if sample % 2 else "previous" for sample in range(samples)]
    batch = Batch(
        input_ids=ids,
        labels=labels,
        attention_mask=None,
        cu_seqlens=None,
        num_media=[media] * samples,
        attend=attend,
        pixels=torch.randn(shape, generator=generator),
        features=None,
        num_samples=samples,
    )
    return batch.to(device)


def _timed(call: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


_NOTES = (
    "measured: median of the ratios of paired steps; in brackets an interval of it, of ranks, with "
    "a confidence of {confidence:.0%}. s: median of the row's steps.",
    "flops here: predicted from the operations of these models; flops, flops + params: from those "
    "of the paper's, see table3 without --scale. No prediction knows of a measurement.",
    "laion and no_tanh_gating are the baseline's work: what they measure is noise, but for the "
    "gates.",
)


def render(
    measurements: Sequence[Measurement], predictions: Sequence[Prediction], scale: Scale
) -> Group:
    """A table for a terminal: printed, measured and predicted ratios, and what the scale changes.

    Raises:
        ValueError: no measurements.
    """
    if not measurements:
        raise ValueError("measurements: expected at least one, got none")
    predicted, by_row = ratios(predictions), {each.row: each for each in predictions}
    pairs = len(measurements[0].seconds)
    table = Table(
        title=f"Step time over the baseline's at scale {scale.name}, {pairs} pairs a row",
        title_justify="left",
    )
    table.add_column("row")
    table.add_column("change")
    for name in ("paper", "measured", "", "s", "flops here", "flops", "flops + params"):
        table.add_column(name, justify="right")
    for each in measurements:
        numbers, interval = predicted[each.row], each.interval
        table.add_row(
            each.row,
            by_row[each.row].change,
            f"{numbers.paper:.3f}",
            f"{each.ratio:.3f}",
            f"[{interval.low:.3f}, {interval.high:.3f}]".replace("[", "\\["),
            f"{statistics.median(each.seconds):.3f}",
            f"{each.flops_ratio:.3f}",
            f"{numbers.flops:.3f}",
            f"{numbers.flops_and_parameters:.3f}",
        )
    confidence = measurements[0].interval.confidence
    return Group(
        table,
        *(note.format(confidence=confidence) for note in _NOTES),
        *_agreement(measurements, predictions),
        *(f"{scale.name}, {line}" for line in scale.changes()),
    )


def _agreement(measurements: Sequence[Measurement], predictions: Sequence[Prediction]) -> list[str]:
    """How near the measured ratios are to others, over the rows that are not controls.

    Nor is a row among them whose printed time is multiplied, since it ran on more chips.
    """
    chips = {each.row: each.chips for each in predictions}
    rows = [each for each in measurements if each.row not in CONTROLS and chips[each.row] == 1]
    if len(rows) < 3:
        return []
    predicted = ratios(predictions)
    others = {
        "the paper's": [predicted[each.row].paper for each in rows],
        "flops here": [each.flops_ratio for each in rows],
    }
    measured = [each.ratio for each in rows]
    return [
        f"measured against {name}: {Agreement.of(measured, values)}."
        for name, values in others.items()
    ]


def write_csv(
    measurements: Iterable[Measurement], predictions: Sequence[Prediction], path: str | Path
) -> None:
    """A line for each row.

    Raises:
        OSError: the file can't be written.
    """
    predicted = ratios(predictions)
    fields = (
        *("row", "paper_ratio", "measured_ratio", "low", "high", "confidence", "pairs"),
        *("median_s", "baseline_median_s", "flops", "flops_here_ratio"),
        *("flops_ratio", "flops_and_parameters_ratio"),
    )
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        for each in measurements:
            numbers, interval = predicted[each.row], each.interval
            values = (
                *(numbers.paper, each.ratio, interval.low, interval.high, interval.confidence),
                len(each.seconds),
                statistics.median(each.seconds),
                statistics.median(each.baseline_seconds),
                each.flops,
                *(each.flops_ratio, numbers.flops, numbers.flops_and_parameters),
            )
            writer.writerow(
                [each.row, *(f"{v:.6g}" if isinstance(v, float) else v for v in values)]
            )
