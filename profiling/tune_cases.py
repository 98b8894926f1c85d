"""Calls whose kernels are tuned: the shapes of models people have, largest share of time first."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

import flamingo_fast
from flamingo_fast.layout import MediaLayout

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Call:
    """A public op on tensors.

    function: of the inputs in their order, and of `impl`.
    gradients: of what it returns, by name.
    """

    inputs: Inputs
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    gradients: Inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """A call at one shape.

    ops: whose configurations are tuned, where the launchers of this device ask for them.
    make: (batch, dtype, device) -> the call. Configurations are the same in any batch: results are
        checked in a small one, which an oracle in fp64 has the memory for.
    """

    name: str
    ops: tuple[str, ...]
    make: Callable[[int, torch.dtype, torch.device], Call]
    timed_batch: int
    checked_batch: int = 1


# Not `bench.registry`'s: that imports Triton, before `tune` has chosen its interpreter.
def _normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _masked_cross_attention(
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seqlen: int,
    media: int,
    num_keys: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    attend: str = "previous",
    frozen: bool = False,
) -> Call:
    """Images at even distances; a text shorter than their number is the last tokens of it."""
    length = max(seqlen, media)
    locations = torch.zeros(batch, length, dtype=torch.bool)
    locations[:, torch.arange(media) * length // media] = True
    layout = MediaLayout.from_media_locations(locations, media, attend)
    layout = (layout if length == seqlen else layout.last(seqlen)).to(device)
    media_shape = (batch * media, num_keys, 2, kv_heads or heads, head_dim)
    k, v = _normal(media_shape, dtype, device, seed=1).unbind(2)
    q = _normal((batch, seqlen, heads, head_dim), dtype, device, seed=0)
    inputs = {"q": q.requires_grad_()}
    inputs |= {"k": k.requires_grad_(not frozen), "v": v.requires_grad_(not frozen)}
    function = functools.partial(flamingo_fast.masked_cross_attention, layout=layout)
    return Call(inputs, function, {"out": _normal(tuple(q.shape), dtype, device, seed=2)})


def _latent_attention(
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    latents: int,
    features: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
) -> Call:
    q = _normal((batch, latents, heads, head_dim), dtype, device, seed=0)
    inputs = {"q": q.requires_grad_()}
    for seed, (name, count) in enumerate((("media", features), ("latents", latents)), start=1):
        shape = (batch, count, 2, kv_heads or heads, head_dim)
        k, v = _normal(shape, dtype, device, seed).unbind(2)
        inputs |= {f"k_{name}": k.requires_grad_(), f"v_{name}": v.requires_grad_()}
    gradients = {"out": _normal(tuple(q.shape), dtype, device, seed=3)}
    return Call(inputs, flamingo_fast.latent_attention, gradients)


def _norm(batch: int, dtype: torch.dtype, device: torch.device, *, seqlen: int, width: int) -> Call:
    """Of a gated residual, as between the halves of a gated block; norms alone have its tiles."""

    def values(seed: int) -> torch.Tensor:
        return _normal((batch, seqlen, width), dtype, device, seed)

    inputs = {"x": values(0), "y": values(1), "gate": torch.full((1,), 0.5, device=device)}
    for seed, name in enumerate(("weight", "bias"), start=2):
        inputs[name] = _normal((width,), torch.float32, device, seed)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    function = functools.partial(flamingo_fast.gated_residual_norm, eps=1e-5, norm="layer")
    return Call(inputs, function, {"residual": values(4), "normed": values(5)})


_ONE_MEDIUM = ("one_medium_fwd", "one_medium_bwd")
_SEVERAL_MEDIA = ("several_media_fwd", "several_media_dq", "several_media_dkv")
_LATENT = ("latent_fwd", "latent_bwd", "latent_dkv")
_NORM = ("norm_fwd", "norm_bwd")


def _of(make: Callable[..., Call], **sizes: Any) -> Callable[..., Call]:
    return functools.partial(make, **sizes)


def _image_text(head_dim: int, **options: Any) -> Callable[..., Call]:
    sizes: dict[str, Any] = dict(seqlen=2048, media=32, num_keys=64, heads=8, head_dim=head_dim)
    return _of(_masked_cross_attention, **sizes, **options)


def _mllama(seqlen: int) -> Callable[..., Call]:
    sizes = dict(seqlen=seqlen, media=1, num_keys=6404, heads=32, kv_heads=8, head_dim=128)
    return _of(_masked_cross_attention, **sizes)


def _resampler(**sizes: int) -> Callable[..., Call]:
    return _of(_latent_attention, latents=64, **sizes)


QUICK_CASES = (
    Case("text, 64 x 64 a medium", _ONE_MEDIUM, _image_text(64), 8),
    Case("resampler, 64 x 64", _LATENT, _resampler(features=256, heads=8, head_dim=64), 128),
    Case("norm, 2048", _NORM, _of(_norm, seqlen=2048, width=2048), 4),
    Case("all previous, 64 x 64", _SEVERAL_MEDIA, _image_text(64, attend="all_previous"), 4),
)

CASES = (
    *QUICK_CASES,
    Case("text, 64 x 128 a medium", _ONE_MEDIUM, _image_text(128), 8),
    Case("text, frozen media", _ONE_MEDIUM[1:], _image_text(64, frozen=True), 8),
    Case("Mllama", _SEVERAL_MEDIA, _mllama(512), 2),
    Case("Mllama, decoding", _SEVERAL_MEDIA[:1], _mllama(1), 8),
    *(
        Case(f"norm, {width}", _NORM, _of(_norm, seqlen=2048, width=width), 4)
        for width in (4096, 1024, 8192)
    ),
    Case("all previous, 64 x 128", _SEVERAL_MEDIA, _image_text(128, attend="all_previous"), 4),
    Case(
        "resampler, 64 x 96, 4 heads a key",
        _LATENT,
        _resampler(features=729, heads=16, kv_heads=4, head_dim=96),
        32,
    ),
    Case("resampler, 64 x 128", _LATENT, _resampler(features=256, heads=16, head_dim=128), 64),
)

# For Triton's interpreter: every kernel, in seconds.
TINY_CASES = (
    Case(
        "text, 8 x 16 a medium",
        _ONE_MEDIUM,
        _of(_masked_cross_attention, seqlen=40, media=2, num_keys=8, heads=1, head_dim=16),
        1,
    ),
    Case(
        "resampler, 4 x 16",
        _LATENT,
        _of(_latent_attention, latents=4, features=24, heads=1, head_dim=16),
        1,
    ),
    Case(
        "resampler, 20 x 16, 4 heads a key",
        _LATENT,
        _of(_latent_attention, latents=20, features=24, heads=4, kv_heads=1, head_dim=16),
        1,
    ),
    Case("norm, 32", _NORM, _of(_norm, seqlen=40, width=32), 1),
    Case(
        "all previous, 8 x 16",
        _SEVERAL_MEDIA,
        _of(
            _masked_cross_attention,
            seqlen=24,
            media=2,
            num_keys=8,
            heads=1,
            head_dim=16,
            attend="all_previous",
        ),
        1,
    ),
)
