"""Image-text pairs as Flamingo trains on: their texts one after the other, or padded."""

import math
from typing import Any

import torch

from flamingo_fast.bench import attention, several_media_work, work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Function,
    Provider,
    Rearranged,
    Shape,
    normal,
)
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import eager

NAME = f"{attention.NAME}_pairs"
# Of a text, by the length that it is padded to: LTIP and ALIGN (Flamingo, section 3.2.2 of v1).
MEAN_TOKENS = {64: 20.5, 32: 12.4}

_CPU = torch.device("cpu")


def text_lengths(shape: Shape) -> torch.Tensor:
    """(B,) tokens of each pair, its image token included; the same in every run.

    Geometric, since the mean is all that the paper tells, and of all distributions of whole numbers
    with that mean this one assumes the least; cut at L. Quantiles at even distances, in random
    order, so that few pairs have about the mean too.
    """
    pairs, longest, *_ = shape
    mean = MEAN_TOKENS.get(longest, max(longest / 3, 1.0))
    quantiles = (torch.arange(pairs, dtype=torch.float64) + 0.5) / pairs
    ends = 1 - 1 / mean
    lengths = torch.log1p(-quantiles) / math.log(ends) if ends > 0 else torch.ones(pairs)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0))
    return lengths.ceil().long().clamp(1, longest)[order]


def packed_layout(shape: Shape, device: torch.device) -> MediaLayout:
    """All pairs in one row without padding; each starts with its image token."""
    lengths = text_lengths(shape)
    ends = lengths.cumsum(0)
    locations = torch.zeros(1, int(ends[-1]), dtype=torch.bool)
    locations[0, ends - lengths] = True
    return MediaLayout.packed(locations, [0, *ends.tolist()], 1).to(device)


def padded_layout(shape: Shape, device: torch.device) -> MediaLayout:
    """A row of L tokens for each pair. Padding attends to the image: nobody tells it apart."""
    batch, seqlen, *_ = shape
    locations = torch.zeros(batch, seqlen, dtype=torch.bool)
    locations[:, 0] = True
    return MediaLayout.from_media_locations(locations, 1).to(device)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, _, heads, head_dim, num_keys = shape
    layout = packed_layout(shape, device)
    kv_shape = (batch, num_keys, heads, head_dim)
    return {
        "q": normal((1, layout.seqlen, heads, head_dim), dtype, device, seed=0),
        "k": normal(kv_shape, dtype, device, seed=1),
        "v": normal(kv_shape, dtype, device, mean=0.5, seed=2),
        "layout": layout,
    }


def on_padded_batch(function: Any, case: Case) -> Rearranged:
    """`function` of the same tokens, padded with zeros before the clock starts."""
    layout = padded_layout(case.shape, case.device)
    tokens = torch.arange(layout.seqlen) < text_lengths(case.shape)[:, None]
    rows = tokens.flatten().nonzero().flatten().to(case.device)

    def pad(name: str, value: Any) -> Any:
        if name == "layout":
            return layout
        if name not in ("q", "x", "out"):
            return value
        padded = value.new_zeros(tokens.numel(), *value.shape[2:])
        return padded.index_copy(0, rows, value[0]).unflatten(0, tokens.shape)

    def unpad(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(0, 1)[rows][None] if name in ("dq", "dx", "out") else tensor

    return Rearranged(function, pad, unpad)


def _build_eager(case: Case, compiled: bool) -> Function:
    return on_padded_batch(eager.masked_cross_attention, case)


def _build_sdpa(case: Case, mode: str) -> Function:
    layout = padded_layout(case.shape, case.device)
    return on_padded_batch(attention.under_dense_mask(layout, case.shape[-1]), case)


def attention_work(shape: Shape, itemsize: int, mode: str) -> work.Work:
    *_, heads, head_dim, num_keys = shape
    layout = packed_layout(shape, _CPU)
    return several_media_work.attention_of_layout(
        layout, heads, heads, head_dim, num_keys, itemsize, mode
    )


def eager_work(shape: Shape, itemsize: int, mode: str) -> work.Work:
    batch, seqlen, *rest = shape
    return work.masked_cross_attention_eager((batch, seqlen, 1, *rest), itemsize, mode)


BENCHMARKS = {
    NAME: Benchmark(
        name=NAME,
        dims=("B", "L", "H", "D", "R"),
        shapes=((128, 64, 8, 64, 64), (128, 32, 8, 64, 64)),
        quick_shape=(16, 64, 4, 64, 64),
        tiny_shape=(1, 16, 1, 16, 16),
        outputs=("out",),
        make_inputs=_inputs,
        build_eager=_build_eager,
        ours=attention.ours,
        work=attention_work,
        eager_work=eager_work,
        others=(
            Provider("sdpa", _build_sdpa),
            Provider("ours_padded", lambda case, mode: on_padded_batch(attention.ours, case)),
            *attention.LIBRARIES,
        ),
    )
}
