"""Compiles kernels for GPUs that are not there.

A case calls a launcher with meta tensors; `flamingo_fast.kernels.launch.recording` catches what it
would have started, and Triton's own just-in-time path binds and compiles that for the target. So
signatures, alignment and `== 1` specialisation are those of a real launch.

Everything that touches Triton runs in worker processes: under TRITON_INTERPRET=1 the kernels of
this process are interpreted functions, which cannot be compiled.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from flamingo_fast.ops.dispatch import TRITON_INSTALLED
from flamingo_fast.testing.binaries import Binary, nvidia_tools, read_binary
from flamingo_fast.testing.occupancy import ARCHITECTURES

TARGETS = tuple(ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a case's binaries may and must do, beyond what holds for all.

    allow_tf32: the case asks for TF32.
    may_spill: why registers may spill; empty: they may not.
    loads_128bit, stores_128bit: kernels whose widest global access must have 128 bits on NVIDIA.
    tensor_cores: kernels whose products must be matrix instructions.
    wgmma: those of them that on sm_90 must have no others than a warp group's.
    two_blocks: kernels of which an SM of sm_80 and sm_90 must hold two blocks.
    """

    allow_tf32: bool = False
    may_spill: str = ""
    loads_128bit: tuple[str, ...] = ()
    stores_128bit: tuple[str, ...] = ()
    tensor_cores: tuple[str, ...] = ()
    wgmma: tuple[str, ...] = ()
    two_blocks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """`run` calls one launcher on meta tensors; it may start several kernels."""

    name: str
    run: Callable[[], object]
    rules: Rules = Rules()


@dataclasses.dataclass(frozen=True)
class PlannedCompile:
    """One kernel of one case for one target, not compiled yet.

    kernel: its name; "name#2" for the second different launch of one kernel.
    launch: its position among the launches of the case.
    source: hash of the kernel's code and of everything else that its binary depends on, but for
        the Triton version. Equal sources are compiled once.
    specialization: types, alignment and constants of the arguments, as Triton's cache knows them.
    """

    case: str
    target: str
    kernel: str
    launch: int
    source: str
    specialization: str
    rules: Rules


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The outcome: either a binary's numbers or the compiler's error."""

    plan: PlannedCompile
    binary: Binary | None
    error: str = ""


class Compiler:
    """A pool of processes that plan and compile the cases of a module. Use as a context manager.

    Arguments:
        cases_module: an importable module with CASES, an iterable of KernelCase.
        workers: processes; by default one a core.

    Raises:
        ImportError: Triton is not installed.
    """

    def __init__(
        self,
        cases_module: str = "flamingo_fast.testing.kernel_cases",
        workers: int | None = None,
    ) -> None:
        if not TRITON_INSTALLED:
            raise ImportError("kernels can't be compiled: Triton is not installed (Linux only)")
        self.cases_module = cases_module
        self._pool = ProcessPoolExecutor(
            workers or os.cpu_count(),
            # Not fork: a child must import Triton afresh.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_leave_interpreter,
        )

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def plan(self, targets: Iterable[str] = TARGETS) -> list[PlannedCompile]:
        """Every compile that the cases ask for, in the order of cases and targets.

        Raises:
            FileNotFoundError: Triton came without the tools that read NVIDIA binaries.
        """
        return self._pool.submit(_plan, self.cases_module, tuple(targets)).result()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """`function`, of an importable module, in one of the processes."""
        return self._pool.submit(function, *arguments)

    def triton_version(self) -> str:
        return self._pool.submit(_triton_version).result()

    def compile(self, plans: Iterable[PlannedCompile]) -> Iterator[Compiled]:
        """One outcome for each plan, as they come."""
        by_source: dict[str, list[PlannedCompile]] = {}
        for plan in plans:
            by_source.setdefault(plan.source, []).append(plan)
        futures: dict[Future[Compiled], list[PlannedCompile]] = {
            self._pool.submit(_compile, self.cases_module, plans_of_one[0]): plans_of_one
            for plans_of_one in by_source.values()
        }
        for future in as_completed(futures):
            outcome = future.result()
            for plan in futures[future]:
                yield dataclasses.replace(outcome, plan=plan)


def _leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _triton_version() -> str:
    import triton

    return triton.__version__


def _plan(cases_module: str, targets: tuple[str, ...]) -> list[PlannedCompile]:
    if any(target.startswith("sm_") for target in targets):
        nvidia_tools()
    plans: list[PlannedCompile] = []
    for case in importlib.import_module(cases_module).CASES:
        for target in targets:
            of_kernels: dict[str, PlannedCompile] = {}
            for plan, _ in plan_launches(case, target):
                of_kernels.setdefault(plan.kernel, plan)
            plans += of_kernels.values()
    return plans


def plan_launches(case: KernelCase, target: str) -> list[tuple[PlannedCompile, Any]]:
    """The compile that each launch of a case needs, in order, and the launch.

    Launches of one binary differ in `launch` alone. To be called where kernels are compiled, so in
    a `Compiler`'s processes.
    """
    plans: list[tuple[PlannedCompile, Any]] = []
    sources: dict[str, list[str]] = {}
    for position, launch in enumerate(_launches(case, target)):
        specialization = _specialization(launch, target)
        source = _hash(target, source_of(launch.kernel), specialization)
        seen = sources.setdefault(launch.kernel.__name__, [])
        if source not in seen:
            seen.append(source)
        number = seen.index(source) + 1
        kernel = launch.kernel.__name__ + (f"#{number}" if number > 1 else "")
        plan = PlannedCompile(
            case.name, target, kernel, position, source, specialization, case.rules
        )
        plans.append((plan, launch))
    return plans


def compile_launch(cases_module: str, plan: PlannedCompile) -> Any:
    """The CompiledKernel of a plan; to be called as `plan_launches`.

    Raises:
        Exception: whatever Triton and LLVM raise.
    """
    cases = {case.name: case for case in importlib.import_module(cases_module).CASES}
    launch = _launches(cases[plan.case], plan.target)[plan.launch]
    return _warmup(launch, plan.target, plan.target)


def _compile(cases_module: str, plan: PlannedCompile) -> Compiled:
    try:
        return Compiled(plan, read_binary(compile_launch(cases_module, plan)))
    except Exception as error:
        # Triton and LLVM raise what they like; one kernel's failure must not hide the others'.
        lines = str(error).strip().splitlines() or [""]
        return Compiled(plan, None, f"{type(error).__name__}: {lines[-1]}")


def _launches(case: KernelCase, target: str) -> list[Any]:
    from triton.runtime import JITFunction

    from flamingo_fast.kernels.launch import Target, recording

    with recording(Target(target, ARCHITECTURES[target].num_sms)) as launches:
        case.run()
    if not all(isinstance(launch.kernel, JITFunction) for launch in launches):
        raise RuntimeError(
            "kernels can't be compiled in a process that imported them under TRITON_INTERPRET=1; "
            "guard the main module of the program with `if __name__ == '__main__':`"
        )
    return launches


class _OfflineDriver:
    """Answers what Triton's just-in-time path asks a GPU's driver before it compiles.

    A JITFunction keeps one cache of binaries a device, so `device` names what is cached together.
    """

    def __init__(self, target: str, device: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._device = device
        warp_size = ARCHITECTURES[target].warp_size
        if target.startswith("sm_"):
            self._target = GPUTarget("cuda", int(target.removeprefix("sm_")), warp_size)
        else:
            self._target = GPUTarget("hip", target, warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0


def _warmup(launch: Any, target: str, device: str) -> Any:
    from triton.runtime import driver

    driver.set_active(_OfflineDriver(target, device))
    return launch.kernel.warmup(
        *launch.args, grid=launch.grid, **launch.constexprs, **launch.options
    )


def _specialization(launch: Any, target: str) -> str:
    """The key under which Triton would cache the launch's binary, without compiling it."""
    from triton import knobs

    keys: list[str] = []

    def note_key(*, key: Any, **_: Any) -> bool:
        keys.append(str(key))
        return True  # no compilation

    previous = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note_key
    try:
        # A device of its own: where a binary is cached already, the hook is not called.
        _warmup(launch, target, f"{target}, planning")
    finally:
        knobs.runtime.jit_cache_hook = previous
    if not keys:
        raise RuntimeError(f"Triton {_triton_version()} no longer calls runtime.jit_cache_hook")
    return keys[0]


@functools.cache  # thousands of launches are of a few dozen kernels
def source_of(kernel: Any) -> str:
    """The code of a JITFunction and of all that it calls outside Triton, and their constants.

    Triton's own cache_key is no substitute: it changes with the line numbers.
    """
    found: dict[str, str] = {}
    _collect_source(kernel, found)
    return "\n".join(sorted(found.values()))


def _collect_source(function: Any, found: dict[str, str]) -> None:
    import triton.language as tl
    from triton.runtime import JITFunction

    name = f"{function.__module__}.{function.__name__}"
    if name in found:
        return
    tree = function.parse()
    found[name] = ast.unparse(tree)
    closure = inspect.getclosurevars(function.fn)
    scope = {**closure.globals, **closure.nonlocals}
    for node in ast.walk(tree):
        value = _evaluate(node, scope)
        if isinstance(value, JITFunction) and not value.__module__.startswith("triton."):
            _collect_source(value, found)
        elif isinstance(value, tl.constexpr):
            found[f"{name}:{ast.unparse(node)}"] = f"{ast.unparse(node)} = {value.value!r}"


def _evaluate(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """What a name, or attributes of one, stands for in `scope`; None for any other expression."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_evaluate(node.value, scope), node.attr, None)
    return None


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
