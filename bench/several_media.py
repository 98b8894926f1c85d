"""Attention to several media a token, to media of thousands of tokens, and under masks of media."""

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

from flamingo_fast.bench import attention, several_media_work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Function,
    Provider,
    Shape,
    normal,
    of_peer,
)
from flamingo_fast.bench.work import Work
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import peers

MLLAMA, ALL_PREVIOUS, IDEFICS, RANDOM, SPARSE = (
    f"{attention.NAME}_{variant}"
    for variant in ("mllama", "all_previous", "idefics", "random", "sparse")
)
MLLAMA_DIMS = ("B", "L", "N", "H", "Hkv", "D", "tiles", "R")

_CPU = torch.device("cpu")
# A round of the largest takes 10 seconds on a few cores.
_FEWEST_ROUNDS = 5


def tile_mask(shape: Shape) -> torch.Tensor:
    """(B, L, N, tiles), as transformers' processor for Mllama makes it.

    Images come evenly after the first token, each with its text. Short texts are the last tokens of
    one that has room for all images.
    """
    batch, seqlen, media, *_, tiles, _ = shape
    length = max(seqlen, 1 + 2 * media)
    starts = [1 + image * (length - 1) // media for image in range(media)]
    mask = torch.zeros(batch, length, media, tiles, dtype=torch.int64)
    for image, (start, end) in enumerate(itertools.pairwise([*starts, length])):
        mask[:, start:end, image] = 1
    return mask[:, length - seqlen :]


def one_hot_mask(shape: Shape) -> torch.Tensor:
    """(B, L, N) bool, as transformers' processor for IDEFICS makes it; the same in every run.

    Images and ends of documents, one for four images, are at random positions. After the end of a
    document text attends to nothing until the next image.
    """
    batch, seqlen, media, *_ = shape
    ends = media // 4
    length = max(seqlen, media + ends)
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(batch, length, media, dtype=torch.bool)
    for sample in mask:
        events = torch.randperm(length, generator=generator)[: media + ends]
        images = events[:media].sort().values.tolist()
        for image, (start, following) in enumerate(itertools.pairwise([*images, length])):
            stops = [end for end in events[media:].tolist() if start < end < following]
            sample[start : min(stops, default=following - 1) + 1, image] = True
    return mask[:, length - seqlen :]


def random_mask(shape: Shape) -> torch.Tensor:
    """(B, L, N) bool: half of the media, others for every token, as in transformers' tests."""
    return torch.rand(shape[:3], generator=torch.Generator().manual_seed(0)) < 0.5


def sparse_mask(shape: Shape) -> torch.Tensor:
    """(B, L, N) bool: the first image and the last one before the token; images are at random."""
    mask = attention.media_layout(shape, _CPU).to_mask()
    mask[..., :1] |= mask.any(2, keepdim=True)
    return mask


def mllama_layout(shape: Shape, device: torch.device) -> MediaLayout:
    return MediaLayout.from_tile_mask(tile_mask(shape), tokens_per_tile=shape[-1]).to(device)


def _layout_of_mask(
    shape: Shape,
    device: torch.device,
    *,
    make_mask: Callable[[Shape], torch.Tensor],
    max_media_per_token: int | None = None,
) -> MediaLayout:
    return MediaLayout.from_media_mask(make_mask(shape), max_media_per_token).to(device)


def _mllama_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, seqlen, media, heads, kv_heads, head_dim, tiles, num_keys = shape
    kv_shape = (batch, media, tiles * num_keys, kv_heads, head_dim)
    return {
        "q": normal((batch, seqlen, heads, head_dim), dtype, device, seed=0),
        "k": normal(kv_shape, dtype, device, seed=1),
        "v": normal(kv_shape, dtype, device, mean=0.5, seed=2),
        "layout": mllama_layout(shape, device),
    }


def _mllama_work(shape: Shape, itemsize: int, mode: str) -> Work:
    *_, heads, kv_heads, head_dim, tiles, num_keys = shape
    layout = mllama_layout(shape, _CPU)
    return several_media_work.attention_of_layout(
        layout, heads, kv_heads, head_dim, tiles * num_keys, itemsize, mode, dense=True
    )


def _mllama_eager_work(shape: Shape, itemsize: int, mode: str) -> Work:
    batch, seqlen, media, heads, kv_heads, head_dim, tiles, num_keys = shape
    return several_media_work.transformers_attention(
        batch, seqlen, media * tiles * num_keys, heads, kv_heads, head_dim, itemsize, mode
    )


def _work(
    shape: Shape,
    itemsize: int,
    mode: str,
    *,
    make_layout: Callable[[Shape, torch.device], MediaLayout],
) -> Work:
    *_, heads, head_dim, num_keys = shape
    layout = make_layout(shape, _CPU)
    return several_media_work.attention_of_layout(
        layout, heads, heads, head_dim, num_keys, itemsize, mode
    )


def _build_mllama(case: Case, compiled: bool) -> Function:
    """transformers' own attention; the mask is made beforehand, once for all layers in a model."""
    attention.check_eager(case, compiled)
    *_, heads, kv_heads, _, _, num_keys = case.shape
    # For its options; its projections are small and not used.
    module = of_peer(lambda: peers.mllama_cross_attention(heads, heads, kv_heads)).eval()
    mask = tile_mask(case.shape).to(case.device)
    file = sys.modules[type(module).__module__]
    bias, _ = file._prepare_cross_attention_mask(mask, num_keys, case.inputs["q"].dtype)
    return _eager_attention(module, bias)


def _build_idefics(case: Case, compiled: bool) -> Function:
    """The same of IDEFICS; its layer zeroes the tokens that attend to nothing."""
    attention.check_eager(case, compiled)
    *_, heads, _, num_keys = case.shape
    module = of_peer(lambda: peers.idefics_layer(heads, heads, 1)).eval()
    layout, dtype = case.inputs["layout"], case.inputs["q"].dtype
    mask = layout.to_mask().repeat_interleave(num_keys, 2)[:, None]
    bias = torch.zeros(mask.shape, dtype=dtype, device=case.device)
    bias = bias.masked_fill_(~mask, torch.finfo(dtype).min)
    attend, silent = _eager_attention(module, bias), ~layout.attends()[..., None, None]
    return lambda *inputs: attend(*inputs).masked_fill(silent, 0.0)


def _eager_attention(module: torch.nn.Module, bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    attention_forward = sys.modules[type(module).__module__].eager_attention_forward

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        heads_first = attention.heads_first(q, k, v)
        out, _ = attention_forward(module, *heads_first, bias, q.shape[-1] ** -0.5)
        return out

    return attend


def _of_images(
    name: str, make_layout: Callable[[Shape, torch.device], MediaLayout], **options: Any
) -> Benchmark:
    return Benchmark(
        name=name,
        dims=attention.DIMS,
        tiny_shape=(1, 16, 1, 1, 16, 16),
        outputs=("out",),
        make_inputs=functools.partial(attention.make_inputs, make_layout=make_layout),
        work=functools.partial(_work, make_layout=make_layout),
        fewest_rounds=_FEWEST_ROUNDS,
        **options,
    )


_of_mask = functools.partial(
    _of_images,
    shapes=((2, 512, 8, 8, 96, 64),),
    quick_shape=(2, 128, 4, 4, 96, 64),
    build_eager=_build_idefics,
    ours=attention.ours,
    eager_work=several_media_work.idefics_eager,
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name=MLLAMA,
            dims=MLLAMA_DIMS,
            shapes=((1, 1024, 1, 32, 8, 128, 4, 1601), (1, 1, 1, 32, 8, 128, 4, 1601)),
            quick_shape=(1, 64, 1, 8, 2, 128, 4, 101),
            tiny_shape=(1, 16, 1, 1, 1, 16, 1, 16),
            outputs=("out",),
            make_inputs=_mllama_inputs,
            fewest_rounds=_FEWEST_ROUNDS,
            build_eager=_build_mllama,
            ours=functools.partial(attention.ours, unattended="dense"),
            work=_mllama_work,
            eager_work=_mllama_eager_work,
            others=(
                Provider(
                    "sdpa",
                    # Longer than elsewhere: all tokens attend to the image, and none is in vain.
                    functools.partial(
                        attention.build_sdpa,
                        unattended="dense",
                        limit=2 * attention.MAX_SCORES_ON_A_CPU,
                    ),
                ),
            ),
        ),
        _of_images(
            ALL_PREVIOUS,
            functools.partial(attention.media_layout, attend="all_previous"),
            shapes=((1, 2048, 32, 8, 64, 64),),
            quick_shape=(1, 256, 5, 8, 64, 64),
            build_eager=functools.partial(attention.build_open_flamingo, immediate=False),
            ours=functools.partial(attention.ours, unattended="uniform"),
            eager_work=several_media_work.all_previous_eager,
            others=(
                Provider("sdpa", functools.partial(attention.build_sdpa, unattended="uniform")),
            ),
        ),
        _of_mask(
            IDEFICS,
            functools.partial(_layout_of_mask, make_mask=one_hot_mask, max_media_per_token=1),
            others=(attention.SDPA, *attention.LIBRARIES),
        ),
        _of_mask(
            RANDOM,
            functools.partial(_layout_of_mask, make_mask=random_mask),
            others=(attention.SDPA,),
        ),
        _of_mask(
            SPARSE,
            functools.partial(_layout_of_mask, make_mask=sparse_mask, max_media_per_token=2),
            others=(attention.SDPA,),
        ),
    )
}
