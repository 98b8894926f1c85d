"""Attention of text to the medium before it, with images at random and at even positions.

What other benchmarks of masked_cross_attention have in common with it is here too.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import flamingo_fast
from flamingo_fast.bench import work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Function,
    Provider,
    Shape,
    Unavailable,
    compile_afresh,
    normal,
    of_peer,
    require_inductor,
)
from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops.dispatch import VARLEN_IMPLS
from flamingo_fast.ops.varlen_attention import why_not
from flamingo_fast.testing import eager, peers

DIMS = ("B", "L", "N", "H", "D", "R")
NAME = "masked_cross_attention"

# One call of a dense method then takes about a second on a few cores, and 4 GB.
MAX_SCORES_ON_A_CPU = 2**27
# The compiled one takes as long, and longer to compile.
_MAX_COMPILED_SCORES_ON_A_CPU = 2**24
# The scores, the weights, their gradients, and copies of each while they are made.
_COPIES_OF_SCORES = 8
_REFERENCE_TOKENS = 256


def media_layout(
    shape: Shape, device: torch.device, *, even: bool = False, attend: str = "previous"
) -> MediaLayout:
    """As many images as media, at distinct positions: random (the same in every run) or even.

    Texts shorter than N are the last tokens of one that has them all, as in decoding.
    """
    batch, seqlen, media, *_ = shape
    length = max(seqlen, media)
    locations = torch.zeros(batch, length, dtype=torch.bool)
    if even:
        locations[:, torch.arange(media) * length // max(media, 1)] = True
    else:
        generator = torch.Generator().manual_seed(0)
        for row in locations:
            row[torch.randperm(length, generator=generator)[:media]] = True
    layout = MediaLayout.from_media_locations(locations, media, attend)
    return (layout if length == seqlen else layout.last(seqlen)).to(device)


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    make_layout: Callable[[Shape, torch.device], MediaLayout],
) -> dict[str, Any]:
    batch, seqlen, media, heads, head_dim, num_keys = shape
    q_shape, kv_shape = (batch, seqlen, heads, head_dim), (batch, media, num_keys, heads, head_dim)
    return {
        "q": normal(q_shape, dtype, device, seed=0),
        "k": normal(kv_shape, dtype, device, seed=1),
        "v": normal(kv_shape, dtype, device, mean=0.5, seed=2),
        "layout": make_layout(shape, device),
    }


def ours(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    *,
    impl: str = "auto",
    unattended: str = "zero",
) -> torch.Tensor:
    if impl == "reference":
        return _reference(q, k, v, layout, unattended)
    return flamingo_fast.masked_cross_attention(q, k, v, layout, unattended=unattended, impl=impl)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, unattended: str
) -> torch.Tensor:
    """The reference in blocks of tokens and their media: for a long text it takes L * N memory.

    In fp32 all along, or fp64 of fp64, so that gradients of media in several blocks are rounded
    once. All tokens of the media are valid.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_q, keys, values = q.to(wide), k.to(wide).flatten(0, -4), v.to(wide).flatten(0, -4)
    mask, rows = layout.to_mask(), []
    for sample, (first, last) in enumerate(itertools.pairwise(layout.cu_media.tolist())):
        blocks = []
        for begin in range(0, layout.seqlen, _REFERENCE_TOKENS):
            tokens = slice(begin, begin + _REFERENCE_TOKENS)
            attends = mask[sample, tokens, : last - first]
            attended = attends.any(0).nonzero().flatten().tolist() or [0, -1]
            media = slice(attended[0], attended[-1] + 1)
            if unattended != "zero":
                media = slice(0, last - first)
            blocks.append(
                flamingo_fast.masked_cross_attention(
                    wide_q[sample, tokens][None],
                    keys[first:last][media],
                    values[first:last][media],
                    MediaLayout.from_media_mask(attends[None, :, media]),
                    unattended=unattended,
                    impl="reference",
                )
            )
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows).to(q.dtype)


def num_scores(case: Case) -> int:
    """Of all tokens and all keys, k being (B, N, R, Hkv, D)."""
    q, k = case.inputs["q"], case.inputs["k"]
    return q.shape[:-1].numel() * k.shape[1:3].numel()


def check_dense(case: Case, limit: int = MAX_SCORES_ON_A_CPU) -> None:
    """Raises Unavailable where scores of all tokens and all keys are too many."""
    scores = num_scores(case)
    if case.device.type == "cpu" and scores > limit:
        raise Unavailable(
            f"{scores:.2g} scores of all tokens and keys, more than {limit:.2g}, "
            "take too long on a CPU"
        )


def check_eager(case: Case, compiled: bool = False) -> None:
    """Raises Unavailable where a baseline that has scores in memory takes too long, or too much."""
    check_dense(case, _MAX_COMPILED_SCORES_ON_A_CPU if compiled else MAX_SCORES_ON_A_CPU)
    if case.device.type == "cuda":
        wanted = _COPIES_OF_SCORES * num_scores(case) * case.inputs["q"].itemsize
        memory = torch.cuda.get_device_properties(case.device).total_memory
        if wanted > memory:
            raise Unavailable(
                f"scores of all tokens and keys take {wanted / 1e9:.0f} GB, "
                f"the GPU has {memory / 1e9:.0f} GB"
            )


def _build_eager(case: Case, compiled: bool) -> Function:
    check_eager(case, compiled)
    return eager.masked_cross_attention


def build_sdpa(
    case: Case, mode: str, *, unattended: str = "zero", limit: int = MAX_SCORES_ON_A_CPU
) -> Function:
    check_dense(case, limit)
    return under_dense_mask(case.inputs["layout"], case.inputs["k"].shape[-3], unattended)


def under_dense_mask(
    layout: MediaLayout, num_keys: int, unattended: str = "zero"
) -> Callable[..., torch.Tensor]:
    """PyTorch's attention under a dense boolean mask, which is made before the clock starts.

    A softmax over nothing may be NaN: rows that attend to nothing see all, and get what is right
    after. All tokens of the media are valid.
    """
    silent = ~layout.attends()[:, None, :, None]
    any_silent = bool(silent.any())
    mask = layout.to_mask().repeat_interleave(num_keys, 2)[:, None] | silent

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        queries, keys, values = heads_first(q, k, v)
        shares = queries.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=shares
        )
        if any_silent and unattended == "zero":
            out = out.masked_fill(silent, 0.0)
        elif any_silent and unattended == "uniform":
            out = torch.where(silent, values.mean(2, keepdim=True), out)
        return out.transpose(1, 2)

    return attend


def heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As PyTorch and transformers take them: (B, H, L, D) and twice (B, Hkv, keys, D)."""
    keys, values = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (k, v))
    return q.transpose(1, 2), keys, values


def _library(impl: str) -> Provider:
    def build(case: Case, mode: str) -> Function:
        q, k, _, layout = case.inputs.values()
        if reason := why_not(impl, q, k.flatten(0, -4), layout, unattended_dense=False):
            raise Unavailable(reason)
        return functools.partial(case.benchmark.ours, impl=impl)

    return Provider(impl, build)


# Of layouts with one medium a token.
LIBRARIES = tuple(map(_library, VARLEN_IMPLS))
SDPA = Provider("sdpa", build_sdpa)


class _KeysAndValues(nn.Module):
    """Stands in for OpenFlamingo's projection of media, whose result it chunks into k and v."""

    k: torch.Tensor
    v: torch.Tensor

    def forward(self, media: torch.Tensor) -> "_KeysAndValues":
        return self

    def chunk(self, chunks: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k.flatten(1, 2).flatten(2), self.v.flatten(1, 2).flatten(2)


def build_open_flamingo(case: Case, compiled: bool, *, immediate: bool) -> Function:
    """Its class; the norm and the projections, which are not part of the op, pass on their input.

    Like in a model, it makes the mask from the image positions in every call.

    Arguments:
        immediate: its option to attend to the last image alone, not to all before.
    """
    check_eager(case, compiled)
    module = of_peer(peers.open_flamingo)
    _, seqlen, media, heads, head_dim, _ = case.shape
    attention = module.MaskedCrossAttention(
        dim=1, dim_visual=1, dim_head=head_dim, heads=heads, only_attend_immediate_media=immediate
    )
    attention.norm = attention.to_q = attention.to_out = nn.Identity()
    keys_and_values = attention.to_kv = _KeysAndValues()
    text_time = case.inputs["layout"].media_end
    decoding = seqlen < media
    if decoding and seqlen > 1:
        raise Unavailable("its tokens after the prompt all attend to the last image")
    if decoding:
        locations = text_time.new_ones((len(text_time), media), dtype=torch.bool)
    else:
        locations = text_time.diff(dim=1, prepend=torch.zeros_like(text_time[:, :1])) > 0

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        keys_and_values.k, keys_and_values.v = k, v
        out = attention(q.flatten(2), k.flatten(3), locations, use_cached_media=decoding)
        return out.unflatten(2, q.shape[2:])

    return attend


def _build_flex_attention(case: Case, mode: str) -> Function:
    """PyTorch's flex_attention, compiled; its block mask is made before the clock starts."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no flex_attention") from None
    require_inductor(case.device)
    if case.device.type == "cpu" and mode != "fwd":
        raise Unavailable("it has no backward on a CPU")
    if case.device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise Unavailable("on a CPU it needs AVX2")
    batch, seqlen, media, _, _, num_keys = case.shape
    media_end = case.inputs["layout"].media_end

    def attends(b: Any, h: Any, token: Any, key: Any) -> Any:
        return media_end[b, token] == key // num_keys + 1

    block_mask = create_block_mask(
        attends, batch, None, seqlen, media * num_keys, device=case.device
    )
    compiled = compile_afresh(flex_attention)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        return compiled(*heads_first(q, k, v), block_mask=block_mask).transpose(1, 2)

    return attend


_masked_cross_attention = functools.partial(
    Benchmark,
    dims=DIMS,
    quick_shape=(4, 256, 5, 8, 64, 64),
    tiny_shape=(1, 16, 1, 1, 16, 16),
    outputs=("out",),
    build_eager=_build_eager,
    ours=ours,
    work=work.masked_cross_attention,
    eager_work=work.masked_cross_attention_eager,
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _masked_cross_attention(
            name=NAME,
            make_inputs=functools.partial(make_inputs, make_layout=media_layout),
            shapes=(
                (8, 256, 5, 16, 128, 64),
                (4, 256, 5, 8, 64, 64),
                (1, 2048, 32, 8, 64, 64),
                (1, 8192, 128, 16, 128, 64),
                (1, 1, 5, 8, 64, 64),
                (1, 1, 32, 8, 64, 64),
            ),
            others=(
                SDPA,
                Provider("flex_attention", _build_flex_attention),
                Provider(
                    "open_flamingo",
                    lambda case, mode: build_open_flamingo(case, False, immediate=True),
                ),
                *LIBRARIES,
            ),
        ),
        # Of the providers only ours and flex_attention do other work for other positions.
        _masked_cross_attention(
            name=f"{NAME}_even",
            make_inputs=functools.partial(
                make_inputs, make_layout=functools.partial(media_layout, even=True)
            ),
            shapes=((8, 256, 5, 16, 128, 64), (4, 256, 5, 8, 64, 64), (1, 2048, 32, 8, 64, 64)),
            others=(SDPA, *LIBRARIES),
        ),
    )
}
