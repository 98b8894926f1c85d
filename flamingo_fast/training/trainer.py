"""A run: model, streams, steps, checkpoints and metrics, from a config to a trained model."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.fields import ConfigError
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.ranges import span
from flamingo_fast.training.bad_samples import REASONS, BadSamplesError, Outcomes
from flamingo_fast.training.checkpoints import Checkpoints, on_first_rank
from flamingo_fast.training.config import DTYPES, DatasetConfig, TrainConfig
from flamingo_fast.training.export import export
from flamingo_fast.training.features import find_folder, fingerprint
from flamingo_fast.training.model_source import (
    CHECKPOINTS,
    find_source,
    load_tokenizer,
    make_model,
    make_processor,
    random_parts,
)
from flamingo_fast.training.optimizer import warm_up
from flamingo_fast.training.parallel import init_distributed, make_ranks, prepare
from flamingo_fast.training.progress import Interval, Metrics, Progress, peak_memory
from flamingo_fast.training.run_folder import (
    BAD_SAMPLES,
    METRICS,
    MODEL,
    Lock,
    check_same_run,
    recorded,
    remove_run,
    write_json,
)
from flamingo_fast.training.step import TrainStep
from flamingo_fast.training.stream import Stream, make_stream, merge_states
from flamingo_fast.training.throughput import Amount, WorkCounter, peak_flops, utilisation


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: that were made in all.
        is_complete: whether those are all; if not, a signal stopped it.
        model: folder of the trained model; None: the run isn't complete.
        checkpoint: the last one; None: it was stopped before the first step.
    """

    steps: int
    is_complete: bool
    model: Path | None
    checkpoint: Path | None


def train(
    config: TrainConfig,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
    watch: Callable[[Flamingo], contextlib.AbstractContextManager[Any]] | None = None,
) -> RunResult:
    """Trains a model, in one process or in those of torchrun.

    Goes on from the last complete checkpoint in `config.out`, if there is one, with the losses and
    the data that there would have been without the break. SIGTERM and SIGINT let a step end, write
    a checkpoint and end the run; a second SIGINT ends it at once.

    Arguments:
        config: of the run. `out` gets checkpoints/, metrics.jsonl, bad_samples.json and model/.
        fresh: removes those of an earlier run first.
        accept_changes: goes on though optimizer, weights and such are not the checkpoint's.
        console: where the first rank shows progress; None: nowhere.
        watch: of the model that is trained, entered before the first step and left after the last,
            such as `flamingo_fast.profiling.annotate.annotate`.

    Raises:
        ConfigError: a field, by name; also one that isn't the checkpoint's.
        BadSamplesError: too many bad samples; a checkpoint was written.
        SaveError: a checkpoint can't be written; earlier ones are still there.
        CheckpointError: a checkpoint or weights that are broken, or not of this model.
        FeatureError: a broken file of features.
        StreamError: a dataset that can't be read on.
        OSError: `out` can't be written, or another run has it.
    """
    with contextlib.ExitStack() as resources:
        stop = resources.enter_context(_stop_by_signal())
        device = resources.enter_context(_distributed(config))
        run = _Run(config, device, stop, resources, fresh, accept_changes, console)
        if watch is not None:
            resources.enter_context(watch(run.model))
        return run()


class _Run:
    """A run on this rank."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        stop: threading.Event,
        resources: contextlib.ExitStack,
        fresh: bool,
        accept_changes: bool,
        console: Console | None,
    ) -> None:
        self._config, self._device, self._stop = config, device, stop
        self._resources = resources
        self._out = Path(config.out)
        self._streams: dict[str, Stream] = {}
        # All that a user may have wrong is looked at before weights are made.
        self._ranks = make_ranks(config.parallel, device)
        source = find_source(config)
        _check_datasets(config, source.config, self._ranks.dp_size)
        self._tokenizer = load_tokenizer(config.tokenizer)
        make_processor(config, source.config, self._tokenizer)
        self._recorded = recorded(config, source)
        self._random_parts = random_parts(source)
        self._checkpoints = Checkpoints(self._out / CHECKPOINTS, config.keep_checkpoints)
        on_first_rank(lambda: self._take_folder(fresh))
        self._checkpoint = self._checkpoints.latest()
        extra: dict[str, Any] | None = None
        if self._checkpoint is not None:
            extra = self._checkpoints.extra(self._checkpoint)
            check_same_run(extra["config"], self._recorded, accept_changes)
        for dataset in config.datasets:
            stream = self._make_stream(dataset, source.config)
            self._streams[dataset.name] = stream
            resources.callback(stream.close)

        self._model = make_model(source, config.seed)
        _check_fits(config, self._model, self._tokenizer)
        _check_features(config, self._model)
        prepare(self._model, config.parallel, config.precision, device, self._ranks)
        self._step = TrainStep(
            self._model,
            config.optimizer,
            weights={each.name: each.weight for each in config.datasets},
            optimisation=config.optimisation or source.config.optimisation,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            dp_group=self._ranks.dp_group,
        )
        self._counter = WorkCounter(self._model)
        self._peak_flops = peak_flops(device, DTYPES[config.precision])
        self._interval = Interval()
        if self._checkpoint is not None and extra is not None:
            self._resume(self._checkpoint, extra)
        self._saved_step = self._step.steps
        on_first_rank(self._open_metrics)
        self._progress = Progress(
            console if self._ranks.rank == 0 else None, config.steps, self._step.steps
        )

    @property
    def model(self) -> Flamingo:
        return self._model

    def __call__(self) -> RunResult:
        step, steps = self._step, self._config.steps
        with self._progress:
            self._announce()
            # Those of before the break, too.
            self._check_samples(self._outcomes())
            while step.steps < steps and not self._any_rank(self._stop.is_set()):
                self._one_step()
            if self._saved_step != step.steps:
                self._save()
            is_complete = step.steps >= steps
            if is_complete:
                self._save_model()
        model = self._out / MODEL if is_complete else None
        return RunResult(step.steps, is_complete, model, self._checkpoint)

    def _announce(self) -> None:
        for name, stream in self._streams.items():
            for path, what in stream.outcomes.broken_shards.items():
                self._progress.say(f"{name}: {path} can't be read in full: {what}")
        for part in self._random_parts:
            self._progress.say(f"{part} is frozen, and its weights are random")
        if self._checkpoint is not None:
            self._progress.say(f"goes on from {self._checkpoint}")

    def _one_step(self) -> None:
        config, step, interval = self._config, self._step, self._interval
        started = time.perf_counter()
        with span("data wait"):
            batches = {name: next(stream) for name, stream in self._streams.items()}
        interval.data_seconds += time.perf_counter() - started
        with span("step"):
            result = step(batches)
        interval.add(result, sum(map(self._counter, batches.values()), Amount()))
        interval.seconds += time.perf_counter() - started
        self._progress.advance(step.steps)
        if step.steps % config.log_every == 0 or step.steps == config.steps:
            self._log()
        if config.checkpoint_every and step.steps % config.checkpoint_every == 0:
            self._save()

    def _log(self) -> None:
        """A line of metrics. All ranks stop where too many samples are bad."""
        interval = self._interval
        mine = {
            "amount": interval.amount,
            "seconds": interval.seconds,
            "data_seconds": interval.data_seconds,
            "memory": peak_memory(self._device),
        }
        of_ranks, outcomes = self._gather(mine), self._outcomes()
        on_first_rank(lambda: self._write(self._line(of_ranks, outcomes), outcomes))
        self._interval = Interval()
        try:
            self._check_samples(outcomes)
        except BadSamplesError:
            # Whoever thinks otherwise of the rate goes on from here.
            self._save()
            raise

    def _outcomes(self) -> dict[str, Outcomes]:
        """Of each dataset's samples so far, on all ranks."""
        merged = {name: Outcomes() for name in self._streams}
        mine = {name: each.outcomes.to_dict() for name, each in self._streams.items()}
        for of_rank in self._gather(mine):
            for name, values in of_rank.items():
                merged[name].merge(Outcomes.from_dict(values))
        return merged

    def _check_samples(self, outcomes: Mapping[str, Outcomes]) -> None:
        for dataset in self._config.datasets:
            outcomes[dataset.name].check(dataset.max_bad_rate, name=dataset.name)

    def _line(
        self, of_ranks: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcomes]
    ) -> dict[str, Any]:
        """What README's table of metrics says."""
        step, interval = self._step, self._interval
        return {
            "step": step.steps,
            "loss": interval.losses(),
            "tokens": dict(interval.loss_tokens),
            "grad_norm": interval.grad_norm(),
            "lr": warm_up(self._config.optimizer, step.steps - 1),
            "skipped": step.skipped,
            "samples": {name: each.total for name, each in outcomes.items()},
            "bad_samples": {
                name: {reason: each.counts[reason] for reason in REASONS if each.counts[reason]}
                for name, each in outcomes.items()
            },
            "speed": self._speed(of_ranks),
        }

    def _speed(self, of_ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What differs from run to run."""
        interval = self._interval
        # Ranks wait for each other in a step.
        seconds = max(each["seconds"] for each in of_ranks)
        amount = sum((each["amount"] for each in of_ranks), Amount())
        per_step = seconds / interval.timed_steps
        return {
            "seconds": seconds,
            "tokens_per_second": amount.tokens / seconds,
            "images_per_second": amount.images / seconds,
            "mfu": utilisation(amount.flops, seconds, self._peak_flops * self._ranks.world_size),
            "data_share": max(each["data_seconds"] for each in of_ranks) / seconds,
            "peak_memory_bytes": max(each["memory"] for each in of_ranks),
            "seconds_left": (self._config.steps - self._step.steps) * per_step,
        }

    def _write(self, line: Mapping[str, Any], outcomes: Mapping[str, Outcomes]) -> None:
        self._metrics.write(line)
        found = {name: each.to_dict() for name, each in outcomes.items()}
        write_json(self._out / BAD_SAMPLES, found)
        self._progress.show(line)

    def _save(self) -> None:
        states = self._gather({name: each.state_dict() for name, each in self._streams.items()})
        extra = {
            "config": self._recorded,
            "streams": {
                name: merge_states([each[name] for each in states]) for name in self._streams
            },
            "interval": self._interval.state(),
        }
        step = self._step
        self._checkpoint = self._checkpoints.save(step.steps, step.state(), extra)
        self._saved_step = step.steps

    def _resume(self, checkpoint: Path, extra: Mapping[str, Any]) -> None:
        for name, stream in self._streams.items():
            try:
                stream.load_state_dict(extra["streams"][name])
            except ValueError as error:
                raise ConfigError(f"datasets.{error}") from None
        state = self._step.state()
        self._checkpoints.load(state, checkpoint)
        self._step.load(state)
        self._interval = Interval.of_state(extra["interval"])

    def _save_model(self) -> None:
        # Of what `train` was interrupted in, the same command writes it.
        export(self._model, self._tokenizer, self._out / MODEL, DTYPES[self._config.precision])

    def _take_folder(self, fresh: bool) -> None:
        self._resources.enter_context(contextlib.closing(Lock(self._out)))
        if fresh:
            remove_run(self._out)

    def _open_metrics(self) -> None:
        self._metrics = Metrics(self._out / METRICS, self._step.steps)

    def _make_stream(self, dataset: DatasetConfig, model: FlamingoConfig) -> Stream:
        ranks = self._ranks
        try:
            return make_stream(
                dataset,
                self._config,
                model,
                self._tokenizer,
                rank=ranks.dp_rank,
                world_size=ranks.dp_size,
            )
        except ConfigError as error:
            raise ConfigError(_within(f"datasets.{dataset.name}", str(error))) from None

    def _gather(self, value: Any) -> list[Any]:
        """Of each rank that has rows of its own."""
        group = self._ranks.dp_group
        if group is None:
            return [value]
        values: list[Any] = [None] * self._ranks.dp_size
        dist.all_gather_object(values, value, group=group)
        return values

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is True on any, the same on all: a signal reaches them at different steps."""
        if self._ranks.world_size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)


@contextlib.contextmanager
def _distributed(config: TrainConfig) -> Iterator[torch.device]:
    was_initialized = dist.is_initialized()
    device = init_distributed(config.device)
    yield device
    # Not after an error: other ranks may be waiting for this one, and it would wait for them.
    if dist.is_initialized() and not was_initialized:
        # A rank that leaves while another still talks to it can abort that one.
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[threading.Event]:
    """Inside, SIGTERM and SIGINT set the event, and a second SIGINT interrupts.

    Not in a thread, where Python has no signals.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    earlier = {each: signal.signal(each, handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


def _check_datasets(config: TrainConfig, model: FlamingoConfig, dp_size: int) -> None:
    for dataset in config.datasets:
        if dataset.batch_size % dp_size:
            raise ConfigError(
                f"datasets.{dataset.name}.batch_size: expected a multiple of the {dp_size} "
                f"data-parallel ranks, got {dataset.batch_size}"
            )
        if dataset.features is not None and not model.vision.is_frozen:
            raise ConfigError(
                f"datasets.{dataset.name}.features: expected none where the vision encoder is "
                f"trained, got {dataset.features}"
            )
    if not any(dataset.weight for dataset in config.datasets):
        raise ConfigError("datasets: expected a weight above 0, got 0 of all")


def _check_fits(config: TrainConfig, model: Flamingo, tokenizer: Any) -> None:
    """Tokenizer and rows fit the language model."""
    if len(tokenizer) > model.num_tokens:
        raise ConfigError(
            f"tokenizer: expected at most the model's {model.num_tokens} tokens, "
            f"model.learnt_token_ids among them; got {len(tokenizer)}"
        )
    for dataset in config.datasets:
        if model.max_tokens is not None and dataset.max_tokens > model.max_tokens:
            raise ConfigError(
                f"datasets.{dataset.name}.max_tokens: expected at most the language model's "
                f"{model.max_tokens}, got {dataset.max_tokens}"
            )


def _check_features(config: TrainConfig, model: Flamingo) -> None:
    """Those on disk are of this encoder's weights, not of another one of its name."""
    folders = {each.name: each.features for each in config.datasets if each.features is not None}
    made_by = fingerprint(model.vision_encoder) if folders else None
    for name, folder in folders.items():
        try:
            find_folder(folder, model.config.vision, made_by)
        except ConfigError as error:
            raise ConfigError(_within(f"datasets.{name}", str(error))) from None


def _within(where: str, message: str) -> str:
    """An error of a dataset's field, with the dataset's name in it."""
    field = message.removeprefix(f"{where}.").removeprefix("datasets.")
    return f"{where}.{field}"
