"""What the contract tests of both families of attention share."""

import contextlib
import functools
import unittest.mock
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flamingo_fast as ff
from flamingo_fast.kernels.launch import Target, recording
from flamingo_fast.testing.compare import outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

BF16 = torch.bfloat16


def locations_at(images=((2, 5), (0, 1, 9)), seqlen=12) -> torch.Tensor:
    locations = torch.zeros(len(images), seqlen, dtype=torch.bool)
    for sample, positions in enumerate(images):
        locations[sample, list(positions)] = True
    return locations


def previous_layout(num_media=2, media_seqlens=None, **images) -> ff.MediaLayout:
    """By default with tokens before the first medium and past the last one."""
    return ff.MediaLayout.from_media_locations(
        locations_at(**images), num_media, media_seqlens=media_seqlens
    )


def inputs_of(layout, dtype=BF16, frozen=(), num_keys=8, device="cpu") -> dict[str, torch.Tensor]:
    """Four query heads, two key/value heads, a head dim of 16."""
    media_shape = (layout.media_total, num_keys, 2, 16)
    shapes = {"q": (*layout.media_start.shape, 4, 16), "k": media_shape, "v": media_shape}
    return {
        name: random_tensor(shape, dtype, seed=seed).to(device).requires_grad_(name not in frozen)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def run_layout(
    layout,
    impl,
    dtype=BF16,
    frozen=(),
    num_keys=8,
    wrap=lambda function: function,
    **options,
) -> dict[str, torch.Tensor]:
    """The output and the gradients; `wrap` gets a function of q, k, v and the layout."""
    function = wrap(functools.partial(ff.masked_cross_attention, impl=impl, **options))
    inputs = inputs_of(layout, dtype, frozen, num_keys)
    dout = random_tensor(tuple(inputs["q"].shape), torch.float64, seed=9)
    return outputs_and_gradients(
        lambda q, k, v: function(q, k, v, layout), inputs, ("out",), [dout]
    )


def with_checkpoint(function):
    return lambda *arguments: checkpoint(function, *arguments, use_reentrant=False)


class HostSyncError(RuntimeError):
    """The host would wait for a GPU."""


class _NoSyncingOps(TorchDispatchMode):
    """Needs tensors that are not on the CPU; those of the meta device will do."""

    _aten = torch.ops.aten
    _READING = {
        _aten._local_scalar_dense,
        _aten.bincount,
        _aten.equal,
        _aten.is_nonzero,
        _aten.masked_select,
        _aten.nonzero,
        _aten.repeat_interleave,
        _aten._unique2,
        _aten.unique_consecutive,
        _aten.unique_dim,
    }
    _INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}

    @staticmethod
    def _on_cpu(args, kwargs) -> bool:
        leaves = pytree.tree_leaves((args, kwargs))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        devices |= {leaf for leaf in leaves if isinstance(leaf, torch.device)}
        return devices <= {torch.device("cpu")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func.overloadpacket
        if self._on_cpu(args, kwargs):
            return func(*args, **kwargs)
        if op in self._READING:
            raise HostSyncError(str(func))
        if op in self._INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSyncError(f"{func} by a mask")
        source = target = non_blocking = None
        if op is self._aten._to_copy:
            source, target = args[0].device, kwargs.get("device") or args[0].device
            non_blocking = kwargs.get("non_blocking", False)
        elif op is self._aten.copy_:
            source, target = args[1].device, args[0].device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source != target and (target.type == "cpu" or not non_blocking):
            raise HostSyncError(f"{func} from {source} to {target}")
        return func(*args, **kwargs)


class _NoBlockingConstants(TorchFunctionMode):
    """torch.tensor(numbers, device=...) copies them and waits, unseen by dispatch modes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            if torch.device(device).type != "cpu":
                raise HostSyncError(f"{func.__name__} on {device}")
        return func(*args, **kwargs)


def autocast_or_none(device_type: str, *args, **kwargs) -> contextlib.AbstractContextManager:
    """`torch.autocast` for models of transformers 4: they turn it off, and "meta" has none."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type, *args, **kwargs)


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    with (
        unittest.mock.patch.object(torch, "autocast", autocast_or_none),
        _NoBlockingConstants(),
        _NoSyncingOps(),
    ):
        yield


def use_real_launchers(monkeypatch: pytest.MonkeyPatch, ops: ModuleType) -> None:
    """The registered ops would send tensors of the meta device to the fake implementation."""
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(ops, f"{name}_op", getattr(ops, name))


def run_on_meta(layout, frozen=(), num_keys=8, **options) -> list[str]:
    """Forward and backward; the kernels that would have been launched."""
    inputs = inputs_of(layout, frozen=frozen, num_keys=num_keys, device="meta")
    with recording(Target("sm_90", num_sms=132)) as launches, no_host_sync():
        out = ff.masked_cross_attention(**inputs, layout=layout, **options)
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        torch.autograd.grad(out, wanted, torch.empty_like(out))
    return [launch.kernel.fn.__name__ for launch in launches]


def check_built_without_host_sync(make_layout) -> None:
    """Of a function that makes a layout on the meta device."""
    with no_host_sync():
        layout = make_layout()
        mask, attends, past_last = layout.to_mask(), layout.attends(), layout.past_last()
    assert layout.device.type == "meta"
    assert mask.shape[:2] == attends.shape == past_last.shape == layout.media_start.shape


def check_planted_sync(monkeypatch, ops: ModuleType, planted: str, layout) -> None:
    """Of the function `planted` of `ops`, the test of host syncs notices one."""
    real = getattr(ops, planted)

    def synchronising(first, *rest):
        first.sum().item()
        return real(first, *rest)

    monkeypatch.setattr(ops, f"{planted}_op", synchronising)
    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        run_on_meta(layout, impl="triton")


def peak_bytes(function) -> int:
    """Of what PyTorch's CPU allocator had handed out at once, outputs included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    events = [
        event
        for event in _all_events(profile.profiler.kineto_results.experimental_event_tree())
        if event.tag == torch._C._profiler._EventType.Allocation
    ]
    del kept
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        peak = max(peak, now)
    return peak


def _all_events(events):
    for event in events:
        yield event
        yield from _all_events(event.children)
