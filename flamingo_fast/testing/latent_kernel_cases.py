"""Launches of a resampler's attention that the ahead-of-time gate compiles."""

import functools
from collections.abc import Iterator

import torch

from flamingo_fast.kernels.attention_config import lse_shape
from flamingo_fast.kernels.latent_backward import latent_bwd
from flamingo_fast.kernels.latent_forward import latent_fwd
from flamingo_fast.testing.aot import KernelCase
from flamingo_fast.testing.attention_kernel_cases import BF16, FP16, FP32, product_rules
from flamingo_fast.testing.inputs import meta_tensor

_LATENT = ("_latent_fwd_kernel", "_latent_bwd_kernel", "_latent_dkv_kernel")

# What wants gradients: q, the media, the latents.
GRADIENTS = {
    "latent_bwd": (True, True, True),
    "latent_bwd_dq": (True, False, False),
    "latent_bwd_frozen_media": (True, False, True),
}


def latent_cases() -> Iterator[KernelCase]:
    """256 features as OpenFlamingo's images, 257 as CLIP's with its class token, videos; GQA."""
    for head_dim in (64, 96, 128):
        variant = functools.partial(_latent, head_dim=head_dim, dtype=BF16)
        yield from variant(f"bf16/256x{head_dim}", gradients=tuple(GRADIENTS))
        yield from variant(f"bf16/256x{head_dim}_seqlens", seqlens=True)
        yield from variant(f"bf16/256x{head_dim}_gqa", group=4)
    for head_dim in (64, 128):
        variant = functools.partial(_latent, head_dim=head_dim, dtype=BF16)
        yield from variant(f"bf16/4096x{head_dim}_split", num_keys=4096)
        yield from variant(f"bf16/256x{head_dim}_128_rows", group=2)
        yield from variant(f"bf16/256x{head_dim}_8_latents", latents=8)
    yield from _latent("bf16/257x128", BF16, num_keys=257, head_dim=128)
    yield from _latent(
        "bf16/257x128_100_latents_seqlens",
        BF16,
        latents=100,
        num_keys=257,
        head_dim=128,
        seqlens=True,
    )
    yield from _latent("bf16/256x128_gqa_seqlens", BF16, head_dim=128, group=4, seqlens=True)
    yield from _latent("bf16/4096x128_gqa_split", BF16, num_keys=4096, head_dim=128, group=4)
    yield from _latent("fp16/256x128", FP16, head_dim=128)
    yield from _latent("bf16/100x40_gqa", BF16, num_keys=100, head_dim=40, group=6)
    yield from _latent("bf16/64x16", BF16, num_keys=64, latents=5, head_dim=16)
    yield from _latent("bf16/256x256", BF16, head_dim=256)
    for head_dim in (64, 128, 256):
        yield from _latent(f"fp32/256x{head_dim}", FP32, head_dim=head_dim)
    yield from _latent("fp32/257x128_gqa", FP32, num_keys=257, head_dim=128, group=4)
    one = functools.partial(_latent, dtype=BF16, media=1, kv_heads=1)
    yield from one("bf16/256x64_one_head")
    yield from one("bf16/4096x64_one_head_gqa_split", num_keys=4096, group=4, seqlens=True)
    yield from _latent("fp32_tf32/256x64", FP32, input_precision="tf32")


def _latent(
    name: str,
    dtype: torch.dtype,
    *,
    media: int = 40,
    latents: int = 64,
    num_keys: int = 256,
    kv_heads: int = 8,
    head_dim: int = 64,
    group: int = 1,
    seqlens: bool = False,
    input_precision: str = "ieee",
    gradients: tuple[str, ...] = ("latent_bwd",),
) -> Iterator[KernelCase]:
    q = meta_tensor(media, latents, kv_heads * group, head_dim, dtype=dtype)

    def projection(keys: int) -> torch.Tensor:
        return meta_tensor(media, keys, 2, kv_heads, head_dim, dtype=dtype).movedim(2, 0)

    k_media, v_media = projection(num_keys).unbind(0)
    k_latents, v_latents = projection(latents).unbind(0)
    media_seqlens = meta_tensor(media, dtype=torch.int32) if seqlens else None
    rules = product_rules(_LATENT, dtype, head_dim, input_precision, stores_128bit=True)
    yield KernelCase(
        f"latent_fwd/{name}",
        functools.partial(
            latent_fwd,
            q,
            k_media,
            v_media,
            k_latents,
            v_latents,
            media_seqlens,
            head_dim**-0.5,
            need_lse=True,
            input_precision=input_precision,
        ),
        rules,
    )
    for kernels in gradients:
        need_dq, need_dmedia, need_dlatents = GRADIENTS[kernels]
        yield KernelCase(
            f"{kernels}/{name}",
            functools.partial(
                latent_bwd,
                q,
                q,
                k_media,
                v_media,
                k_latents,
                v_latents,
                q,
                meta_tensor(*lse_shape(q, kv_heads)),
                media_seqlens,
                head_dim**-0.5,
                dq=meta_tensor(*q.shape, dtype=dtype) if need_dq else meta_tensor(0),
                dmedia=projection(num_keys) if need_dmedia else meta_tensor(0),
                dlatents=projection(latents) if need_dlatents else meta_tensor(0),
                input_precision=input_precision,
            ),
            rules,
        )
