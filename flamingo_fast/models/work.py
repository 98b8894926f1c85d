"""Operations in the matrix products and convolutions of a model's training step, in closed form.

2 for each multiply-add. Norms, activations, softmaxes and optimisers are left out; they are
bound by memory. Counted is the work of the paper (Flamingo, arXiv 2204.14198), which attends to all
media of a sample and then masks (section 3.1.3 of v1), and has no activation checkpointing. What an
implementation saves is not taken off: our kernels meet a token's own media alone, and the latents
of a resampler's first layer are projected once for all media.

B samples, L text tokens, N media of a sample, F frames of a medium, S features of a frame.
"""

import dataclasses
import functools

import torch

from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a pass over one dataset has: B, L, N and F."""

    samples: int
    tokens: int
    media: int
    frames: int = 1


_ALIGN, _LTIP = Batch(512, 32, 1), Batch(512, 64, 1)

DATASETS: dict[str, tuple[Batch, ...]] = {
    "m3w": (Batch(256, 256, 5),),
    "align": (_ALIGN,),
    "ltip": (_LTIP,),
    "vtp": (Batch(64, 64, 1, 8),),
    "laion": (_ALIGN, _LTIP),
}
"""The passes of a step over each dataset, in table 3's runs.

Batch sizes are of appendix B.3.1, web pages of section 2.4, pairs of section 3.2.2 of v1. It says
"32 or 64" tokens of pairs and not of which dataset: 32 here of ALIGN, whose texts are the shortest.
LAION takes the places of ALIGN and LTIP: the paper says as little of its batches, and their step
time is the same.
"""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations by part; those of learnt tokens' logits are among `lm`."""

    vision: int = 0
    resampler: int = 0
    conditioning: int = 0
    lm: int = 0

    @property
    def total(self) -> int:
        return self.vision + self.resampler + self.conditioning + self.lm

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.vision + other.vision,
            self.resampler + other.resampler,
            self.conditioning + other.conditioning,
            self.lm + other.lm,
        )


def step_flops(config: FlamingoConfig) -> Flops:
    """Of a training step, in the paper's sense: a pass over each of the config's datasets.

    Raises:
        ConfigError: the language model isn't ours.
    """
    return sum((pass_flops(config, batch) for batch in passes(config)), Flops())


def passes(config: FlamingoConfig) -> list[Batch]:
    """Of a step, one after another."""
    return [batch for name in config.datasets for batch in DATASETS[name]]


def pass_flops(config: FlamingoConfig, batch: Batch) -> Flops:
    """Of the forward and the backward of one batch.

    A frozen vision encoder has a forward alone. A frozen language model has no gradients of
    weights, but those of its inputs down to the first one that is learnt: all of it, where the
    embedding of `<EOC>` is.

    Raises:
        ConfigError: the language model isn't ours.
    """
    if config.lm.kind != "chinchilla":
        raise ConfigError(
            f"lm.kind: expected chinchilla, whose work is known in closed form; got "
            f"{config.lm.kind!r}"
        )
    vision = vision_work(config.vision)
    num_media = batch.samples * batch.media
    num_features = batch.frames * vision.tokens
    resampler = num_media * _resampler(
        config.resampler, num_features, vision.features, not config.vision.is_frozen
    )
    is_perceiver = config.resampler.kind == "perceiver"
    medium_tokens = config.resampler.num_latents if is_perceiver else num_features
    return Flops(
        vision=num_media * batch.frames * vision.flops,
        resampler=resampler,
        conditioning=_conditioning(config, batch, medium_tokens),
        lm=_lm(config, batch),
    )


@dataclasses.dataclass(frozen=True)
class VisionWork:
    """Of one image: S, their width, and operations, with a backward if it isn't frozen."""

    tokens: int
    features: int
    flops: int


def vision_work(config: VisionConfig) -> VisionWork:
    """The forward by PyTorch's counter, since encoders of timm have all kinds of layers.

    A backward is twice as much. PyTorch's counter isn't asked: it takes the gradients of grouped
    convolutions for those of dense ones.

    Raises:
        ConfigError: there is no such encoder.
        ImportError: timm is not installed.
    """
    forward = _vision_forward(config.encoder, config.image_size)
    return dataclasses.replace(forward, flops=forward.flops * (1 if config.is_frozen else 3))


@functools.cache
def _vision_forward(encoder: str, image_size: int) -> VisionWork:
    from torch.utils.flop_counter import FlopCounterMode

    from flamingo_fast.models.vision import VisionEncoder

    model = VisionEncoder(VisionConfig(encoder, image_size), device="meta")
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        tokens = model(image)
    return VisionWork(tokens.shape[1], model.features, counter.get_total_flops())


def _learnt(macs: int) -> int:
    """Of a linear layer with so many multiply-adds forward: its output, and both gradients."""
    return 6 * macs


def _frozen(macs: int, has_gradient: bool) -> int:
    """The same of a frozen one, whose input may have a gradient."""
    return (4 if has_gradient else 2) * macs


def _attention(queries: int, keys: int, inner: int, has_gradient: bool = True) -> int:
    """Scores of all queries and keys, and their sums of values; gradients of all three."""
    return (6 if has_gradient else 2) * 2 * queries * keys * inner


def _feed_forward(rows: int, dim: int, mult: float) -> int:
    return 2 * rows * dim * int(dim * mult)


def _resampler(config: ResamplerConfig, num_features: int, width: int, has_gradient: bool) -> int:
    """Of one medium; `has_gradient` is whether features have one."""
    dim, inner, latents = config.dim, config.heads * config.dim_head, config.num_latents
    projection = 0
    if config.project_features or width != dim:
        projection = (6 if has_gradient else 4) * num_features * width * dim
    if config.kind == "mlp":
        layer = _learnt(_feed_forward(num_features, dim, config.ff_mult))
    elif config.kind == "transformer":
        macs = 4 * num_features * dim * inner + _feed_forward(num_features, dim, config.ff_mult)
        layer = _learnt(macs) + _attention(num_features, num_features, inner)
    else:
        macs = 2 * num_features * dim * inner
        macs += 4 * latents * dim * inner + _feed_forward(latents, dim, config.ff_mult)
        layer = _learnt(macs) + _attention(latents, num_features + latents, inner)
    return projection + config.depth * layer


def _conditioning(config: FlamingoConfig, batch: Batch, medium_tokens: int) -> int:
    """Of all blocks and, of grafting, of the layers between them."""
    conditioning, dim = config.conditioning, config.lm.dim
    inner = conditioning.heads * conditioning.dim_head
    rows = batch.samples * batch.tokens
    keys = batch.media * medium_tokens
    dim_media = conditioning.dim_media or config.resampler.dim
    macs = 2 * rows * dim * inner + 2 * batch.samples * keys * dim_media * inner
    if conditioning.kind != "vanilla_xattn":
        macs += _feed_forward(rows, dim, conditioning.ff_mult)
    block = _learnt(macs) + _attention(rows, keys, inner)
    if conditioning.kind == "grafting":
        layer = _self_attention(config.lm, batch, is_frozen=False, has_gradient=True)
        layer += _learnt(_feed_forward(rows, dim, config.lm.ff_mult))
        return conditioning.num_layers * (layer + block)
    return len(conditioning.layers(config.lm.depth)) * block


def _lm(config: FlamingoConfig, batch: Batch) -> int:
    lm, rows = config.lm, batch.samples * batch.tokens
    first_attention, first_feed_forward = _first_with_gradients(config)
    feed_forward = _feed_forward(rows, lm.dim, lm.ff_mult)
    flops = 0
    for index in range(lm.depth):
        flops += _self_attention(lm, batch, lm.is_frozen, index >= first_attention)
        if lm.is_frozen:
            flops += _frozen(feed_forward, index >= first_feed_forward)
        else:
            flops += _learnt(feed_forward)
    head = rows * lm.dim * lm.vocab_size
    flops += _frozen(head, has_gradient=True) if lm.is_frozen else _learnt(head)
    return flops + _learnt(rows * lm.dim * len(config.learnt_token_ids))


def _first_with_gradients(config: FlamingoConfig) -> tuple[int, int]:
    """Of the language model's layers, the first whose self-attention and whose feed-forward do."""
    if config.learnt_token_ids or not config.lm.is_frozen:
        return 0, 0
    conditioning: ConditioningConfig = config.conditioning
    if conditioning.kind == "grafting":
        return config.lm.depth, config.lm.depth
    first = conditioning.layers(config.lm.depth)[0]
    return first + (conditioning.kind == "vanilla_xattn"), first


def _self_attention(
    lm: LanguageModelConfig, batch: Batch, is_frozen: bool, has_gradient: bool
) -> int:
    """With relative positions: the distances' projection once, their scores with all queries."""
    inner, rows = lm.heads * lm.dim_head, batch.samples * batch.tokens
    macs, distances = 4 * rows * lm.dim * inner, batch.tokens + 1
    projection, scores = distances * lm.dim * inner, rows * distances * inner
    attention = _attention(rows, batch.tokens, inner, has_gradient)
    if is_frozen:
        position = 2 * projection + _frozen(scores, has_gradient)
        return _frozen(macs, has_gradient) + attention + position
    return _learnt(macs) + attention + 4 * projection + _learnt(scores)
