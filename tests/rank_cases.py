"""Processes of a test that meet as ranks, by gloo."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


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
