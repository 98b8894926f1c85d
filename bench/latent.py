"""A resampler's latents attend to the features of their medium and to themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import flamingo_fast
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Function,
    Provider,
    Shape,
    Unavailable,
    normal,
)
from flamingo_fast.bench.work import Work, attention, of_mode
from flamingo_fast.ops.dispatch import VARLEN_IMPLS
from flamingo_fast.ops.latent_attention import of_one_source
from flamingo_fast.ops.varlen_attention import why_not
from flamingo_fast.testing import eager

NAME = "latent_attention"


def media_seqlens(shape: Shape) -> torch.Tensor | None:
    """(B,) lengths at even distances from the shortest to S; None if all are S."""
    batch, _, num_keys, *_, shortest = shape
    if shortest >= num_keys:
        return None
    return torch.linspace(num_keys, shortest, batch).round().long()


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keys and values are halves of projections, as a module's are."""
    batch, latents, num_keys, heads, kv_heads, head_dim, _ = shape
    inputs: dict[str, Any] = {"q": normal((batch, latents, heads, head_dim), dtype, device, seed=0)}
    for seed, (name, count) in enumerate((("media", num_keys), ("latents", latents)), start=1):
        projected = normal((batch, count, 2, kv_heads, head_dim), dtype, device, seed=seed)
        projected[:, :, 1] += 0.5
        inputs[f"k_{name}"], inputs[f"v_{name}"] = projected.unbind(2)
    lengths = media_seqlens(shape)
    return inputs | {"media_seqlens": None if lengths is None else lengths.to(device)}


def _call(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attend(*inputs: Any, **options: Any) -> torch.Tensor:
        *tensors, lengths = inputs
        return function(*tensors, media_seqlens=lengths, **options)

    return attend


def _build_eager(case: Case, compiled: bool) -> Function:
    return _call(eager.latent_attention)


def _build_sdpa(case: Case, mode: str) -> Function:
    """PyTorch's attention on both sources put together; a mask is made before the clock starts."""
    q, k_media, *_, lengths = case.inputs.values()
    mask = None
    if lengths is not None:
        valid = torch.arange(k_media.shape[1], device=case.device) < lengths[:, None]
        mask = torch.cat([valid, valid.new_ones(q.shape[:2])], 1)[:, None, None]

    def attend(
        q: torch.Tensor,
        k_media: torch.Tensor,
        v_media: torch.Tensor,
        k_latents: torch.Tensor,
        v_latents: torch.Tensor,
        media_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        keys, values = torch.cat([k_media, k_latents], 1), torch.cat([v_media, v_latents], 1)
        shares = q.shape[2] != keys.shape[2]
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=shares)
        return out.transpose(1, 2)

    return attend


def _library(impl: str) -> Provider:
    def build(case: Case, mode: str) -> Function:
        k, _, layout = of_one_source(*case.inputs.values())
        if reason := why_not(impl, case.inputs["q"], k, layout, unattended_dense=False):
            raise Unavailable(reason)
        return functools.partial(case.benchmark.ours, impl=impl)

    return Provider(impl, build)


def attention_work(shape: Shape, itemsize: int, mode: str) -> Work:
    """Useful work: of keys and values only what is valid is read. The lengths are left out.

    `mode`: as in `work.attention`.
    """
    batch, latents, num_keys, heads, kv_heads, head_dim, _ = shape
    lengths = media_seqlens(shape)
    valid = batch * num_keys if lengths is None else int(lengths.sum())
    rows = batch * latents * heads
    row_bytes = rows * head_dim * itemsize
    key_bytes = 2 * kv_heads * head_dim * itemsize
    read_bytes = (valid + batch * latents) * key_bytes
    all_bytes = batch * (num_keys + latents) * key_bytes
    scores = latents * heads * (valid + batch * latents)
    return attention(row_bytes, read_bytes, all_bytes, scores, rows, head_dim, mode)


def eager_work(shape: Shape, itemsize: int, mode: str) -> Work:
    """Keys and values are put together, and scores of all latents and keys are in memory.

    Four kernels read the scores and three write them: they are multiplied, have their largest taken
    and subtracted, go through the softmax and are multiplied again. Backward it is five and two.
    Keys and values are repeated where heads share them. The mask is left out.
    """
    batch, latents, num_keys, heads, kv_heads, head_dim, _ = shape
    keys = batch * (num_keys + latents)
    scores = latents * heads * keys
    score_bytes, product = scores * itemsize, 2 * scores * head_dim
    row_bytes = batch * latents * heads * head_dim * itemsize
    key_bytes, repeated = (2 * keys * h * head_dim * itemsize for h in (kv_heads, heads))
    copied = 0 if heads == kv_heads else 1
    fwd = Work(
        4 * score_bytes + 2 * row_bytes + (1 + copied) * key_bytes + repeated,
        3 * score_bytes + 2 * row_bytes + key_bytes + copied * repeated,
        5 * scores,
        2 * product,
    )
    bwd = Work(
        5 * score_bytes + 4 * row_bytes + (1 + copied) * repeated,
        2 * score_bytes + 2 * row_bytes + repeated + copied * key_bytes,
        7 * scores,
        4 * product,
    )
    return of_mode(mode, fwd, bwd)


BENCHMARKS = {
    NAME: Benchmark(
        name=NAME,
        dims=("B", "R", "S", "H", "Hkv", "D", "shortest"),
        shapes=(
            (20, 64, 256, 8, 8, 64, 256),
            (1, 64, 2048, 8, 8, 64, 2048),
            (1, 64, 8192, 8, 8, 64, 8192),
            (8, 64, 256, 16, 4, 96, 256),
            (8, 64, 1000, 16, 4, 96, 100),
            (8, 64, 256, 16, 16, 128, 256),
        ),
        quick_shape=(4, 64, 256, 8, 8, 64, 256),
        tiny_shape=(1, 16, 16, 1, 1, 16, 16),
        outputs=("out",),
        make_inputs=_inputs,
        build_eager=_build_eager,
        ours=_call(flamingo_fast.latent_attention),
        work=attention_work,
        eager_work=eager_work,
        others=(Provider("sdpa", _build_sdpa), *map(_library, VARLEN_IMPLS)),
    )
}
