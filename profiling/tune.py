"""Tunes launch configurations on the device that is here: `flamingo-fast tune`.

Uninstalled, from the repository's root: `python -m flamingo_fast.profiling.tune`, with nothing but
PyTorch, Triton and NumPy.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo_fast.bench.timing import Sampler, device_clock
from flamingo_fast.errors import one_line
from flamingo_fast.ops.dispatch import BackendUnavailableError, why_not_triton
from flamingo_fast.profiling.tune_cases import CASES, QUICK_CASES, TINY_CASES, Case
from flamingo_fast.profiling.tune_search import KERNELS, CaseSearch, Effort, Outcome

Result = dict[str, Any]
# Why a case was skipped that nothing is wrong with.
BUDGET_ENDED = "the budget ended"

_FULL = Effort(steps=3, candidates=24, seconds=0.3, rounds=15)
_QUICK = Effort(steps=1, candidates=4, seconds=0.1, rounds=15)
# The interpreter's times mean nothing: a few will do to run all that a GPU will run.
_TINY = Effort(steps=1, candidates=2, seconds=0.0, rounds=2)


def tune(
    device: str | torch.device,
    *,
    quick: bool = False,
    out_dir: str | Path | None = None,
    budget_s: float | None = None,
    ops: Sequence[str] = (),
    cases: Sequence[Case] | None = None,
    sampler: Sampler | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Finds launch configurations that are faster than the heuristics', and writes those.

    Arguments:
        device: a GPU; or "cpu", quick, where kernels are interpreted: that tries the program, and
            no GPU reads its file.
        quick: fewer shapes, in bf16, and fewer candidates.
        out_dir: where the file goes that holds all of this device; the folder that is read by
            default. What other runs found stays in it.
        budget_s: seconds after which nothing new begins; what is found by then stays.
        ops: beginnings of names of `tuned.TUNABLES`; by default all.
        cases: by default those of the device.
        sampler: a clock, by default the device's.
        progress: gets a line for each op and shape.

    Returns:
        What the file holds, of this run alone, and its path as "file". For each op and shape
        "config", None where the heuristic's stays; "skipped" says what was not tuned and why.

    Raises:
        BackendUnavailableError: kernels can't run on `device`.
        ValueError: wrong arguments, by name.
        OSError: the file can't be written.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a GPU or cpu, got {device!r}") from error
    check(device, quick, budget_s, ops)
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    on_cpu = device.type == "cpu"
    if cases is None:
        cases = TINY_CASES if on_cpu else QUICK_CASES if quick else CASES
    effort = _TINY if on_cpu else _QUICK if quick else _FULL
    session = _Session(device, quick, out_dir, sampler, effort, deadline, progress)
    with contextlib.ExitStack() as stack:
        if on_cpu:
            from flamingo_fast.testing.interpreter_bf16 import correct_bf16

            stack.enter_context(correct_bf16())
        else:
            stack.enter_context(torch.cuda.device(device))
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
            for case in cases:
                wanted = [op for op in case.ops if not ops or op.startswith(tuple(ops))]
                if wanted:
                    session.tune_case(case, dtype, wanted)
    return session.finish()


def check(device: torch.device, quick: bool, budget_s: float | None, ops: Sequence[str]) -> None:
    """Raises what `tune` raises of its arguments."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a GPU or cpu, got {str(device)!r}")
    if device.type == "cpu" and not quick:
        raise ValueError("device: cpu: expected quick with it: kernels are interpreted, slowly")
    if budget_s is not None and not budget_s >= 0:
        raise ValueError(f"budget: expected seconds, at least 0, got {budget_s}")
    for op in ops:
        if not any(name.startswith(op) for name in KERNELS):
            raise ValueError(f"op: expected (the beginning of) {', '.join(KERNELS)}; got {op!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "PyTorch sees no GPU here; `--device cpu --quick` tries the program without one"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there are {torch.cuda.device_count()} GPUs, got {str(device)!r}")
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendUnavailableError("TRITON_INTERPRET=1 interprets kernels; a GPU compiles them")
    if reason := why_not_triton(device):
        raise BackendUnavailableError(reason)


class _Session:
    """One run of `tune`: what it found so far, here and in its file."""

    def __init__(
        self,
        device: torch.device,
        quick: bool,
        out_dir: str | Path | None,
        sampler: Sampler | None,
        effort: Effort,
        deadline: float,
        progress: Callable[[str], None],
    ) -> None:
        from flamingo_fast.kernels import launch, tuned

        self._tuned = tuned
        self._device, self._effort, self._deadline = device, effort, deadline
        self._sampler = sampler or device_clock(device)
        self._progress = progress
        target = launch.target_of(torch.empty(0, device=device))
        folder = Path(tuned.folder() if out_dir is None else out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / tuned.file_name(target)
        self._others = self._of_other_runs(target)
        self._entries: dict[Any, Result] = {}
        self._skipped: list[Result] = []
        self._about = {
            **tuned.header(target),
            "timed": "in Triton's interpreter" if device.type == "cpu" else "on the device",
            "quick": quick,
        }
        self._write()

    def tune_case(self, case: Case, dtype: torch.dtype, ops: Sequence[str]) -> None:
        search: CaseSearch | None = None
        for op in ops:
            if time.monotonic() >= self._deadline:
                self._skip(op, case, dtype, BUDGET_ENDED)
                continue
            # A failure, of memory too, is this op's alone.
            try:
                if search is None:
                    search = CaseSearch(
                        case, dtype, self._device, self._sampler, self._effort, self._deadline
                    )
                request = search.requests().get(op)
                # Of a resampler's backward some devices have one kernel, others two.
                if request is None or self._tuned.key_of(_named(request)) in self._entries:
                    continue
                outcome = search.search(request, lambda outcome: self._note(outcome, case))
            except Exception as error:
                self._skip(op, case, dtype, one_line(error))
                continue
            self._progress(_line(self._note(outcome, case)))

    def finish(self) -> Result:
        self._tuned.forget()
        return {**self._result(), "file": str(self._path)}

    def _skip(self, op: str, case: Case, dtype: torch.dtype, why: str) -> None:
        of = {"op": op, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
        self._skipped.append({**of, "reason": why})
        self._write()
        self._progress(f"{op}, {case.name}: skipped: {why}")

    def _note(self, outcome: Outcome, case: Case) -> Result:
        source = self._tuned.TUNABLES[outcome.request.op].source
        entry = _entry(outcome, case, source)
        self._entries[self._tuned.key_of(entry)] = entry
        self._write()
        return entry

    def _result(self) -> Result:
        return {**self._about, "entries": list(self._entries.values()), "skipped": self._skipped}

    def _of_other_runs(self, target: Any) -> list[Result]:
        """As far as they are of the code that there is."""
        try:
            entries = self._tuned.entries_of(self._path.read_text(encoding="utf-8"), target)
        except (OSError, ValueError):
            return []
        sources = {op: one.source for op, one in self._tuned.TUNABLES.items()}
        return [entry for entry in entries if sources.get(entry["op"]) == entry["source"]]

    def _write(self) -> None:
        """All at once: a reader, or a run that is cut off, never sees half a file."""
        result, key_of = self._result(), self._tuned.key_of
        result["entries"] += [one for one in self._others if key_of(one) not in self._entries]
        half = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        half.replace(self._path)


def _named(request: Any) -> Result:
    dtype = str(request.dtype).removeprefix("torch.")
    return {"op": request.op, "shape": request.shape, "dtype": dtype}


def _entry(outcome: Outcome, case: Case, source: str) -> Result:
    entry = {
        **_named(outcome.request),
        "case": case.name,
        "source": source,
        "config": vars(outcome.best) if outcome.is_replaced else None,
        "heuristic": vars(outcome.request.heuristic),
        "heuristic_us": outcome.heuristic_us,
        "best": vars(outcome.best),
        "best_us": outcome.heuristic_us,
        "ratio": None,
        "tried": outcome.tried,
        "refused": [{"config": vars(config), "why": why} for config, why in outcome.refused],
        "is_complete": outcome.is_complete,
    }
    if outcome.timing is not None:
        ratio = outcome.timing.ratio
        entry["best_us"] = outcome.timing.us
        entry["ratio"] = {"p20": ratio.p20, "p50": ratio.p50, "p80": ratio.p80}
    return entry


def _text(config: Result) -> str:
    return " ".join(
        f"{name.removeprefix('BLOCK_')}={value}"
        for name, value in config.items()
        if value is not None
    )


def _changes(entry: Result) -> str:
    changed = {
        name: value for name, value in entry["best"].items() if value != entry["heuristic"][name]
    }
    return _text(changed) or "the same"


def _line(entry: Result) -> str:
    ratio = f", {entry['ratio']['p50']:.2f} times as fast" if entry["ratio"] else ""
    return f"{entry['op']}, {entry['case']}: {_changes(entry)}{ratio}"


_COLUMNS = ("kernel", "shape", "dtype", "heuristic", "us", "best", "us", "ratio", "used")


def render(result: Result) -> str:
    """A table of plain text, with what was skipped below it."""
    rows = [_COLUMNS]
    for entry in result["entries"]:
        ratio, shape = entry["ratio"], entry["shape"]
        rows.append(
            (
                entry["op"],
                " ".join(f"{name}={value}" for name, value in shape.items()),
                entry["dtype"],
                _text(entry["heuristic"]),
                f"{entry['heuristic_us']:.1f}",
                _changes(entry),
                f"{entry['best_us']:.1f}",
                f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})" if ratio else "",
                "yes" if entry["config"] else "no",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [
        f"skipped: {one['op']}, {one['case']}, {one['dtype']}: {one['reason']}"
        for one in result["skipped"]
    ]
    if result["arch"] == "interpreter":
        lines.append("Times are the interpreter's; no GPU reads this file.")
    return "\n".join([*lines, result["file"]])


def prepare(device: str) -> None:
    """Before Triton is imported: on a CPU kernels are interpreted."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    """What `flamingo-fast tune` does, without its packages; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_fast.profiling.tune")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", action="append", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    prepare(options.device)
    try:
        result = tune(
            options.device,
            quick=options.quick,
            out_dir=options.out,
            budget_s=options.budget,
            ops=options.op,
            progress=functools.partial(print, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        parser.error(str(error))
    except (BackendUnavailableError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
