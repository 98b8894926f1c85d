"""The process of a stage of `accept`: `python -m flamingo_fast.profiling.accept_worker TARGET ...`.

Started by `accept_runner`, which reads what it tells and ends it in time.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flamingo_fast.bench import records
from flamingo_fast.errors import one_line
from flamingo_fast.profiling.accept_context import Context, missing


def arguments(context: Context, target: str, limit_s: float) -> list[str]:
    """The command line after `python -m ...` that makes such a context, for `limit_s` from now."""
    # The time of day: what Python takes to start and import counts too.
    end = time.time() + limit_s
    return [
        *(target, str(context.device), str(context.work), str(context.events), f"{end:.2f}"),
        *(str(context.shard), str(context.num_shards)),
        *(["--quick"] if context.quick else []),
    ]


@contextlib.contextmanager
def kernels(device: torch.device) -> Iterator[None]:
    """Inside, kernels run on `device`: on a CPU in Triton's interpreter, with bf16 right.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    if device.type != "cpu":
        yield
        return
    from flamingo_fast.testing.interpreter_bf16 import correct_bf16

    with correct_bf16():
        yield


def _end_with_parent() -> None:
    """A runner that was killed leaves no process behind that holds a GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    for name in ("target", "device", "work", "events"):
        parser.add_argument(name)
    parser.add_argument("end", type=float)
    for name in ("shard", "num_shards"):
        parser.add_argument(name, type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(given)
    faulthandler.enable()
    # Shortly before the runner would: a hang then says where it is.
    limit_s = max(options.end - time.time(), 1.0)
    faulthandler.dump_traceback_later(limit_s - 0.5, exit=True)
    if os.getpid() == os.getpgrp():
        _end_with_parent()
    context = Context(
        device=torch.device(options.device),
        quick=options.quick,
        work=Path(options.work),
        events=Path(options.events),
        deadline=time.monotonic() + limit_s,
        shard=options.shard,
        num_shards=options.num_shards,
    )
    if context.num_shards > 1:
        torch.set_num_threads(1)
    status, reason = "done", ""
    try:
        environment = records.environment(context.device)
        context.tell("environment", values=_texts(environment))
        module, _, function = options.target.partition(":")
        with kernels(context.device):
            getattr(importlib.import_module(module), function)(context)
    except ImportError as error:
        traceback.print_exc()
        status, reason = missing(error)
    # Also what a stage lets through is a result.
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", one_line(error)
    context.tell("end", status=status, reason=reason)
    sys.stdout.flush()
    faulthandler.cancel_dump_traceback_later()


def _texts(environment: records.Environment) -> dict[str, str]:
    return {name: str(each) for name, each in dataclasses.asdict(environment).items()}


if __name__ == "__main__":
    main()
