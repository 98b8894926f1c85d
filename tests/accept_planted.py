"""Stages of `accept` that misbehave, each in its own way."""

import os
import signal
import time
from pathlib import Path

from flamingo_fast.profiling.accept_context import Context, OutOfTimeError


def passes(context: Context) -> None:
    context.check("one", True, "fine")
    context.row("Numbers", ("name", "value"), ("shards", context.num_shards))
    context.not_exercised("a GPU")
    for name, expected in (("TRITON_INTERPRET", "1"), ("CUDA_LAUNCH_BLOCKING", None)):
        context.check(name, os.environ.get(name) == expected, str(os.environ.get(name)))
    # Where tuning's file is kept, kernels look for it in the stages after it.
    context.check("tuned", Path(os.environ["FLAMINGO_FAST_CACHE"], "results.json").exists())
    try:
        with context.limit(0.2):
            time.sleep(60)
    except OutOfTimeError as error:
        context.check("limit", True, str(error))


def shares(context: Context) -> None:
    for name in context.mine(["a", "b", "c"]):
        context.check(name, True, f"{context.shard} of {context.num_shards}")


def fails(context: Context) -> None:
    context.attempt("right", lambda: "1 < 2")
    context.attempt("wrong", lambda: 1 / 0)
    context.attempt("lacking", lambda: __import__("no_such_package"))


def raises(context: Context) -> None:
    context.check("before", True)
    raise RuntimeError("in the middle\nsecond line")


def hangs(context: Context) -> None:
    context.check("before", True)
    time.sleep(60)


def exits(context: Context) -> None:
    context.check("before", True)
    os._exit(7)


def is_killed(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lacks_a_package(context: Context) -> None:
    import no_such_package.inside  # noqa: F401


def lacks_ours(context: Context) -> None:
    import flamingo_fast.no_such_module  # noqa: F401


def checks_nothing(context: Context) -> None: ...


def skips(context: Context) -> None:
    context.skip("nsys", "missing nsys")


def leaves_files(context: Context) -> None:
    context.check("files", True)
    for number, size in enumerate((10, 2**26, 20, 30, 40, 50, 60)):
        path = context.work / f"{number}"
        with path.open("wb") as file:
            file.truncate(size)
        context.keep(path, f"file{number}.bin")
    context.keep(context.work / "absent", "absent.bin")


def talks(context: Context) -> None:
    for number in range(60):
        context.check(f"check {number}", True, "x" * 100_000)
    print("y" * 3_000_000)
    print("the end of it")
