"""Launches of attention kernels that the ahead-of-time gate compiles."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from flamingo_fast.kernels.attention_config import lse_shape
from flamingo_fast.kernels.one_medium_backward import one_medium_bwd
from flamingo_fast.kernels.one_medium_forward import one_medium_fwd
from flamingo_fast.kernels.several_media_backward import several_media_bwd
from flamingo_fast.kernels.several_media_forward import several_media_fwd
from flamingo_fast.testing.aot import KernelCase, Rules
from flamingo_fast.testing.inputs import meta_tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_SEVERAL_MEDIA = (
    "_several_media_fwd_kernel",
    "_several_media_dq_kernel",
    "_several_media_dkv_kernel",
)


def attention_cases() -> Iterator[KernelCase]:
    """Of the kernels for one medium a token, then of those for several."""
    yield from _one_medium_cases()
    yield from _several_media_cases()


def _one_medium_cases() -> Iterator[KernelCase]:
    """Rows of 2048 tokens have tiles of 32 rows, decoding has tiles of 16."""
    for head_dim in (64, 80, 96, 128):
        yield from _one_medium(f"bf16/64x{head_dim}", BF16, head_dim=head_dim)
    yield from _one_medium("fp16/64x128", FP16, head_dim=128)
    for head_dim in (64, 128):
        variant = functools.partial(_one_medium, dtype=torch.bfloat16, head_dim=head_dim)
        yield from variant(f"bf16/64x{head_dim}_decode", seqlen=1)
        yield from variant(f"bf16/64x{head_dim}_seqlens", seqlens=True)
        yield from variant(f"bf16/64x{head_dim}_sorted", sorted_rows=True)
        yield from variant(f"bf16/64x{head_dim}_gqa", group=4)
        yield from variant(f"bf16/128x{head_dim}", num_keys=128)
        yield from variant(
            f"bf16/128x{head_dim}_sorted_gqa", num_keys=128, sorted_rows=True, group=4
        )
    yield from _one_medium("bf16/100x64", torch.bfloat16, num_keys=100)
    yield from _one_medium("bf16/5x16", torch.bfloat16, num_keys=5, head_dim=16)
    yield from _one_medium("bf16/64x40_gqa", torch.bfloat16, head_dim=40, group=6)
    yield from _one_medium("bf16/64x256", torch.bfloat16, head_dim=256)
    yield from _one_medium("bf16/16x256", torch.bfloat16, num_keys=16, head_dim=256)
    yield from _one_medium("fp32/128x64", torch.float32, num_keys=128)
    for head_dim in (64, 128):
        yield from _one_medium(f"fp32/64x{head_dim}", torch.float32, head_dim=head_dim)
    # What is 1 is a constant of the compiled kernel, not an integer.
    one = functools.partial(_one_medium, dtype=torch.bfloat16, batch=1, media=1, kv_heads=1)
    yield from one("bf16/64x64_one_head", seqlens=True)
    yield from one("bf16/64x64_one_head_sorted_gqa", sorted_rows=True, group=4)
    yield from _one_medium("fp32_tf32/64x64", torch.float32, input_precision="tf32")


def _one_medium(
    name: str,
    dtype: torch.dtype,
    *,
    batch: int = 8,
    seqlen: int = 2048,
    media: int = 256,
    num_keys: int = 64,
    kv_heads: int = 8,
    head_dim: int = 64,
    group: int = 1,
    seqlens: bool = False,
    sorted_rows: bool = False,
    input_precision: str = "ieee",
) -> Iterator[KernelCase]:
    q = meta_tensor(batch, seqlen, kv_heads * group, head_dim, dtype=dtype)
    # As halves of one projection.
    k, v = meta_tensor(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).unbind(2)
    dkv = meta_tensor(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).movedim(2, 0)
    lse = meta_tensor(kv_heads, batch, seqlen, group)
    work_items = meta_tensor(media + 9, 4, dtype=torch.int32)
    split_media = meta_tensor(16, 3, dtype=torch.int32)
    media_seqlens = meta_tensor(media, dtype=torch.int32) if seqlens else None
    row_index = meta_tensor(batch * seqlen, dtype=torch.int32) if sorted_rows else None
    scale = head_dim**-0.5
    forward = functools.partial(
        one_medium_fwd,
        q,
        k,
        v,
        work_items,
        row_index,
        media_seqlens,
        scale,
        input_precision=input_precision,
    )
    backward = functools.partial(
        one_medium_bwd,
        q,
        q,
        k,
        v,
        lse,
        work_items,
        split_media,
        num_slots=32,
        row_index=row_index,
        media_seqlens=media_seqlens,
        softmax_scale=scale,
        input_precision=input_precision,
    )
    rules = _one_medium_rules(dtype, num_keys, head_dim, input_precision)
    yield KernelCase(f"one_medium_fwd/{name}", functools.partial(forward, need_lse=True), rules)
    yield KernelCase(
        f"one_medium_fwd_inference/{name}", functools.partial(forward, need_lse=False), rules
    )
    yield KernelCase(
        f"one_medium_bwd/{name}",
        functools.partial(backward, dq=meta_tensor(*q.shape, dtype=dtype), dkv=dkv),
        rules,
    )
    yield KernelCase(
        f"one_medium_bwd_dq/{name}",
        functools.partial(backward, dq=meta_tensor(*q.shape, dtype=dtype), dkv=meta_tensor(0)),
        rules,
    )


def _one_medium_rules(
    dtype: torch.dtype, num_keys: int, head_dim: int, input_precision: str
) -> Rules:
    kernels = ("_one_medium_fwd_kernel", "_one_medium_bwd_kernel")
    wide = kernels if head_dim >= 64 else ()
    if dtype == torch.float32:
        return Rules(
            allow_tf32=input_precision == "tf32",
            may_spill="launch configurations are tuned for 16-bit types",
            loads_128bit=wide,
            stores_128bit=wide,
        )
    may_spill = "head dims above 128 are right, not tuned" if head_dim > 128 else ""
    # Tiles are powers of two; of fewer than 64 wgmma has no form.
    fills_warp_group = num_keys > 32 and head_dim > 32
    # Sums of dK and dV over 128 keys take the registers of a whole SM.
    two_blocks = kernels if num_keys <= 64 else kernels[:1]
    return Rules(
        may_spill=may_spill,
        loads_128bit=wide,
        stores_128bit=wide,
        tensor_cores=kernels,
        wgmma=kernels if fills_warp_group else (),
        two_blocks=two_blocks if head_dim <= 128 else (),
    )


def _several_media_cases() -> Iterator[KernelCase]:
    """Images of 64 tokens as OpenFlamingo's and IDEFICS's, of 6404 as Mllama's, and odd ones."""
    mllama = functools.partial(_several_media, num_keys=6404, media=8, head_dim=128, group=4)
    decode: dict[str, Any] = dict(seqlen=1, forward_only=True)
    everything: dict[str, Any] = dict(dense=True, seqlens=True, bits=True)
    for head_dim in (64, 80, 128):
        yield from _several_media(f"bf16/64x{head_dim}", BF16, head_dim=head_dim)
    yield from _several_media("fp16/64x128", FP16, head_dim=128)
    for head_dim in (64, 128):
        variant = functools.partial(_several_media, dtype=BF16, head_dim=head_dim)
        yield from variant(f"bf16/64x{head_dim}_decode", **decode)
        yield from variant(f"bf16/64x{head_dim}_bits_seqlens", bits=True, seqlens=True)
        yield from variant(f"bf16/64x{head_dim}_40_rows", seqlen=40)
        yield from variant(f"bf16/70x{head_dim}_everything", num_keys=70, **everything)
        yield from variant(f"bf16/5x{head_dim}", num_keys=5)
    yield from mllama("bf16/6404x128", BF16)
    yield from mllama("fp16/6404x128_seqlens", FP16, seqlens=True)
    yield from mllama("bf16/6404x128_dense", BF16, dense=True)
    yield from mllama("bf16/6404x128_everything", BF16, **everything)
    yield from mllama("bf16/6404x128_decode", BF16, **decode)
    yield from mllama("bf16/6404x128_decode_everything", BF16, **decode, **everything)
    yield from mllama("bf16/6404x128_8_rows", BF16, seqlen=8)
    yield from _several_media("bf16/200x64", BF16, num_keys=200)
    yield from _several_media("bf16/5x16", BF16, num_keys=5, head_dim=16)
    yield from _several_media("bf16/64x256", BF16, head_dim=256)
    for head_dim in (64, 128, 256):
        yield from _several_media(f"fp32/64x{head_dim}", FP32, head_dim=head_dim)
    yield from mllama("fp32/6404x128_everything", FP32, **everything)
    one = functools.partial(_several_media, dtype=BF16, batch=1, media=1, kv_heads=1, seqlens=True)
    yield from one("bf16/64x64_one_head")
    yield from one("bf16/6404x64_one_head_gqa", num_keys=6404, group=4, seqlen=8)
    yield from _several_media("fp32_tf32/64x64", FP32, input_precision="tf32")


def _several_media(
    name: str,
    dtype: torch.dtype,
    *,
    batch: int = 8,
    seqlen: int = 2048,
    media: int = 256,
    num_keys: int = 64,
    kv_heads: int = 8,
    head_dim: int = 64,
    group: int = 1,
    bits: bool = False,
    seqlens: bool = False,
    dense: bool = False,
    input_precision: str = "ieee",
    forward_only: bool = False,
) -> Iterator[KernelCase]:
    q = meta_tensor(batch, seqlen, kv_heads * group, head_dim, dtype=dtype)
    k, v = meta_tensor(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).unbind(2)
    dkv = meta_tensor(media, num_keys, 2, kv_heads, head_dim, dtype=dtype).movedim(2, 0)
    start = meta_tensor(batch, seqlen, dtype=torch.int32)
    media_bits = meta_tensor(batch, seqlen, 1, dtype=torch.int64) if bits else None
    cu_media = meta_tensor(batch + 1, dtype=torch.int32)
    media_seqlens = meta_tensor(media, dtype=torch.int32) if seqlens else None
    forward = functools.partial(
        several_media_fwd,
        q,
        k,
        v,
        start,
        start,
        media_bits,
        cu_media,
        media_seqlens,
        media // batch,
        dense,
        head_dim**-0.5,
        input_precision=input_precision,
    )
    backward = functools.partial(
        several_media_bwd,
        q,
        q,
        k,
        v,
        q,
        meta_tensor(*lse_shape(q, kv_heads)),
        start,
        start,
        media_bits,
        meta_tensor(media, 2, dtype=torch.int32),
        cu_media,
        media_seqlens,
        media // batch,
        dense,
        head_dim**-0.5,
        input_precision=input_precision,
    )
    rules = product_rules(_SEVERAL_MEDIA, dtype, head_dim, input_precision)
    yield KernelCase(
        f"several_media_fwd/{name}", functools.partial(forward, need_lse=not forward_only), rules
    )
    if forward_only:
        return
    dq = meta_tensor(*q.shape, dtype=dtype)
    yield KernelCase(
        f"several_media_bwd/{name}", functools.partial(backward, dq=dq, dkv=dkv), rules
    )
    yield KernelCase(
        f"several_media_bwd_dq/{name}",
        functools.partial(backward, dq=dq, dkv=meta_tensor(0)),
        rules,
    )


def product_rules(
    kernels: tuple[str, ...],
    dtype: torch.dtype,
    head_dim: int,
    input_precision: str,
    *,
    stores_128bit: bool = False,
) -> Rules:
    """Of kernels that are matrix products, and from head dim 64 on load 16 bytes at a time."""
    if dtype == torch.float32:
        return Rules(
            allow_tf32=input_precision == "tf32",
            may_spill="launch configurations are tuned for 16-bit types",
        )
    return Rules(
        may_spill="head dims above 128 are right, not tuned" if head_dim > 128 else "",
        loads_128bit=kernels if head_dim >= 64 else (),
        stores_128bit=kernels if stores_128bit and head_dim >= 64 else (),
        tensor_cores=kernels,
    )
