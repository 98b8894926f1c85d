"""`flamingo-fast accept`: whether the project works on this machine's GPU, in 25 minutes.

Also `python -m flamingo_fast.profiling.accept` from the repository's root, with nothing installed
but PyTorch, Triton and NumPy: what needs more is skipped, and says what. Each stage runs in a
process of its own, for a limited time; results are in the folder while it runs.
"""

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from flamingo_fast.bench import records
from flamingo_fast.profiling import accept_runner
from flamingo_fast.profiling.accept_report import text_table
from flamingo_fast.profiling.accept_results import Folder, Results
from flamingo_fast.profiling.accept_stages import STAGES, Stage


def default_out() -> Path:
    """results/accept-<utc>-<commit> of a checkout, else accept_results."""
    return records.results_folder("accept-") if records.IN_CHECKOUT else Path("accept_results")


def accept(
    *,
    device: str = "cuda",
    quick: bool = False,
    stages: Sequence[str] = (),
    resume: bool = False,
    out: Path | None = None,
    known: Sequence[Stage] = STAGES,
    show: Callable[[str], None] = print,
) -> int:
    """Runs stages and writes what they found.

    Arguments:
        device: "cuda", or "cpu" for a dry run of what a CPU can run, kernels in the interpreter.
        quick: small shapes and few rounds; on a CPU it is a must.
        stages: names of some; none given: all, with `resume` those that `out` has no result of.
        resume: adds to the results in `out`; a stage of `stages` that is there runs again.
        out: the folder, empty or of an earlier run; by default `default_out`.
        known: the stages that there are.
        show: is told what happens.

    Returns:
        0, or 1 where a stage failed or was interrupted.

    Raises:
        ValueError: an argument or combination that there is not, by name; as `Folder`.
    """
    order = [each.name for each in known]
    for name in stages:
        if name not in order:
            raise ValueError(f"stage: expected some of {', '.join(order)}; got {name!r}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: torch sees no GPU; --device cpu --quick runs what a CPU can run of it"
        )
    if device == "cpu" and not quick:
        raise ValueError("device: a CPU interprets the kernels: expected --quick with cpu")
    if resume and out is None:
        raise ValueError("resume: expected --out with it, where the earlier results are")
    folder = Folder(out or default_out(), resume=resume)
    command = shlex.join(["flamingo-fast", "accept", *_options(device, quick, stages)])
    results = folder.results or Results(command, device, quick)
    for name, mine in (("device", device), ("quick", quick)):
        if getattr(results, name) != mine:
            raise ValueError(
                f"resume: {folder.path} has results of {name} {getattr(results, name)}, "
                f"and this is {mine}"
            )
    if strange := [each.name for each in results.stages if each.name not in order]:
        raise ValueError(f"resume: {folder.path} has stages that there are not: {strange}")
    done = {each.name for each in results.stages if each.status != "running"}
    chosen = [
        each
        for each in known
        if (each.name in stages if stages else not (resume and each.name in done))
    ]
    try:
        with _interrupted_by_sigterm():
            accept_runner.run(chosen, order, folder, results, show)
    except KeyboardInterrupt:
        show("interrupted: --resume goes on")
    show(text_table(results))
    show(str(folder))
    return 1 if results.failed else 0


def _options(device: str, quick: bool, stages: Sequence[str]) -> list[str]:
    return ["--device", device, *["--quick"] * quick, *(f"--stage={name}" for name in stages)]


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Of `timeout` and of machines that are taken back: what ran so far is written down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, without what the `flamingo-fast` command needs. Returns the exit code."""
    stages = "\n".join(f"  {each.name:<10} {each.limit_s:>4g} s  {each.about}" for each in STAGES)
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_fast.profiling.accept",
        description="Whether flamingo_fast works on this machine's GPU.",
        epilog=f"stages, and how long each may take:\n{stages}\n\nExit codes: 0 all that ran "
        "passed, 1 a stage failed, 2 bad usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="may be repeated; default: all"
    )
    parser.add_argument("--resume", action="store_true", help="add to the results in --out")
    parser.add_argument("--out", type=Path, help="folder; default: results/accept-<utc>-<commit>")
    options = parser.parse_args(arguments)
    try:
        return accept(
            device=options.device,
            quick=options.quick,
            stages=options.stage,
            resume=options.resume,
            out=options.out,
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
