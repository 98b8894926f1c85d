"""NVTX ranges, or torch.profiler's, in any Flamingo-style model."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from flamingo_fast.profiling.parts import find_parts
from flamingo_fast.ranges import Ranges, measured_by

DOMAIN = "flamingo_fast"
TORCH_PREFIX = f"{DOMAIN}: "
BACKENDS = ("nvtx", "torch")


class Annotation:
    """Ranges that are on until `remove`; a context manager that removes them."""

    def __init__(self, ranges: Ranges, parts: list[tuple[str, nn.Module]]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(measured_by(ranges))
            stack.enter_context(ranges.watch(parts))
            self._stack = stack.pop_all()

    def remove(self) -> None:
        """Takes all hooks off again; once is enough."""
        self._stack.close()

    def __enter__(self) -> "Annotation":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def annotate(model: nn.Module, *, backend: str = "nvtx") -> Annotation:
    """Names stretches of what `model` does, forward and backward, for a profiler.

    Names are those of `flamingo_fast.profiling.parts.find_parts` with the shape of what each part
    is given, such as "lm layer 3 (2, 256, 1024)", and " backward" after that of what is the
    backward's; and what `flamingo_fast.ranges.span` marks: "step", "data wait", "dataset m3w",
    "backward", "optimiser", "all-reduce". Nothing that is computed changes. Without a call of this
    no hook is there. The backward of a part whose output is then changed in place is that of what
    is around it.

    Arguments:
        model: ours or a peer's, patched or not, of which `find_parts` knows parts; of any other
            only the layers. Hooks make what isn't compiled yet compile anew: compile it before.
        backend: "nvtx", ranges of the domain "flamingo_fast", for Nsight Systems and Compute; or
            "torch", `torch.profiler.record_function`, with "flamingo_fast: " before the name.

    Returns:
        What removes them again. Meanwhile `flamingo_fast.ranges` has no other listener.

    Raises:
        ValueError: an unknown backend.
        ImportError: the package nvtx is not installed; it names the extra.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    told: _Told = _Nvtx() if backend == "nvtx" else _Torch()
    return Annotation(Ranges(told.push, told.pop, detailed=True), find_parts(model))


class _Told(Protocol):
    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class _Nvtx:
    """Ranges that begin in the thread that made this are pushed and popped.

    Autograd has a thread for each GPU, and what it leaves open ends in the one that called it: a
    range there has a start and an end, which may be anywhere.
    """

    def __init__(self) -> None:
        self._domain = nvtx_domain()
        self._attributes: dict[str, Any] = {}
        self._ends: list[Callable[[], None]] = []
        self._home = threading.get_ident()

    def push(self, name: str) -> None:
        attributes = self._attributes.get(name)
        if attributes is None:
            attributes = self._domain.get_event_attributes(message=name)
            self._attributes[name] = attributes
        if threading.get_ident() == self._home:
            self._domain.push_range(attributes)
            self._ends.append(self._domain.pop_range)
        else:
            started = self._domain.start_range(attributes)
            self._ends.append(lambda: self._domain.end_range(started))

    def pop(self) -> None:
        self._ends.pop()()


class _Torch:
    def __init__(self) -> None:
        self._open: list[Any] = []

    def push(self, name: str) -> None:
        entered = torch.profiler.record_function(TORCH_PREFIX + name)
        entered.__enter__()
        self._open.append(entered)

    def pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


def nvtx_domain() -> Any:
    """The package nvtx's domain of our ranges.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import nvtx
    except ImportError as error:
        raise ImportError(
            "nvtx is not installed, and names ranges: pip install 'flamingo_fast[profile]'"
        ) from error
    domain = nvtx.get_domain(DOMAIN)
    # Set by nsys and ncu for the process that they start.
    has_tool = "NVTX_INJECTION64_PATH" in os.environ
    if has_tool and type(domain).__name__ == "DummyDomain":
        return _of_old_tool()
    return domain


def _of_old_tool() -> Any:
    """A tool of before 2023 doesn't know the question whether it wants a domain.

    nvtx from 0.2.11 on takes that for a no.
    """
    from nvtx._lib import Domain
    from nvtx._lib.lib import DomainHandle

    domain = object.__new__(Domain)
    domain.handle = DomainHandle(DOMAIN)
    domain.__init__(DOMAIN)
    return domain
