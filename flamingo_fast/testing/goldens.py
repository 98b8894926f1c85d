"""What compiled kernels must not exceed: rules for all, and goldens for one Triton version.

kernels/goldens/triton-<version>.json maps case -> target -> kernel -> the numbers of its binary and
the hash of its source. Numbers of another Triton version differ for reasons that are not ours, so
goldens are compared with their own version only.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flamingo_fast
from flamingo_fast.testing.aot import Compiled, PlannedCompile
from flamingo_fast.testing.binaries import Binary
from flamingo_fast.testing.occupancy import ARCHITECTURES, occupancy

FOLDER = Path(flamingo_fast.__file__).parent / "kernels" / "goldens"

# Register allocation moves by a few from one change to the next; more than this means something.
REGISTER_SLACK = 8
# Columns of an SM of sm_100.
TENSOR_MEMORY = 512


@dataclasses.dataclass(frozen=True)
class Golden:
    """The part of a binary's numbers that a change must not make worse; units as in Binary."""

    source: str
    registers: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: int
    load_bits: int
    store_bits: int


Goldens = dict[tuple[str, str, str], Golden]
"""By case, target and kernel."""


def golden_path(triton_version: str, folder: Path = FOLDER) -> Path:
    """Where the goldens of this version are, if there are any."""
    return folder / f"triton-{triton_version}.json"


def load_goldens(triton_version: str, folder: Path = FOLDER) -> Goldens | None:
    """None: there are none for this version."""
    path = golden_path(triton_version, folder)
    if not path.is_file():
        return None
    return {
        (case, target, kernel): Golden(**numbers)
        for case, targets in json.loads(path.read_text()).items()
        for target, kernels in targets.items()
        for kernel, numbers in kernels.items()
    }


def save_goldens(goldens: Goldens, triton_version: str, folder: Path = FOLDER) -> Path:
    """Sorted, one kernel a line, so that a diff shows what moved."""
    tree: dict[str, dict[str, dict[str, Any]]] = {}
    for (case, target, kernel), golden in sorted(goldens.items()):
        tree.setdefault(case, {}).setdefault(target, {})[kernel] = dataclasses.asdict(golden)
    cases = []
    for case, targets in tree.items():
        lines = [
            f"  {json.dumps(target)}: {{\n"
            + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
            + "\n  }"
            for target, kernels in targets.items()
        ]
        cases.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    path = golden_path(triton_version, folder)
    path.write_text("{\n" + ",\n".join(cases) + "\n}\n")
    return path


def key_of(plan: PlannedCompile) -> tuple[str, str, str]:
    """What a kernel's golden is found by."""
    return plan.case, plan.target, plan.kernel


def golden_of(outcome: Compiled) -> Golden:
    """What to save for a kernel that compiled."""
    numbers = dataclasses.asdict(outcome.binary) if outcome.binary else {}
    names = {field.name for field in dataclasses.fields(Golden)} - {"source"}
    return Golden(outcome.plan.source, **{name: numbers[name] for name in names})


def failures(outcome: Compiled, goldens: Goldens | None) -> list[str]:
    """What is wrong with a compiled kernel, in words; goldens None: the rules for all only."""
    binary, rules = outcome.binary, outcome.plan.rules
    if binary is None:
        return [f"does not compile: {outcome.error}"]
    found = []
    if (binary.spills or binary.local_bytes) and not rules.may_spill:
        found.append(f"spills: {binary.spills} local accesses, {binary.local_bytes} B a thread")
    limit = ARCHITECTURES[outcome.plan.target].shared_per_block
    if binary.shared_bytes > limit:
        found.append(f"shared memory: {binary.shared_bytes} B, limit {limit} B")
    if binary.tensor_memory > TENSOR_MEMORY:
        found.append(f"tensor memory: {binary.tensor_memory} columns, limit {TENSOR_MEMORY}")
    if binary.tf32 and not rules.allow_tf32:
        found.append("TF32 in a kernel that did not ask for it")
    found += _narrow_accesses(outcome.plan, binary)
    found += _idle_hardware(outcome.plan, binary)
    if goldens is not None:
        found += _regressions(outcome, goldens.get(key_of(outcome.plan)))
    return found


def _narrow_accesses(plan: PlannedCompile, binary: Binary) -> list[str]:
    # A block of as many warps has twice the threads on gfx942, so half as much falls to each.
    if not plan.target.startswith("sm_"):
        return []
    kernel, found = plan.kernel.partition("#")[0], []
    if kernel in plan.rules.loads_128bit and binary.load_bits < 128:
        found.append(f"widest global load: {binary.load_bits} bits, required 128")
    if kernel in plan.rules.stores_128bit and binary.store_bits < 128:
        found.append(f"widest global store: {binary.store_bits} bits, required 128")
    return found


def _idle_hardware(plan: PlannedCompile, binary: Binary) -> list[str]:
    kernel, found = plan.kernel.partition("#")[0], []
    others = binary.matrix_instructions - binary.wgmma
    if kernel in plan.rules.wgmma and plan.target == "sm_90" and others:
        found.append(f"{others} matrix instructions other than wgmma")
    if kernel in plan.rules.tensor_cores and binary.matrix_instructions == 0:
        found.append("no matrix instructions")
    if kernel in plan.rules.two_blocks and plan.target in ("sm_80", "sm_90"):
        resident = occupancy(plan.target, binary.registers, binary.num_warps, binary.shared_bytes)
        if resident.blocks < 2:
            found.append(f"blocks an SM: {resident.blocks}, required 2")
    return found


def _regressions(outcome: Compiled, golden: Golden | None) -> list[str]:
    if golden is None:
        return ["no golden; write it with `flamingo-fast kernels --update`"]
    now, found = golden_of(outcome), []
    if now.registers > golden.registers + REGISTER_SLACK:
        found.append(f"registers: {now.registers}, golden {golden.registers}")
    # Where spills are allowed they count as the registers that they stand for.
    if now.local_bytes > golden.local_bytes + 4 * REGISTER_SLACK:
        found.append(f"local_bytes: {now.local_bytes}, golden {golden.local_bytes}")
    if now.shared_bytes > golden.shared_bytes:
        found.append(f"shared_bytes: {now.shared_bytes}, golden {golden.shared_bytes}")
    for name in ("matrix_instructions", "load_bits", "store_bits"):
        if getattr(now, name) < getattr(golden, name):
            found.append(f"{name}: {getattr(now, name)}, golden {getattr(golden, name)}")
    return found


def changed(plans: Iterable[PlannedCompile], goldens: Goldens) -> list[PlannedCompile]:
    """Those whose source is not the one that their golden was made from, or that have none."""
    return [
        plan
        for plan in plans
        if (golden := goldens.get(key_of(plan))) is None or golden.source != plan.source
    ]


def rotating_sample(
    plans: Iterable[PlannedCompile], size: int, revision: str
) -> list[PlannedCompile]:
    """`size` plans that `revision` chooses: the same for one revision, others for the next."""
    return sorted(plans, key=lambda plan: _rank(plan, revision))[:size]


def _rank(plan: PlannedCompile, revision: str) -> bytes:
    return hashlib.sha256("\0".join((revision, *key_of(plan))).encode()).digest()


def checkout() -> Path | None:
    """Root of the source tree that this package runs from; None: it is installed."""
    root = Path(flamingo_fast.__file__).resolve().parent.parent
    return root if (root / ".git").exists() and (root / "kernels").is_dir() else None


def revision() -> str:
    """What moves the sample on: the commit that is checked out; elsewhere the package's version."""
    if (root := checkout()) and shutil.which("git"):
        head = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"], cwd=root, capture_output=True, text=True
        )
        if head.returncode == 0:
            return head.stdout.strip()
    return flamingo_fast.__version__
