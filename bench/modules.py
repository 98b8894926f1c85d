"""The modules that users touch, beside OpenFlamingo's and flamingo-pytorch's with the same weights.

The floor is the module's linear layers alone, on inputs of the sizes that they have in the module.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flamingo_fast.bench import attention, latent, work
from flamingo_fast.bench.registry import (
    Benchmark,
    Case,
    Floor,
    Function,
    Provider,
    Shape,
    Unavailable,
    normal,
    of_peer,
)
from flamingo_fast.layout import MediaLayout
from flamingo_fast.modules import GatedCrossAttentionBlock, MaskedCrossAttention, PerceiverResampler
from flamingo_fast.ops.dispatch import use_impl
from flamingo_fast.testing import peers

# tanh of a gate of a trained layer is about a half; gates of 0 would hide the rest.
_GATE = 0.5
_HEADS, _DIM_HEAD, _EXPANSION, _LATENTS = 8, 64, 4, 64

_MakeModule = Callable[..., nn.Module]


def _weights(
    make: _MakeModule, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Parameters by name; branches are small beside the residuals, as in trained models."""
    weights = {}
    with torch.device("meta"):
        parameters = dict(make().named_parameters())
    for seed, (name, parameter) in enumerate(parameters.items(), start=10):
        value = normal(tuple(parameter.shape), torch.float32, device, seed=seed)
        if name.endswith("_gate"):
            value = torch.full_like(value, _GATE)
        elif parameter.dim() == 1:
            value = value / 10 + name.endswith("weight")
        elif not name.endswith("latents"):
            value = value / math.sqrt(4 * parameter.shape[1])
        weights[name] = value.to(dtype)
    return weights


def _functional(
    make: _MakeModule, keywords: dict[str, Any] | None = None, **fixed: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """A function of a module's inputs, as a tuple, and its parameters, in the order it has them.

    But for those that are `fixed`, by name. With `keywords` for the module's forward.
    """
    # What parameters it has is known; whose values they have is the case's business.
    with torch.device("meta"):
        module = make()
    names = [name for name, _ in module.named_parameters() if name not in fixed]

    def call(inputs: tuple[Any, ...], parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
        values = fixed | dict(zip(names, parameters, strict=True))
        return functional_call(module, values, inputs, keywords)

    return call


def _ours_and_weights(
    make: _MakeModule,
    dtype: torch.dtype,
    device: torch.device,
    keywords: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The last inputs of a case: our module, made before the clock starts, and its parameters."""
    return {"ours": _functional(make, keywords), **_weights(make, dtype, device)}


def _call_ours(num_inputs: int, *arguments: Any, impl: str = "auto") -> torch.Tensor:
    inputs, ours, parameters = (
        arguments[:num_inputs],
        arguments[num_inputs],
        arguments[num_inputs + 1 :],
    )
    dtype = inputs[0].dtype
    if impl == "reference":
        # The oracle in fp32 all through: products in 16 bits would round as the baseline's do.
        wide = torch.promote_types(dtype, torch.float32)
        inputs, parameters = (
            tuple(x.to(wide) if x.is_floating_point() else x for x in tensors)
            for tensors in (inputs, parameters)
        )
    with use_impl(impl):
        return ours(inputs, parameters).to(dtype)


def _theirs(make: _MakeModule, num_inputs: int) -> Callable[..., torch.Tensor]:
    """The same of a peer's module, which has our parameters in the same order."""
    theirs = _functional(make)

    def call(*arguments: Any) -> torch.Tensor:
        return theirs(arguments[:num_inputs], arguments[num_inputs + 1 :])

    return call


def _floor(linears: Callable[[Shape], Iterator[work.Linear]]) -> Provider:
    """The linear layers alone: forward, or forward and the gradients of inputs and weights."""

    def build(case: Case, mode: str) -> Floor:
        dtype = case.inputs["x"].dtype
        tensors = []
        for seed, (rows, columns, outputs) in enumerate(linears(case.shape)):
            source = normal((rows, columns), dtype, case.device, seed=seed)
            weight = normal((outputs, columns), dtype, case.device, seed=seed) / columns**0.5
            dout = normal((rows, outputs), dtype, case.device, seed=seed)
            tensors.append((source, weight.to(dtype), dout))

        def forward() -> list[torch.Tensor]:
            return [F.linear(source, weight) for source, weight, _ in tensors]

        def forward_and_backward() -> list[torch.Tensor]:
            outs = [
                F.linear(source.requires_grad_(), weight.requires_grad_())
                for source, weight, _ in tensors
            ]
            leaves = [leaf for source, weight, _ in tensors for leaf in (source, weight)]
            douts = [dout for *_, dout in tensors]
            return [*outs, *torch.autograd.grad(outs, leaves, douts)]

        return Floor(forward if mode == "fwd" else forward_and_backward)

    return Provider("floor", build)


def _layer_options(shape: Shape) -> dict[str, Any]:
    *_, dim, dim_visual = shape
    return {"dim": dim, "dim_visual": dim_visual, "dim_head": _DIM_HEAD, "heads": _HEADS}


def _layer_linears(shape: Shape, feed_forward: bool) -> Iterator[work.Linear]:
    batch, seqlen, media, dim, dim_visual = shape
    rows, inner = batch * seqlen, _HEADS * _DIM_HEAD
    yield rows, dim, inner
    yield batch * media * _LATENTS, dim_visual, 2 * inner
    yield rows, inner, dim
    if feed_forward:
        yield rows, dim, _EXPANSION * dim
        yield rows, _EXPANSION * dim, dim


def _attention_shape(shape: Shape) -> Shape:
    batch, seqlen, media, *_ = shape
    return batch, seqlen, media, _HEADS, _DIM_HEAD, _LATENTS


def _locations(shape: Shape, device: torch.device) -> torch.Tensor:
    text_time = attention.media_layout(_attention_shape(shape), device).media_end
    return text_time.diff(dim=1, prepend=torch.zeros_like(text_time[:, :1])) > 0


def _layer(name: str, ours: type[nn.Module], feed_forward: bool) -> Benchmark:
    """MaskedCrossAttention or GatedCrossAttentionBlock."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        batch, seqlen, media, dim, dim_visual = shape
        locations = _locations(shape, device)
        # On a GPU a layout is a hundred small kernels, once for all layers: that of another layer.
        made = device.type == "cuda"
        keywords = {"layout": MediaLayout.from_media_locations(locations, media)} if made else {}
        make = functools.partial(ours, **_layer_options(shape))
        return {
            "x": normal((batch, seqlen, dim), dtype, device, seed=0),
            "media": normal((batch, media, _LATENTS, dim_visual), dtype, device, seed=1),
            "media_locations": locations,
            **_ours_and_weights(make, dtype, device, keywords),
        }

    def build_eager(case: Case, compiled: bool) -> Function:
        module = getattr(of_peer(peers.open_flamingo), ours.__name__)
        return _theirs(functools.partial(module, **_layer_options(case.shape)), 3)

    def build_flamingo_pytorch(case: Case, mode: str) -> Function:
        module = getattr(of_peer(peers.flamingo_pytorch), ours.__name__)
        options = _layer_options(case.shape)
        if options.pop("dim_visual") != options["dim"]:
            raise Unavailable("its media are as wide as its text")
        return _theirs(functools.partial(module, **options), 3)

    def work_of(shape: Shape, itemsize: int, mode: str, eager: bool) -> work.Work:
        of_attention = work.masked_cross_attention_eager if eager else work.masked_cross_attention
        around = work.linears(_layer_linears(shape, feed_forward), itemsize, mode)
        return of_attention(_attention_shape(shape), itemsize, mode) + around

    return Benchmark(
        name=name,
        dims=("B", "L", "N", "dim", "dim_visual"),
        shapes=((4, 256, 5, 2048, 1024), (4, 256, 5, 1024, 1024), (1, 2048, 32, 2048, 1024)),
        quick_shape=(2, 128, 5, 256, 256),
        tiny_shape=(1, 16, 1, 16, 16),
        outputs=("out",),
        make_inputs=inputs,
        build_eager=build_eager,
        ours=functools.partial(_call_ours, 3),
        work=functools.partial(work_of, eager=False),
        eager_work=functools.partial(work_of, eager=True),
        others=(
            Provider("flamingo_pytorch", build_flamingo_pytorch),
            _floor(functools.partial(_layer_linears, feed_forward=feed_forward)),
        ),
        fewest_rounds=5,
    )


def _resampler_options(shape: Shape) -> dict[str, Any]:
    *_, dim, depth = shape
    return {"dim": dim, "depth": depth, "dim_head": _DIM_HEAD, "heads": _HEADS}


def _resampler_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    make = functools.partial(PerceiverResampler, **_resampler_options(shape))
    return {
        "x": normal(shape[:-1], dtype, device, seed=0),
        **_ours_and_weights(make, dtype, device),
    }


def _build_resampler(case: Case, compiled: bool) -> Function:
    module = of_peer(peers.open_flamingo).PerceiverResampler
    return _theirs(functools.partial(module, **_resampler_options(case.shape)), 1)


def _build_flamingo_pytorch_resampler(case: Case, mode: str) -> Function:
    """Without its embeddings of media, which ours and OpenFlamingo's don't have."""
    _, media, *_, dim, _ = case.shape
    module = of_peer(peers.flamingo_pytorch).PerceiverResampler
    options = {**_resampler_options(case.shape), "num_media_embeds": media}
    x = case.inputs["x"]
    embeddings = torch.zeros(media, 1, dim, dtype=x.dtype, device=case.device)
    theirs = _functional(functools.partial(module, **options), media_pos_emb=embeddings)

    def call(x: torch.Tensor, ours: Any, *parameters: torch.Tensor) -> torch.Tensor:
        return theirs((x.flatten(2, 3),), parameters)

    return call


def _resampler_linears(shape: Shape) -> Iterator[work.Linear]:
    batch, media, frames, features, dim, depth = shape
    inner, images = _HEADS * _DIM_HEAD, batch * media
    for _ in range(depth):
        yield images * _LATENTS, dim, inner
        yield images * (frames * features + _LATENTS), dim, 2 * inner
        yield images * _LATENTS, inner, dim
        yield images * _LATENTS, dim, _EXPANSION * dim
        yield images * _LATENTS, _EXPANSION * dim, dim


def _resampler_work(shape: Shape, itemsize: int, mode: str, eager: bool) -> work.Work:
    batch, media, frames, features, _, depth = shape
    keys = frames * features
    of_attention = (latent.eager_work if eager else latent.attention_work)(
        (batch * media, _LATENTS, keys, _HEADS, _HEADS, _DIM_HEAD, keys), itemsize, mode
    )
    return of_attention * depth + work.linears(_resampler_linears(shape), itemsize, mode)


def _decode_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One token after all images. Parameters are not inputs: nothing has a gradient but x."""
    batch, seqlen, media, dim, dim_visual = shape
    block = GatedCrossAttentionBlock(**_layer_options(shape)).to(device, dtype)
    block.load_state_dict(
        _weights(lambda: GatedCrossAttentionBlock(**_layer_options(shape)), dtype, device)
    )
    block.requires_grad_(False)
    latents = normal((batch, media, _LATENTS, dim_visual), dtype, device, seed=1)
    with torch.no_grad():
        cached = block.attn.project_media(latents)
    x = normal((batch, seqlen, dim), dtype, device, seed=0)
    locations = torch.ones(batch, media, dtype=torch.bool, device=device)
    return {
        "x": x,
        # In a tuple, so that nobody asks for its gradient.
        "media": (latents,),
        "media_kv": cached,
        "media_locations": locations,
        # A model makes it once for all of its layers.
        "layout": block.attn.make_layout(x, cached[0], locations, use_cached_media=True),
        "block": block,
    }


def _decode(
    x: torch.Tensor,
    media: tuple[torch.Tensor],
    media_kv: tuple[torch.Tensor, torch.Tensor],
    media_locations: torch.Tensor,
    layout: MediaLayout,
    block: nn.Module,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    with use_impl(impl):
        return block(x, layout=layout, media_kv=media_kv)


def _build_decode(case: Case, compiled: bool) -> Function:
    """OpenFlamingo caches the latents, and projects them again for each token."""
    module = of_peer(peers.open_flamingo).GatedCrossAttentionBlock
    theirs = module(**_layer_options(case.shape)).to(case.device, case.inputs["x"].dtype)
    theirs.load_state_dict(case.inputs["block"].state_dict())
    theirs.requires_grad_(False)

    def decode(
        x: torch.Tensor, media: Any, media_kv: Any, media_locations: torch.Tensor, *ours: Any
    ) -> torch.Tensor:
        return theirs(x, media[0], media_locations, use_cached_media=True)

    return decode


def _decode_work(shape: Shape, itemsize: int, mode: str, eager: bool) -> work.Work:
    linears = _layer_linears(shape, feed_forward=True) if eager else _decode_linears(shape)
    of_attention = work.masked_cross_attention_eager if eager else work.masked_cross_attention
    around = work.linears(linears, itemsize, mode)
    return around + of_attention(_attention_shape(shape), itemsize, mode)


def _decode_linears(shape: Shape) -> Iterator[work.Linear]:
    linears = list(_layer_linears(shape, feed_forward=True))
    yield from (linears[0], *linears[2:])


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _layer("MaskedCrossAttention", MaskedCrossAttention, feed_forward=False),
        _layer("GatedCrossAttentionBlock", GatedCrossAttentionBlock, feed_forward=True),
        Benchmark(
            name="GatedCrossAttentionBlock_decode",
            dims=("B", "L", "N", "dim", "dim_visual"),
            shapes=((1, 1, 32, 2048, 1024), (1, 1, 32, 1024, 1024)),
            quick_shape=(1, 1, 8, 256, 256),
            tiny_shape=(1, 1, 1, 16, 16),
            outputs=("out",),
            make_inputs=_decode_inputs,
            build_eager=_build_decode,
            ours=_decode,
            work=functools.partial(_decode_work, eager=False),
            eager_work=functools.partial(_decode_work, eager=True),
            others=(_floor(_decode_linears),),
        ),
        Benchmark(
            name="PerceiverResampler",
            dims=("B", "N", "F", "S", "dim", "depth"),
            shapes=(
                (4, 5, 1, 256, 1024, 6),
                (1, 32, 1, 256, 1024, 6),
                (1, 1, 8, 256, 1024, 6),
                (1, 1, 32, 256, 1024, 6),
            ),
            quick_shape=(1, 2, 1, 64, 256, 2),
            tiny_shape=(1, 1, 1, 16, 16, 1),
            outputs=("out",),
            make_inputs=_resampler_inputs,
            build_eager=_build_resampler,
            ours=functools.partial(_call_ours, 1),
            work=functools.partial(_resampler_work, eager=False),
            eager_work=functools.partial(_resampler_work, eager=True),
            others=(
                Provider("flamingo_pytorch", _build_flamingo_pytorch_resampler),
                _floor(_resampler_linears),
            ),
            fewest_rounds=5,
        ),
    )
}
