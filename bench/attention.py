"""Attention of text to the medium before it, with images at random and at even positions."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import flamingo_fast
from flamingo_fast.bench import work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Provider,
    Shape,
    Unavailable,
    compile_afresh,
    normal,
    require_inductor,
)
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import eager, peers

DIMS = ("B", "L", "N", "H", "D", "R")
NAME = "masked_cross_attention"

# One call of a dense method then takes about a second on a few cores, and 4 GB.
_MAX_SCORES_ON_A_CPU = 2**27
# The compiled one takes as long, and longer to compile.
_MAX_COMPILED_SCORES_ON_A_CPU = 2**24
# The scores, the weights, their gradients, and copies of each while they are made.
_COPIES_OF_SCORES = 8
_REFERENCE_TOKENS = 256


def growth_shapes(quick: bool) -> tuple[Shape, ...]:
    """More and more images in the same text."""
    if quick:
        return tuple((1, 128, media, 2, 32, 16) for media in (1, 4))
    return tuple((1, 2048, media, 8, 64, 64) for media in (1, 2, 4, 8, 16, 32, 64))


def media_layout(shape: Shape, device: torch.device, *, even: bool = False) -> MediaLayout:
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
    layout = MediaLayout.from_media_locations(locations, media)
    return (layout if length == seqlen else layout.last(seqlen)).to(device)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, even: bool
) -> dict[str, Any]:
    batch, seqlen, media, heads, head_dim, num_keys = shape
    q_shape, kv_shape = (batch, seqlen, heads, head_dim), (batch, media, num_keys, heads, head_dim)
    return {
        "q": normal(q_shape, dtype, device, seed=0),
        "k": normal(kv_shape, dtype, device, seed=1),
        "v": normal(kv_shape, dtype, device, mean=0.5, seed=2),
        "layout": media_layout(shape, device, even=even),
    }


def _ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, *, impl: str = "auto"
) -> torch.Tensor:
    if impl == "reference":
        return _reference(q, k, v, layout)
    return flamingo_fast.masked_cross_attention(q, k, v, layout, impl=impl)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
) -> torch.Tensor:
    """The reference in blocks of tokens and their media: for a long text it takes L * N memory.

    In fp32 all along, so that gradients of media in several blocks are rounded once.
    """
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    rows = []
    for sample in range(q.shape[0]):
        blocks = []
        for tokens, media, block_layout in _blocks(layout, sample):
            blocks.append(
                flamingo_fast.masked_cross_attention(
                    wide_q[sample, tokens][None],
                    wide_k[sample, media][None],
                    wide_v[sample, media][None],
                    block_layout,
                    impl="reference",
                )
            )
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows).to(q.dtype)


def _blocks(layout: MediaLayout, sample: int) -> Iterator[tuple[slice, slice, MediaLayout]]:
    for begin in range(0, layout.seqlen, _REFERENCE_TOKENS):
        tokens = slice(begin, begin + _REFERENCE_TOKENS)
        start, end = layout.media_start[sample, tokens], layout.media_end[sample, tokens]
        media = slice(int(start.min()), int(end.max()))
        count = media.stop - media.start
        start, end = ((bound - media.start)[None] for bound in (start, end))
        yield tokens, media, MediaLayout.from_intervals(start, end, count, min(count, 1))


def _num_scores(shape: Shape) -> int:
    batch, seqlen, media, heads, _, num_keys = shape
    return batch * seqlen * heads * media * num_keys


def _check_dense(case: Case, limit: int = _MAX_SCORES_ON_A_CPU) -> None:
    """Raises Unavailable where scores of all tokens and all keys are too many."""
    scores = _num_scores(case.shape)
    if case.device.type == "cpu" and scores > limit:
        raise Unavailable(
            f"{scores:.2g} scores of all tokens and keys, more than {limit:.2g}, "
            "take too long on a CPU"
        )


def _check_eager(case: Case, compiled: bool = False) -> None:
    _check_dense(case, _MAX_COMPILED_SCORES_ON_A_CPU if compiled else _MAX_SCORES_ON_A_CPU)
    if case.device.type == "cuda":
        wanted = _COPIES_OF_SCORES * _num_scores(case.shape) * case.inputs["q"].itemsize
        memory = torch.cuda.get_device_properties(case.device).total_memory
        if wanted > memory:
            raise Unavailable(
                f"scores of all tokens and keys take {wanted / 1e9:.0f} GB, "
                f"the GPU has {memory / 1e9:.0f} GB"
            )


def _build_sdpa(case: Case, mode: str) -> Callable[..., torch.Tensor]:
    """PyTorch's attention under a dense boolean mask, which is made before the clock starts.

    A softmax over nothing may be NaN: rows that attend to nothing see all, and are zeroed after.
    """
    _check_dense(case)
    layout, num_keys = case.inputs["layout"], case.shape[-1]
    attends = layout.attends()[:, None, :, None]
    mask = layout.to_mask().repeat_interleave(num_keys, 2)[:, None]
    silent = ~attends
    any_silent = bool(silent.any())
    mask = mask | silent

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask)
        return (out.masked_fill(silent, 0.0) if any_silent else out).transpose(1, 2)

    return attend


def _heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (k, v))
    return q.transpose(1, 2), keys, values


class _KeysAndValues(nn.Module):
    """Stands in for OpenFlamingo's projection of media, whose result it chunks into k and v."""

    k: torch.Tensor
    v: torch.Tensor

    def forward(self, media: torch.Tensor) -> "_KeysAndValues":
        return self

    def chunk(self, chunks: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k.flatten(1, 2).flatten(2), self.v.flatten(1, 2).flatten(2)


def _build_open_flamingo(case: Case, mode: str) -> Callable[..., torch.Tensor]:
    """Its class; the norm and the projections, which are not part of the op, pass on their input.

    Like in a model, it makes the mask from the image positions in every call.
    """
    _check_eager(case)
    try:
        module = peers.open_flamingo()
    except ImportError as error:
        raise Unavailable(str(error)) from None
    _, seqlen, media, heads, head_dim, _ = case.shape
    attention = module.MaskedCrossAttention(dim=1, dim_visual=1, dim_head=head_dim, heads=heads)
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


def _build_flex_attention(case: Case, mode: str) -> Callable[..., torch.Tensor]:
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
        return compiled(*_heads_first(q, k, v), block_mask=block_mask).transpose(1, 2)

    return attend


_masked_cross_attention = functools.partial(
    Benchmark,
    dims=DIMS,
    quick_shape=(4, 256, 5, 8, 64, 64),
    tiny_shape=(1, 16, 1, 1, 16, 16),
    outputs=("out",),
    eager=eager.masked_cross_attention,
    check_eager=_check_eager,
    ours=_ours,
    work=work.masked_cross_attention,
    eager_work=work.masked_cross_attention_eager,
)

_SDPA = Provider("sdpa", _build_sdpa)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _masked_cross_attention(
            name=NAME,
            make_inputs=functools.partial(_inputs, even=False),
            shapes=(
                (8, 256, 5, 16, 128, 64),
                (4, 256, 5, 8, 64, 64),
                (1, 2048, 32, 8, 64, 64),
                (1, 8192, 128, 16, 128, 64),
                (1, 1, 5, 8, 64, 64),
                (1, 1, 32, 8, 64, 64),
            ),
            others=(
                _SDPA,
                Provider("flex_attention", _build_flex_attention),
                Provider("open_flamingo", _build_open_flamingo),
            ),
        ),
        # Of the providers only ours and flex_attention do other work for other positions.
        _masked_cross_attention(
            name=f"{NAME}_even",
            make_inputs=functools.partial(_inputs, even=True),
            shapes=((8, 256, 5, 16, 128, 64), (4, 256, 5, 8, 64, 64), (1, 2048, 32, 8, 64, 64)),
            others=(_SDPA,),
        ),
    )
}
