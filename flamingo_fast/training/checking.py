"""Whether samples can be used: each is read and decoded, as training would, and counted."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from rich.markup import escape
from rich.table import Table

from flamingo_fast.training.bad_samples import CONVERTED, OK, BadSample, Outcomes
from flamingo_fast.training.decoding import decode
from flamingo_fast.training.samples import Limits, Medium, Sample, parse
from flamingo_fast.training.shards import Record, ShardSet

_CHUNK = 256


def check_record(
    record: Record, kind: str, limits: Limits, num_frames: int, outcomes: Outcomes
) -> Sample | None:
    """The sample of a record, where it and all its media can be used; counted in `outcomes`."""
    try:
        sample = parse(record, kind, limits)
        media = [part for part in sample.parts if isinstance(part, Medium)]
        # One at a time: a document may have many large ones.
        is_unusual = [decode(each, limits, num_frames).is_unusual for each in media]
    except BadSample as error:
        outcomes.add_bad(record.key, record.shard, error)
        return None
    outcomes.add_used(record.key, record.shard, is_converted=any(is_unusual))
    return sample


def check_shards(
    shards: ShardSet,
    kind: str,
    limits: Limits | None = None,
    *,
    num_frames: int = 8,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Outcomes:
    """What becomes of every sample; the same for any number of workers.

    Arguments:
        kind: "interleaved", "image_text" or "video_text".
        limits: None: `Limits()`.
        num_frames: of a video at most so many are decoded.
        num_workers: processes; 0: this one.
        progress: is called with how many more were looked at.

    Raises:
        ChildProcessError: a process ended, such as for want of memory.
    """
    check = partial(_check_range, shards, kind, limits or Limits(), num_frames)
    starts = range(0, len(shards), _CHUNK)
    found = Outcomes()
    found.broken_shards.update(shards.broken)

    def add(outcomes: Outcomes) -> None:
        found.merge(outcomes)
        progress(outcomes.total)

    if num_workers == 0:
        for start in starts:
            add(check(start))
        return found
    # Not forked: the libraries that decode have threads of their own.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _start, (check,))
    try:
        with pool:
            for outcomes in pool.map(_check_there, starts):
                add(outcomes)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that reads ended; there may be too little memory"
        ) from None
    return found


# Of a process that reads. With each task it would be pickled anew, and shards without an index have
# their offsets with them.
_check: Callable[[int], Outcomes]


def _start(check: Callable[[int], Outcomes]) -> None:
    global _check
    _check = check


def _check_there(start: int) -> Outcomes:
    return _check(start)


def _check_range(
    shards: ShardSet, kind: str, limits: Limits, num_frames: int, start: int
) -> Outcomes:
    outcomes = Outcomes()
    for i in range(start, min(start + _CHUNK, len(shards))):
        check_record(shards[i], kind, limits, num_frames, outcomes)
    return outcomes


def outcomes_table(outcomes: Outcomes) -> Table:
    """Samples by outcome, most first, with an example of each."""
    table = Table("outcome", "used", "samples", "share", "such as")
    for name, count in outcomes.counts.most_common():
        such_as = "".join(
            f"{each.shard}, {each.key}: {each.detail}"
            for each in outcomes.examples.get(name, ())[:1]
        )
        is_used = "yes" if name in (OK, CONVERTED) else "no"
        share = f"{count / outcomes.total:.2%}"
        table.add_row(name, is_used, str(count), share, escape(such_as))
    return table
