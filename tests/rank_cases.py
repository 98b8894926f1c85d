"""Processes of a test that meet as ranks, by gloo."""

import contextlib
import datetime
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def met(rank: int, world_size: int, store: str | Path) -> Iterator[None]:
    """Inside, this process is one of the ranks; `store` is a file that is not there yet."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        # Who waits for good is a failure, and not the end of the whole suite.
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        yield
        # A rank that leaves while another still talks to it can abort it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(world_size: int, worker: Callable[..., None], *args: Any) -> None:
    """Runs worker(rank, *args) in a process for each rank; raises what one of them did.

    By fork server, from a process that has imported what takes seconds, if `run_cases` is imported.
    Not by `mp.spawn` also because that ends the interpreter: a thread of gloo that still holds a
    tensor then asks for the GIL and aborts the process (`ProcessGroupGloo::runLoop`, PyTorch 2.14).
    """
    mp.start_processes(worker, args, nprocs=world_size, start_method="forkserver")


@contextlib.contextmanager
def one_rank_of(world_size: int, rank: int = 0) -> Iterator[None]:
    """Inside, this process is one of the ranks, and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
