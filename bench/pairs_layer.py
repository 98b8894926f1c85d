"""The gated cross-attention layer of OpenFlamingo on image-text pairs, packed or padded.

The layer is the same but for its attention; so packing is what its ratios show. In a layer padding
costs projections and a feed-forward too, which is most of the arithmetic.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from flamingo_fast.bench import attention, pairs, work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Function,
    Provider,
    Shape,
    normal,
)
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import eager

NAME = f"{pairs.NAME}_layer"
# Of the feed-forward: OpenFlamingo's ff_mult.
_EXPANSION = 4
# tanh of a gate of a trained layer; gates of 0 would hide the rest.
_GATE = 0.5


def _weights(shape: Shape) -> dict[str, tuple[int, int]]:
    """(rows out, columns in) of the weights, by name."""
    *_, heads, head_dim, _, width = shape
    inner = heads * head_dim
    return {
        "to_q": (inner, width),
        "to_kv": (2 * inner, width),
        "to_out": (width, inner),
        "ff_up": (_EXPANSION * width, width),
        "ff_down": (width, _EXPANSION * width),
    }


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """`media` are images' latents, as wide as the text."""
    batch, _, _, head_dim, num_keys, width = shape
    layout = pairs.packed_layout(shape, device)
    inputs: dict[str, Any] = {
        "x": normal((1, layout.seqlen, width), dtype, device, seed=0),
        "media": normal((batch, num_keys, width), dtype, device, seed=1),
    }
    for seed, (name, (rows, columns)) in enumerate(_weights(shape).items(), start=2):
        weight = normal((rows, columns), torch.float32, device, seed=seed)
        inputs[name] = (weight / math.sqrt(columns)).to(dtype)
    return inputs | {"layout": layout, "head_dim": head_dim}


def _layer(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """OpenFlamingo's GatedCrossAttentionBlock (helpers.py), but for the parameters of its norms."""

    def layer(
        x: torch.Tensor,
        media: torch.Tensor,
        to_q: torch.Tensor,
        to_kv: torch.Tensor,
        to_out: torch.Tensor,
        ff_up: torch.Tensor,
        ff_down: torch.Tensor,
        layout: MediaLayout,
        head_dim: int,
        **options: Any,
    ) -> torch.Tensor:
        width = x.shape[-1:]
        q = F.linear(F.layer_norm(x, width), to_q).unflatten(-1, (-1, head_dim))
        k, v = F.linear(media, to_kv).unflatten(-1, (2, -1, head_dim)).unbind(2)
        attended = attend(q, k, v, layout, **options).flatten(2)
        x = x + _GATE * F.linear(attended, to_out)
        hidden = F.gelu(F.linear(F.layer_norm(x, width), ff_up))
        return x + _GATE * F.linear(hidden, ff_down)

    return layer


def _build_eager(case: Case, compiled: bool) -> Function:
    return pairs.on_padded_batch(_layer(eager.masked_cross_attention), case)


def _build_sdpa(case: Case, mode: str) -> Function:
    layout = pairs.padded_layout(case.shape, case.device)
    return pairs.on_padded_batch(
        _layer(attention.under_dense_mask(layout, case.inputs["media"].shape[1])), case
    )


def _work(shape: Shape, itemsize: int, mode: str) -> work.Work:
    rows = int(pairs.text_lengths(shape).sum())
    of_attention = pairs.attention_work(shape[:5], itemsize, mode)
    return of_attention + _work_around_attention(shape, rows, itemsize, mode)


def _eager_work(shape: Shape, itemsize: int, mode: str) -> work.Work:
    of_attention = pairs.eager_work(shape[:5], itemsize, mode)
    return of_attention + _work_around_attention(shape, shape[0] * shape[1], itemsize, mode)


def _work_around_attention(shape: Shape, rows: int, itemsize: int, mode: str) -> work.Work:
    """Projections and feed-forward."""
    batch, *_, num_keys, _ = shape
    linears = [
        (batch * num_keys if name == "to_kv" else rows, inputs, outputs)
        for name, (outputs, inputs) in _weights(shape).items()
    ]
    return work.linears(linears, itemsize, mode)


BENCHMARKS = {
    NAME: Benchmark(
        name=NAME,
        dims=("B", "L", "H", "D", "R", "width"),
        shapes=((32, 64, 8, 64, 64, 1024), (32, 32, 8, 64, 64, 1024)),
        quick_shape=(8, 64, 4, 64, 64, 256),
        tiny_shape=(1, 16, 1, 16, 16, 16),
        outputs=("out",),
        make_inputs=_inputs,
        build_eager=_build_eager,
        ours=_layer(attention.ours),
        work=_work,
        eager_work=_eager_work,
        others=(
            Provider("sdpa", _build_sdpa),
            Provider(
                "ours_padded",
                lambda case, mode: pairs.on_padded_batch(_layer(attention.ours), case),
            ),
        ),
        fewest_rounds=5,
    )
}
