"""Which implementation of an op runs, and how ops are registered with PyTorch."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flamingo_fast.namespace import NAMESPACE
from flamingo_fast.ops.checks import one_of
from flamingo_fast.watchers import is_differentiated_otherwise, is_watched

IMPLS = ("auto", "triton", "torch", "reference")
# Kernels of other libraries, one sequence of keys a medium.
VARLEN_IMPLS = ("varlen", "flash_attn", "xformers")
ATTENTION_IMPLS = (*IMPLS, "sdpa", *VARLEN_IMPLS)

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_default_impl = "auto"


class BackendUnavailableError(RuntimeError):
    """An implementation was asked for by name and can't run here; the message says why."""


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Makes `impl` what ops called with impl="auto" use inside the block.

    Activation checkpointing calls the ops again in the backward, which then belongs in the block.
    Ops that don't have `impl` keep "auto": "sdpa", "varlen", "flash_attn" and "xformers" are of
    attention ops only.

    Raises:
        ValueError: `impl` is none of "auto", "triton", "torch", "reference" and these.
    """
    global _default_impl
    check_impl(impl, ATTENTION_IMPLS)
    previous, _default_impl = _default_impl, impl
    try:
        yield
    finally:
        _default_impl = previous


def check_impl(impl: str, known: tuple[str, ...] = IMPLS) -> str:
    """`impl` itself, if it names an implementation."""
    return one_of("impl", impl, known)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """That of products of x inside autocast; None outside it, and of fp64, which it leaves alone.

    None of meta tensors, too: PyTorch raises where it is asked about their device.
    """
    device_type = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of `device`; None if they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed (`pip install triton`; Linux only)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"Triton kernels need a GPU and the tensors are on {device.type!r} "
            "(TRITON_INTERPRET=1, set before the first use, runs them in Triton's interpreter)"
        )
    return None


def choose_impl(
    impl: str,
    x: torch.Tensor,
    not_in_triton: str | None = None,
    known: tuple[str, ...] = IMPLS,
) -> str:
    """Returns the implementation of `known` that an op on `x` was asked for; "auto" is decided.

    Arguments:
        not_in_triton: why the op's kernels can't take these arguments; "auto" then avoids them.
    """
    check_impl(impl, known)
    if impl == "auto" and _default_impl in known:
        impl = _default_impl
    if x.dtype == torch.float64:
        not_in_triton = "the kernels take fp32, fp16 and bf16; this is fp64"
    if impl == "auto":
        on_gpu = x.device.type == "cuda" and TRITON_INSTALLED and "triton" in known
        impl = "triton" if on_gpu and not_in_triton is None else "torch"
    elif impl == "triton" and (reason := not_in_triton or why_not_triton(x.device)):
        raise BackendUnavailableError(f'impl="triton": {reason}')
    return impl


def resolve_impl(impl: str, x: torch.Tensor, not_in_triton: str | None = None) -> str:
    """`choose_impl` of an op whose `torch` implementation is written for eager mode on a CPU.

    Elsewhere, and under torch.compile, where Inductor fuses better than hand-chosen calls, it is
    the reference.
    """
    impl = choose_impl(impl, x, not_in_triton)
    if impl == "torch" and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return "reference"
    return impl


_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register_op(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers torch.ops.flamingo_fast.<name> and returns a function that calls it.

    Tracers, modes and profilers see the op. On plain tensors in eager mode the function calls the
    implementation itself: PyTorch's way to it and back costs a GPU's caller more than the launch.
    No autograd formula is registered: an autograd.Function around the op costs a third of
    what `register_autograd` adds to a call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments: Any) -> Any:
        if is_watched() or not _are_plain(arguments):
            return overload(*arguments)
        return implementation(*arguments)

    return call


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether all tensors are PyTorch's own, with memory: not those of vmap, for one."""
    for each in arguments:
        if isinstance(each, torch.Tensor) and (
            type(each) not in _PLAIN or each.is_meta or not torch._C._has_storage(each)
        ):
            return False
    return True


class _NoContext:
    """For the forward of an autograd.Function that nobody asks for a backward."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = (False,) * len(arguments)

    def save_for_backward(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, wanted: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward alone where no gradient can come back."""
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in arguments
    )
    if wants_grad or is_differentiated_otherwise():
        return function.apply(*arguments)
    return function.forward(_NoContext(arguments), *arguments)


class _Undifferentiable(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, dgradient: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: its gradients have no gradients of their own (create_graph=True); "
            'impl="reference" has them'
        )


def differentiable_once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward of an autograd.Function, of the op `name`: a second one raises.

    PyTorch's once_differentiable does so only where a gradient that came in needs one itself. That
    of a sum doesn't, and what depends on the op's gradient then counts as a constant, silently.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def call(ctx: Any, *douts: Any) -> Any:
            with torch.no_grad():
                gradients = backward(ctx, *douts)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            several = isinstance(gradients, tuple)
            marked = tuple(
                _Undifferentiable.apply(each.detach().requires_grad_(), name)
                if isinstance(each, torch.Tensor)
                else each
                for each in (gradients if several else (gradients,))
            )
            return marked if several else marked[0]

        return call

    return decorate


def empty_gradient(
    parameter: torch.Tensor | None, wanted: bool, like: torch.Tensor
) -> torch.Tensor:
    """Memory for the gradient of `parameter`; fp32 of no elements, on like's device, if not wanted.

    Ops can't return None, and their outputs may not alias, so each needs an empty one of its own.
    """
    if parameter is None or not wanted:
        return like.new_empty(0, dtype=torch.float32)
    return parameter.new_empty(parameter.shape)
