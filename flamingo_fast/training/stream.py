"""An endless stream of a dataset's batches that can be stopped and gone on with exactly.

A batch of a dataset has `batch_size` rows, on all ranks together, and row s is lane s: it takes the
samples at positions s, s + batch_size, s + 2 * batch_size and so on of the dataset's endless order,
skips bad ones, and packs what is its own. What is trained on so depends neither on the number of
ranks nor on that of worker processes, and the state of a lane is a few positions.
"""

import contextlib
import dataclasses
import hashlib
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.multiprocessing  # tensors between processes go through shared memory

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.training.bad_samples import BadSample, Outcomes
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import DatasetConfig, TrainConfig
from flamingo_fast.training.features import FeatureCache, find_folder
from flamingo_fast.training.packing import fullest
from flamingo_fast.training.rows import (
    Document,
    DocumentMaker,
    Draft,
    Rows,
    collate,
    gather,
)
from flamingo_fast.training.shards import ShardSet

# Documents that a packed row is chosen from.
_LOOK_AHEAD = 16
# One after another in a lane; the rate over all lanes is the trainer's to judge.
_MOST_BAD = 1000
# Batches that a worker process is ahead.
_PREFETCH = 2
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StreamError(RuntimeError):
    """A dataset that can't be read on; one line, with its name."""


@dataclasses.dataclass(frozen=True)
class LaneState:
    """Where a lane is.

    Attributes:
        position: of the next sample.
        pending: positions of samples that were read, and wait for a row that they fit in.
    """

    position: int
    pending: tuple[int, ...] = ()


class Lane:
    """One row of each batch.

    A row and the state after it are a function of the state before it: of the drafts that it keeps
    it would make the same again.

    Arguments:
        shards: where the samples are.
        maker: makes documents of them.
        index: of the lane, from 0 to below `stride`.
        stride: lanes of the dataset.
        order_seed: of the order of samples.
    """

    def __init__(
        self, shards: ShardSet, maker: DocumentMaker, index: int, stride: int, order_seed: int
    ) -> None:
        self._shards, self._maker = shards, maker
        self._stride, self._order_seed = stride, order_seed
        self._position = index
        self._pending: list[int] = []
        self._drafts: dict[int, Draft] = {}
        self._bad_run = 0

    @property
    def state(self) -> LaneState:
        return LaneState(self._position, tuple(self._pending))

    def load(self, state: LaneState) -> None:
        self._position, self._pending = state.position, list(state.pending)
        self._drafts = {}

    def next_row(self) -> tuple[list[Document], list[torch.Tensor], Outcomes]:
        """Documents of a row, at least one; their media, in order; what became of samples.

        Raises:
            StreamError: a thousand bad samples, one after another, or anything else that is wrong
                with a sample, by its name.
        """
        outcomes = Outcomes()
        self._bad_run = 0
        documents: list[Document] = []
        media: list[torch.Tensor] = []
        dataset = self._maker.dataset
        room = dataset.max_tokens
        while True:
            self._read_ahead(_LOOK_AHEAD if dataset.pack else 1, outcomes)
            drafts = [self._drafts[position] for position in self._pending]
            chosen = fullest([len(each.ids) for each in drafts], room, with_first=not documents)
            for draft in [drafts[i] for i in chosen]:
                self._pending.remove(draft.position)
                del self._drafts[draft.position]
                with self._naming(draft.key, draft.shard):
                    try:
                        document, of_document, is_unusual = self._maker.finish(draft)
                    except BadSample as error:
                        self._skip(draft.key, draft.shard, error, outcomes)
                        continue
                outcomes.add_used(draft.key, draft.shard, is_converted=is_unusual)
                self._bad_run = 0
                documents.append(document)
                media += of_document
                room -= len(document.ids)
            # A packed row may have room again for what is read after it.
            if documents and not (dataset.pack and chosen and room):
                return documents, media, outcomes

    def _read_ahead(self, count: int, outcomes: Outcomes) -> None:
        """Drafts of all that is pending, and of so many samples; bad ones are counted."""
        for position in self._pending[:]:
            if position not in self._drafts and not self._read(position, outcomes):
                self._pending.remove(position)
        while len(self._pending) < count:
            position, self._position = self._position, self._position + self._stride
            if self._read(position, outcomes):
                self._pending.append(position)

    def _read(self, position: int, outcomes: Outcomes) -> bool:
        shuffle = self._maker.dataset.shuffle
        record = self._shards[self._shards.position_to_index(position, self._order_seed, shuffle)]
        with self._naming(record.key, record.shard):
            try:
                self._drafts[position] = self._maker.draft(record, position)
            except BadSample as error:
                self._skip(record.key, record.shard, error, outcomes)
        return position in self._drafts

    def _skip(self, key: str, shard: str, error: BadSample, outcomes: Outcomes) -> None:
        outcomes.add_bad(key, shard, error)
        self._bad_run += 1
        # Also where a packed row has documents already: nothing else may come to fill it.
        if self._bad_run >= _MOST_BAD:
            raise StreamError(
                f"{self._maker.dataset.name}: {self._bad_run} bad samples, one after another\n"
                f"{outcomes.describe()}"
            )

    @contextlib.contextmanager
    def _naming(self, key: str, shard: str) -> Iterator[None]:
        try:
            yield
        except StreamError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())
            raise StreamError(
                f"{self._maker.dataset.name}: sample {key} of {shard}: "
                f"{type(error).__name__}: {message}"
            ) from error


class Stream:
    """Batches of a dataset, without end: `next(stream)`.

    A rank has the lanes from rank * batch_size / world_size on, that many of them. Worker processes
    divide these among them and are two batches ahead; they start with the first batch, and `close`
    or the end of this process ends them.

    Arguments:
        shards: where the samples are.
        maker: makes documents of them; says the dataset.
        image_token_id: what is not predicted.
        seed: of the run; the order of samples is a function of it and of the dataset's name.
        rank, world_size: among those that share the batch.
        num_workers: processes that read; 0: this one.
        start_method: of processes; None: Python's. With "spawn" all parts have to be picklable.

    Attributes:
        dataset: its config.
        outcomes: of the samples of this rank's batches that were handed out. After
            `load_state_dict` rank 0 has those of all ranks from before it, and others have none, so
            that their sum is right.

    Raises:
        ConfigError: a batch size that the ranks can't share.
    """

    def __init__(
        self,
        shards: ShardSet,
        maker: DocumentMaker,
        *,
        image_token_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_method: str | None = None,
    ) -> None:
        self.dataset = maker.dataset
        size = self.dataset.batch_size
        if size % world_size:
            raise ConfigError(
                f"datasets.batch_size: expected a multiple of {world_size} ranks, got {size} of "
                f"{self.dataset.name}"
            )
        digest = hashlib.sha256(f"{seed}/{self.dataset.name}".encode()).digest()
        order_seed = int.from_bytes(digest[:6], "big")
        mine = range(rank * size // world_size, (rank + 1) * size // world_size)
        self._lanes = {index: Lane(shards, maker, index, size, order_seed) for index in mine}
        self._shards, self._maker = shards, maker
        self._image_token_id = image_token_id
        self._num_workers = min(num_workers, len(mine))
        self._start_method = start_method
        self._workers: _Workers | None = None
        self._batches = 0
        # Of the batches that were handed out; lanes of worker processes are ahead, those here idle.
        self._states = {index: lane.state for index, lane in self._lanes.items()}
        self.outcomes = Outcomes()
        self.outcomes.broken_shards.update(shards.broken)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """This rank's rows of the next batch, in the order of lanes.

        Raises:
            StreamError: a dataset that can't be read on.
        """
        try:
            parts = self._parts()
        except BaseException:
            self.close()
            raise
        states = [state for part in parts for state in part.states]
        self._states = dict(zip(self._lanes, states, strict=True))
        for part in parts:
            self.outcomes.merge(part.outcomes)
        self._batches += 1
        return collate(
            [part.rows for part in parts],
            max_tokens=self.dataset.max_tokens,
            image_token_id=self._image_token_id,
            pad_token_id=self._maker.pad_token_id,
            pack=self.dataset.pack,
            has_features=self.dataset.features is not None,
        )

    def _parts(self) -> "list[_Part]":
        lanes = list(self._lanes.values())
        if not self._num_workers:
            return [_part(lanes)]
        if self._workers is None:
            self._workers = _Workers(
                self.dataset.name, lanes, self._num_workers, self._start_method
            )
        return self._workers.next()

    @property
    def epoch(self) -> float:
        """How often all samples were read, by this rank's lanes."""
        read = sum(state.position - lane for lane, state in self._states.items())
        return read / len(self._states) / len(self._shards)

    def state_dict(self) -> dict[str, Any]:
        """After the batches that were handed out, as JSON has it; of this rank's lanes alone."""
        return {
            "dataset": self.dataset.name,
            "shards": self._shards.fingerprint,
            "batch_size": self.dataset.batch_size,
            "batches": self._batches,
            "lanes": {
                str(index): {"position": state.position, "pending": list(state.pending)}
                for index, state in self._states.items()
            },
            "outcomes": self.outcomes.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after what `merge_states` made of all ranks' states, of any number of ranks.

        Raises:
            ValueError: a state of another dataset, of another batch size, or not of all lanes.
        """
        for name, mine in (
            ("dataset", self.dataset.name),
            ("shards", self._shards.fingerprint),
            ("batch_size", self.dataset.batch_size),
        ):
            if state[name] != mine:
                raise ValueError(
                    f"{self.dataset.name}: expected a state of {name} {mine!r}, got {state[name]!r}"
                )
        missing = {str(each) for each in range(self.dataset.batch_size)} - set(state["lanes"])
        if missing:
            raise ValueError(
                f"{self.dataset.name}: expected a state of all {self.dataset.batch_size} lanes, "
                f"{len(missing)} are missing: merge the states of all ranks"
            )
        self._states = {
            index: LaneState(of_lane["position"], tuple(of_lane["pending"]))
            for index in self._lanes
            for of_lane in [state["lanes"][str(index)]]
        }
        self.close()
        self._batches = state["batches"]
        self.outcomes = Outcomes()
        if 0 in self._lanes:
            self.outcomes = Outcomes.from_dict(state["outcomes"])
        self.outcomes.broken_shards.update(self._shards.broken)

    def close(self) -> None:
        """Ends worker processes. The next batch is the one after the last that was handed out."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        # They may be elsewhere, after an error or since the workers' are copies.
        for index, lane in self._lanes.items():
            lane.load(self._states[index])


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the states of all ranks, for a checkpoint.

    Raises:
        ValueError: they are of different datasets or steps, or have lanes in common.
    """
    merged: dict[str, Any] = {**states[0], "lanes": {}}
    outcomes = Outcomes()
    for state in states:
        for name in ("dataset", "shards", "batch_size", "batches"):
            if state[name] != merged[name]:
                raise ValueError(
                    f"states: expected one {name}, got {merged[name]!r} and {state[name]!r}"
                )
        common = set(state["lanes"]) & set(merged["lanes"])
        if common:
            raise ValueError(f"states: lanes {', '.join(sorted(common))} are in two of them")
        merged["lanes"] |= state["lanes"]
        outcomes.merge(Outcomes.from_dict(state["outcomes"]))
    return merged | {"outcomes": outcomes.to_dict()}


def make_stream(
    dataset: DatasetConfig,
    train: TrainConfig,
    model: FlamingoConfig,
    tokenizer: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    image_transform: Any = None,
    encoder_fingerprint: str | None = None,
) -> Stream:
    """A stream of one of a run's datasets.

    Arguments:
        dataset: one of `train.datasets`.
        train: the run: tokens, seed, workers.
        model: of the model, whose vision config says how images are transformed.
        tokenizer: gets the two tokens where it lacks them.
        rank, world_size: among those that have different rows.
        image_transform: in place of that: PIL image in RGB to (3, H, W).
        encoder_fingerprint: `features.fingerprint` of the vision encoder, for a dataset with
            features; None: there are features of one such encoder only.

    Raises:
        ConfigError: shards that there are not, or tokens with other ids than in `model`, and so on.
        FeatureError: a broken file of features.
        ImportError: an extra that is not installed.
    """
    processor = FlamingoProcessor.of(
        model,
        tokenizer,
        image_token=train.image_token,
        eoc_token=train.eoc_token,
        image_transform=image_transform,
    )
    features = None
    if dataset.features is not None:
        features = FeatureCache(find_folder(dataset.features, model.vision, encoder_fingerprint))
    maker = DocumentMaker(dataset, model, processor, seed=train.seed, features=features)
    return Stream(
        ShardSet(dataset.shards),
        maker,
        image_token_id=model.image_token_id,
        seed=train.seed,
        rank=rank,
        world_size=world_size,
        num_workers=train.num_workers,
    )


@dataclasses.dataclass
class _Part:
    """Rows of some lanes, the lanes' states after them, and what became of samples."""

    rows: Rows
    states: list[LaneState]
    outcomes: Outcomes


def _part(lanes: Sequence[Lane]) -> _Part:
    documents, media, outcomes = [], [], Outcomes()
    for lane in lanes:
        row, of_row, of_samples = lane.next_row()
        documents.append(row)
        media += of_row
        outcomes.merge(of_samples)
    return _Part(gather(documents, media), [lane.state for lane in lanes], outcomes)


class _Workers:
    """Processes that make parts of batches, each of lanes of its own.

    Not `torch.utils.data.DataLoader`: its processes die of the SIGTERM that a scheduler sends to
    all of a job, its handler of SIGCHLD then raises amid a step, and what they raise comes as a
    traceback. These ignore it; they only read, so that they are killed when they are not needed.
    """

    def __init__(
        self, name: str, lanes: Sequence[Lane], count: int, start_method: str | None
    ) -> None:
        self._name = name
        context: Any = torch.multiprocessing.get_context(start_method)
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._free: list[Any] = []
        self._end = multiprocessing.util.Finalize(
            # Before Python waits for them: exitpriority.
            self,
            _kill,
            (self._processes,),
            exitpriority=100,
        )
        for i in range(count):
            mine = lanes[i * len(lanes) // count : (i + 1) * len(lanes) // count]
            ours, theirs = context.Pipe(duplex=False)
            free = context.Semaphore(_PREFETCH)
            process = context.Process(
                target=_work, args=(mine, theirs, free), name=f"{name}-{i}", daemon=True
            )
            # Until it ignores them, which it does first.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._free.append(free)

    def next(self) -> list[_Part]:
        """The next part of each, in their order."""
        parts = []
        for process, pipe, free in zip(self._processes, self._pipes, self._free, strict=True):
            multiprocessing.connection.wait([pipe, process.sentinel])
            try:
                part = pipe.recv()
            # The second where it died while a tensor was on its way.
            except (EOFError, OSError):
                raise StreamError(f"{self._name}: {_what_ended(process)}") from None
            if isinstance(part, StreamError):
                raise part
            free.release()
            parts.append(part)
        return parts

    def close(self) -> None:
        self._end()
        for pipe in self._pipes:
            pipe.close()


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _what_ended(process: Any) -> str:
    process.join(1)
    code = process.exitcode
    if code is None or code >= 0:
        return f"a process that reads it ended, exit code {code}"
    reason = signal.Signals(-code).name
    hints = {
        "SIGBUS": ": there may be too little shared memory, see /dev/shm",
        "SIGKILL": ": there may be too little memory",
    }
    return f"a process that reads it was ended by {reason}{hints.get(reason, '')}"


def _work(lanes: Sequence[Lane], pipe: Any, free: Any) -> None:
    """What a worker process does until it is killed, or its parent is gone."""
    for each in _IGNORED_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            made: Any = _part(lanes)
        except Exception as error:
            made = _plain(error)
        free.acquire()
        try:
            pipe.send(made)
        except Exception as error:
            made = _plain(error)
            pipe.send(made)
        if isinstance(made, StreamError):
            # Tensors that were sent before are fetched from this process.
            threading.Event().wait()


def _end_with(parent: Any) -> None:
    """Ends this process with its parent, even if that was killed while this one sends."""
    parent.join()
    os._exit(1)


def _plain(error: Exception) -> StreamError:
    """One that can be pickled whatever it came from."""
    if isinstance(error, StreamError):
        return StreamError(str(error))
    return StreamError("".join(traceback.format_exception(error)))
