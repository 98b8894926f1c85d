"""What a user of `flamingo-fast bench` chose, and what a suite is."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from flamingo_fast.bench.section import Section

Progress = Callable[[str, float], None]
"""Is told what runs, and which part of the suite is done."""

RAISED = (ArithmeticError, RuntimeError, ValueError)
"""What measuring may raise, though what was measured before counts: memory that runs out, a loss
that is NaN, results that disagree."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user chose.

    Attributes:
        ops, shapes, dtypes, modes, providers: see `plan.make_plan`.
        op_shapes: in place of ops and shapes, some of them.
        quick: small and short.
        cases: of "patch", families or cases of them.
        preset: of "model", a whole model that is built, too.
        scale, rows, pairs, impl, data: of "table3"; data: a folder of real samples.
        out: where a suite writes what a stopped run goes on from.
        about: what that depends on.
        resume: whether to go on.
    """

    device: torch.device
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    op_shapes: tuple[tuple[str, str], ...] = ()
    quick: bool = False
    cases: tuple[str, ...] = ()
    preset: str | None = None
    scale: str = "mini"
    rows: tuple[str, ...] = ()
    pairs: int = 9
    impl: str = "auto"
    data: Path | None = None
    out: Path | None = None
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class Suite:
    """Something to measure.

    Attributes:
        about: for people.
        run: gives its sections; the last one may say that it was interrupted.
        seconds: about how long that takes on 2 cores.
        check: raises ValueError for settings that it can't run with.
        options: of `Settings`, those that it minds beside `quick`.
    """

    name: str
    about: str
    run: Callable[[Settings, Progress], Iterator[Section]]
    seconds: Callable[[Settings], float]
    check: Callable[[Settings], object]
    options: tuple[str, ...] = ()
