"""The hot loop of a kernel's machine code, with the registers that are live at each instruction.

`flamingo-fast kernels --sass KERNEL ARCH`. The loop is the innermost one with the most matrix
instructions, and of those without any the longest.
"""

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from flamingo_fast.testing.aot import TARGETS, Compiler, PlannedCompile, compile_launch
from flamingo_fast.testing.binaries import Binary, nvidia_tools, read_binary
from flamingo_fast.testing.occupancy import occupancy

_LABEL = re.compile(r"(\.L\w+):")
# Address, predicate and instruction; and, if it is there, a table of live registers of each kind.
_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;(?:\s*//\s*\|\s*(\d*)\s*\|)?")
_SASS_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SASS_TARGET = re.compile(r"\bU?BRA\b.*`\((\.L\w+)\)")
_GCN_OPCODE = re.compile(r"([a-z]\w*)")
_GCN_TARGET = re.compile(r"s_c?branch\w*\s+(\.L\w+)")

_MATRIX = re.compile(r"[A-Z]+MMA|v_s?mfma")
# From memory of all kinds, and back; spills are "local".
_ACCESSES = {
    "global loads": re.compile(r"LDG(?:STS)?\b|UTMALDG|(?:global|buffer|flat)_load"),
    "global stores": re.compile(r"STG\b|UTMASTG|(?:global|buffer|flat)_store"),
    "shared loads": re.compile(r"LDSM?\b|ds_read"),
    "shared stores": re.compile(r"STSM?\b|ds_write"),
    "local accesses": re.compile(r"LDL\b|STL\b|scratch_"),
}
_SHOWN_OPCODES = 16


class NoSuchKernelError(ValueError):
    """The user asked for what there is not; the message names what there is."""


class DoesNotCompileError(RuntimeError):
    """With the compiler's message."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`live`: general registers of a thread; None: not known."""

    text: str
    opcode: str
    live: int | None
    labels: tuple[str, ...] = ()
    target: str = ""

    @property
    def is_matrix(self) -> bool:
        return bool(_MATRIX.match(self.opcode))


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel: its numbers, and its program.

    why_not_live: why live registers are not known; empty: they are.
    """

    plan: PlannedCompile
    binary: Binary
    instructions: tuple[Instruction, ...]
    why_not_live: str = ""


def read_sass(listing: str) -> tuple[Instruction, ...]:
    """From `nvdisasm -c -lrm=count`, or without the live registers from `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels.append(label.group(1))
        elif found := _SASS_LINE.match(line):
            text, live = found.groups()
            opcode, target = _SASS_OPCODE.match(text), _SASS_TARGET.search(text)
            if opcode is None:
                raise ValueError(f"nvdisasm printed what is no instruction: {line!r}")
            instructions.append(
                Instruction(
                    text,
                    opcode.group(1),
                    None if live is None else int(live or 0),
                    tuple(labels),
                    target.group(1) if target else "",
                )
            )
            labels = []
    return tuple(instructions)


def read_gcn(assembly: str) -> tuple[Instruction, ...]:
    """From AMDGPU assembly; it tells nothing of live registers."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in assembly.partition(".amdhsa_kernel")[0].splitlines():
        if label := _LABEL.match(line):
            labels.append(label.group(1))
        text = line.partition(";")[0].strip()
        if line[:1].isspace() and (opcode := _GCN_OPCODE.match(text)):
            target = _GCN_TARGET.match(text)
            instructions.append(
                Instruction(
                    text.expandtabs(1),
                    opcode.group(1),
                    None,
                    tuple(labels),
                    target.group(1) if target else "",
                )
            )
            labels = []
    return tuple(instructions)


def hot_loop(instructions: Sequence[Instruction]) -> range | None:
    """Positions of the loop's instructions, its branch included; None: there is no loop."""
    begins = {label: n for n, each in enumerate(instructions) for label in each.labels}
    # One instruction that branches to itself is what follows the end of a program.
    loops = [
        range(begins[each.target], end + 1)
        for end, each in enumerate(instructions)
        if begins.get(each.target, end) < end
    ]
    innermost = [
        loop
        for loop in loops
        if not any(
            other != loop and other.start >= loop.start and other.stop <= loop.stop
            for other in loops
        )
    ]
    return max(innermost, key=lambda loop: _weight(instructions, loop), default=None)


def _weight(instructions: Sequence[Instruction], loop: range) -> tuple[int, int]:
    return sum(instructions[n].is_matrix for n in loop), len(loop)


def short_name(kernel: str) -> str:
    """What a user may call it: without the underscore and the word "kernel"."""
    return kernel.partition("#")[0].removeprefix("_").removesuffix("_kernel")


def choose(
    plans: Sequence[PlannedCompile], kernel: str, arch: str, case: str = ""
) -> list[PlannedCompile]:
    """Those of a kernel, of cases with `case` in their names: bf16 first, in the cases' order.

    Raises:
        NoSuchKernelError: there are none.
    """
    of_arch = [plan for plan in plans if plan.target == arch]
    named = [plan for plan in of_arch if short_name(plan.kernel) == short_name(kernel)]
    if not named:
        known = ", ".join(dict.fromkeys(short_name(plan.kernel) for plan in of_arch))
        raise NoSuchKernelError(f"sass: no kernel {kernel!r}; kernels: {known}")
    found = [plan for plan in named if case in plan.case]
    if not found:
        known = ", ".join(dict.fromkeys(plan.case for plan in named))
        raise NoSuchKernelError(f"case: none that starts {kernel} has {case!r} in it; {known}")
    return sorted(found, key=lambda plan: "/bf16" not in plan.case)


def check_arch(arch: str) -> None:
    """Raises NoSuchKernelError for an architecture that kernels aren't compiled for."""
    if arch not in TARGETS:
        raise NoSuchKernelError(
            f"sass: expected an architecture of {', '.join(TARGETS)}; got {arch!r}"
        )


def show_hot_loop(compiler: Compiler, kernel: str, arch: str, case: str = "") -> str:
    """Text of many lines.

    Arguments:
        compiler: of the ahead-of-time gate's cases.
        kernel, arch: as `short_name` has it, or the function's own name; one of TARGETS.
        case: part of the name of the case whose configuration to show.

    Raises:
        NoSuchKernelError: no such kernel, architecture or case.
        DoesNotCompileError: it does not.
        FileNotFoundError: Triton came without NVIDIA's tools.
    """
    check_arch(arch)
    chosen = choose(compiler.plan((arch,)), kernel, arch, case)
    code = compiler.submit(compile_code, compiler.cases_module, chosen[0]).result()
    others = [plan.case for plan in chosen[1:]]
    return render(code, others)


def compile_code(cases_module: str, plan: PlannedCompile) -> Code:
    """To be called where kernels are compiled; raises DoesNotCompileError."""
    try:
        compiled = compile_launch(cases_module, plan)
    except Exception as error:
        # Whatever Triton and LLVM raise may not be what another process can unpickle.
        raise DoesNotCompileError(
            f"{plan.kernel} of {plan.case} does not compile for {plan.target}: {error}"
        ) from None
    return Code(plan, read_binary(compiled), *_instructions(compiled))


def _instructions(compiled: Any) -> tuple[tuple[Instruction, ...], str]:
    """And why live registers are not known."""
    if "cubin" not in compiled.asm:
        return read_gcn(compiled.asm["amdgcn"]), "no tool tells those of AMD's instructions"
    _, nvdisasm = nvidia_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [nvdisasm, "-c", file.name]
        # Some releases can't for sm_80 and sm_89, nor where a thread has 255 registers.
        listing = subprocess.run([*command, "-lrm=count"], capture_output=True, text=True)
        why_not = ""
        if listing.returncode != 0:
            why_not = (listing.stderr.strip().splitlines() or ["nvdisasm failed"])[-1]
            listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return read_sass(listing.stdout), why_not


def render(code: Code, others: Sequence[str]) -> str:
    """The loop, a line each, and below what it is made of.

    Arguments:
        others: cases that start the kernel too.
    """
    loop = hot_loop(code.instructions)
    shown = [code.instructions[n] for n in loop or range(len(code.instructions))]
    plan = code.plan
    what = "no loop, so all of it" if loop is None else "the hot loop"
    lines = [f"{plan.kernel} of {plan.case} on {plan.target}: {what}"]
    unknown = f"live registers not known: {code.why_not_live}" if code.why_not_live else ""
    lines.append(unknown or "live registers of a thread, instruction")
    for each in shown:
        lines += [f"{'':5} {label}:" for label in each.labels]
        lines.append(f"{'' if each.live is None else each.live:>5}   {each.text}")
    return "\n".join([*lines, "", *_summary(code, shown), *_about(others)])


def _summary(code: Code, shown: Sequence[Instruction]) -> list[str]:
    binary, target = code.binary, code.plan.target
    resident = occupancy(target, binary.registers, binary.num_warps, binary.shared_bytes)
    mix = collections.Counter(each.opcode.partition(".")[0] for each in shown)
    names = [f"{name} {count}" for name, count in mix.most_common(_SHOWN_OPCODES)]
    others = sum(count for _, count in mix.most_common()[_SHOWN_OPCODES:])
    names += [f"others {others}"] if others else []
    lines = [
        f"registers {binary.registers}, spills {binary.spills} ({binary.local_bytes} B a thread), "
        f"shared memory {binary.shared_bytes} B, warps {binary.num_warps}; "
        f"blocks an SM {resident.blocks}",
        f"instructions {len(shown)} of {len(code.instructions)}: {', '.join(names)}",
    ]
    most = max((each.live for each in shown if each.live is not None), default=None)
    if most is not None:
        whole = max(each.live or 0 for each in code.instructions)
        lines.append(f"live registers, at most: {most}, in the whole program {whole}")
    matrix = collections.Counter(each.opcode for each in shown if each.is_matrix)
    lines.append(f"matrix instructions: {_listed(matrix) if matrix else 'none'}")
    for name, pattern in _ACCESSES.items():
        accesses = collections.Counter(each.opcode for each in shown if pattern.match(each.opcode))
        if accesses:
            lines.append(f"{name}: {_listed(accesses)}")
    return lines


def _listed(counts: "collections.Counter[str]") -> str:
    return ", ".join(f"{count} {opcode}" for opcode, count in counts.most_common())


def _about(others: Sequence[str]) -> list[str]:
    if not others:
        return []
    more = f", and {len(others) - 8} more" if len(others) > 8 else ""
    return [f"--case chooses another one: {', '.join(others[:8])}{more}"]
