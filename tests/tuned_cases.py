"""Files of tuned launch configurations, and what is launched with them."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_fast.kernels import launch, tuned
from flamingo_fast.kernels.launch import INTERPRETER, Target, recording
from flamingo_fast.profiling import tune_search
from flamingo_fast.profiling.tune_cases import TINY_CASES, Case

BF16, CPU = torch.bfloat16, torch.device("cpu")
GPU = Target("sm_90", 132, "GPU of a test")
TEXT, _, _, NORM, _ = TINY_CASES

Entry = dict[str, Any]


@contextlib.contextmanager
def tuned_folder(folder: Path) -> Iterator[Path]:
    """Where tuned files are, which the interpreter reads too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAMINGO_FAST_CACHE", str(folder))
        patch.setenv("FLAMINGO_FAST_TUNED", "interpreter")
        tuned.forget()
        yield folder
    tuned.forget()


def requests(case: Case, batch: int = 1) -> dict[str, tuned.Request]:
    with tuned.forced() as asked, recording(INTERPRETER):
        tune_search._call(case.make(batch, BF16, CPU))
    return asked


def other_config(request: tuned.Request) -> Any:
    """A valid one that is not the heuristic's, in tiles if it can be."""
    one = tuned.TUNABLES[request.op]
    configs = tune_search.neighbours(one, request.heuristic)
    return next(config for config in configs if one.problem(config, request) is None)


def entry_of(request: tuned.Request, config: Any, **changes: Any) -> Entry:
    entry = {
        "op": request.op,
        "shape": request.shape,
        "dtype": str(request.dtype).removeprefix("torch."),
        "source": tuned.TUNABLES[request.op].source,
        "config": config if isinstance(config, dict | None) else dataclasses.asdict(config),
    }
    return entry | changes


def write(entries: list[Entry], target: Target = INTERPRETER, **changes: Any) -> None:
    content = tuned.header(target) | {"entries": entries} | changes
    tuned.path_of(target).write_text(json.dumps(content))
    tuned.forget()


def launches_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[tuple]:
    """(kernel's name, constants, options) of what is really started."""
    started, stock = [], launch.start

    def start(kernel, grid, arguments, constexprs, options, index):
        started.append((kernel.__name__, constexprs, options))
        stock(kernel, grid, arguments, constexprs, options, index)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "start", start)
        run()
    return started
