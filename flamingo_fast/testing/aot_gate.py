"""The ahead-of-time gate: which kernels are compiled, whether they pass, and the table of it.

`flamingo-fast kernels` and the tests are its callers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flamingo_fast.testing.aot import TARGETS, Compiled, Compiler, PlannedCompile
from flamingo_fast.testing.goldens import (
    Goldens,
    changed,
    checkout,
    failures,
    golden_of,
    key_of,
    load_goldens,
    revision,
    rotating_sample,
    save_goldens,
)
from flamingo_fast.testing.occupancy import occupancy


class BadSelectionError(ValueError):
    """The user asked for what there is not; the message names it."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which compiles to make.

    targets: architectures.
    case: part of the names of cases.
    changed, sample: if either is set, only the kernels whose source differs from their golden's,
        and a sample of this size, which the commit chooses; otherwise all.
    """

    targets: tuple[str, ...] = TARGETS
    case: str = ""
    changed: bool = False
    sample: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(TARGETS):
            raise BadSelectionError(
                f"target: expected some of {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}"
            )

    @property
    def everything(self) -> bool:
        partial = self.case or self.changed or self.sample
        return not partial and set(self.targets) == set(TARGETS)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A compiled kernel and what is wrong with it."""

    outcome: Compiled
    failures: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON; the numbers are Binary's, with the occupancy they allow."""
        plan, binary = self.outcome.plan, self.outcome.binary
        numbers: dict[str, Any] = {"case": plan.case, "target": plan.target, "kernel": plan.kernel}
        if binary is not None:
            resident = occupancy(
                plan.target, binary.registers, binary.num_warps, binary.shared_bytes
            )
            numbers |= dataclasses.asdict(binary)
            numbers |= {"blocks_per_sm": resident.blocks, "warps_per_sm": resident.warps}
        return numbers | {"source": plan.source, "failures": self.failures}


@dataclasses.dataclass(frozen=True)
class GateReport:
    """notes: what a reader must know beside the numbers, a line each."""

    verdicts: list[Verdict]
    notes: list[str]

    @property
    def passed(self) -> bool:
        return not any(verdict.failures for verdict in self.verdicts)


def run_gate(
    compiler: Compiler,
    selection: Selection,
    *,
    update: bool = False,
    progress: Callable[[Iterable[Compiled], int], Iterable[Compiled]] | None = None,
) -> GateReport:
    """Compiles what `selection` says and judges it.

    Arguments:
        update: write the numbers as goldens instead of comparing with those that there are.
        progress: wraps the outcomes as they come; its second argument is how many will.

    Raises:
        BadSelectionError: no case of that name, or `update` outside a checkout: goldens belong to
            the source tree.
        FileNotFoundError: Triton came without the tools that read NVIDIA binaries.
    """
    if update and checkout() is None:
        raise BadSelectionError(
            "update: goldens belong to the source tree; this is an installed copy"
        )
    version = compiler.triton_version()
    goldens = load_goldens(version)
    notes = []
    if goldens is None:
        notes.append(f"no goldens for Triton {version}: only the rules for all kernels are checked")
    plans = [plan for plan in compiler.plan(selection.targets) if selection.case in plan.case]
    if not plans:
        raise BadSelectionError(f"case: no kernel case has {selection.case!r} in its name")
    if selection.changed or selection.sample:
        plans, note = _select(plans, selection, goldens)
        notes.append(note)
    outcomes = compiler.compile(plans)
    ordered = sorted(
        progress(outcomes, len(plans)) if progress else outcomes,
        key=lambda outcome: (
            outcome.plan.case,
            TARGETS.index(outcome.plan.target),
            outcome.plan.kernel,
        ),
    )
    if update:
        notes.append(_update(ordered, selection, goldens, version))
        goldens = None
    return GateReport([Verdict(outcome, failures(outcome, goldens)) for outcome in ordered], notes)


def _select(
    plans: Sequence[PlannedCompile], selection: Selection, goldens: Goldens | None
) -> tuple[list[PlannedCompile], str]:
    moved = changed(plans, goldens) if selection.changed and goldens is not None else []
    salt = revision()
    sample = rotating_sample(plans, selection.sample, salt)
    chosen = moved + [plan for plan in sample if plan not in moved]
    note = f"{len(moved)} changed since their golden"
    if selection.changed and goldens is None:
        note = "without goldens what changed is unknown"
    return chosen, f"of {len(plans)} compiles: {note}; sample of {len(sample)} chosen by {salt}"


def _update(
    outcomes: Iterable[Compiled], selection: Selection, goldens: Goldens | None, version: str
) -> str:
    kept: Goldens = {} if selection.everything or goldens is None else goldens
    new = {
        key_of(outcome.plan): golden_of(outcome)
        for outcome in outcomes
        if not failures(outcome, None)
    }
    return f"wrote {len(new)} goldens to {save_goldens(kept | new, version)}"


def render(report: GateReport) -> Table:
    """One row a compiled kernel; failures last, where the eye falls first after a long table."""
    failed = sum(bool(verdict.failures) for verdict in report.verdicts)
    notes = [*report.notes, f"{failed} of {len(report.verdicts)} kernels failed"]
    table = Table(box=box.SIMPLE, caption="\n".join(notes), caption_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _TEXT else "right", overflow="fold")
    for verdict in sorted(report.verdicts, key=lambda verdict: bool(verdict.failures)):
        numbers = verdict.as_dict()
        # Not markup: an error of the compiler may hold brackets.
        result = Text("\n".join(verdict.failures) or "ok", "red" if verdict.failures else "green")
        kernel = numbers["kernel"].removeprefix("_").replace("_kernel", "")
        names = (numbers["case"], numbers["target"], kernel)
        if verdict.outcome.binary is None:
            table.add_row(*names, *[""] * 8, result)
            continue
        table.add_row(
            *names,
            str(numbers["registers"]),
            str(numbers["spills"]),
            f"{numbers['shared_bytes'] / 1024:.1f}",
            str(numbers["matrix_instructions"]),
            f"{numbers['load_bits']}/{numbers['store_bits']}",
            "yes" if numbers["tf32"] else "",
            str(numbers["instructions"]),
            f"{numbers['blocks_per_sm']}/{numbers['warps_per_sm']}",
            result,
        )
    return table


_COLUMNS = (
    "case",
    "target",
    "kernel",
    "regs",
    "spills",
    "shared\nKiB",
    "matrix\ninstr.",
    "load/store\nbits",
    "TF32",
    "instr.",
    "blocks/warps\nan SM",
    "result",
)
_TEXT = {"case", "target", "kernel", "TF32", "result"}
