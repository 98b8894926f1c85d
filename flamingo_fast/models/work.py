"""Operations in the matrix products and convolutions of a model's training step, in closed form.

2 for each multiply-add. Norms, activations, softmaxes and optimisers are left out; they are
bound by memory. Counted is the work of the paper (Flamingo, arXiv 2204.14198), which attends to all
media of a sample and then masks (section 3.1.3 of v1), and has no activation checkpointing. What an
implementation saves is not taken off: our kernels meet a token's own media alone, and the latents
of a resampler's first layer are projected once for all media.

B samples, L text tokens, N media of a sample, F frames of a medium, S features of a frame.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.conditioning import find_layers
from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.parts import hidden_size, stack_config, vocab_size_of


@dataclasses.dataclass(frozen=True)
class Document:
    """Text that attends to itself alone, of L tokens, and F of each of its media."""

    tokens: int
    frames: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a pass over one dataset has, where all samples are alike: B, L, N and F."""

    samples: int
    tokens: int
    media: int
    frames: int = 1

    def __iter__(self) -> Iterator[Document]:
        document = Document(self.tokens, (self.frames,) * self.media)
        return iter([document] * self.samples)


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


@dataclasses.dataclass(frozen=True)
class LanguageModelSizes:
    """What a language model's operations depend on.

    Attributes:
        dim, depth: its width, and how many layers it has.
        attention, feed_forward: multiply-adds of a layer's linear layers for a token: those around
            self-attention, and the others.
        inner: width of all heads' queries.
        head: multiply-adds of a token's logits.
        has_distances: whether scores are also of queries and distances, as `ChinchillaLM`'s.
    """

    dim: int
    depth: int
    attention: int
    feed_forward: int
    inner: int
    head: int
    has_distances: bool

    @classmethod
    def of_config(cls, config: LanguageModelConfig) -> "LanguageModelSizes":
        """Of a language model of our own.

        Raises:
            ConfigError: it isn't.
        """
        if config.kind != "chinchilla":
            raise ConfigError(
                f"lm.kind: expected chinchilla, whose work is known in closed form; got "
                f"{config.kind!r}"
            )
        inner = config.heads * config.dim_head
        return cls(
            dim=config.dim,
            depth=config.depth,
            attention=4 * config.dim * inner,
            feed_forward=_feed_forward(1, config.dim, config.ff_mult),
            inner=inner,
            head=config.dim * config.vocab_size,
            has_distances=True,
        )

    @classmethod
    def of_model(cls, lang_model: Any) -> "LanguageModelSizes":
        """Of any: of transformers' by the weights of their linear layers.

        Sliding windows are taken for full attention, and all experts of a mixture for used.
        """
        config = lang_model.config
        if isinstance(config, LanguageModelConfig):
            return cls.of_config(config)
        layers = find_layers(lang_model)
        # Conv1D is GPT-2's name of a linear layer.
        linear = {
            name: module.weight.numel()
            for name, module in layers.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        attention = sum(macs for name, macs in linear.items() if "att" in name)
        dim = hidden_size(lang_model)
        heads = config.num_attention_heads
        return cls(
            dim=dim,
            depth=len(layers),
            attention=attention // len(layers),
            feed_forward=(sum(linear.values()) - attention) // len(layers),
            inner=heads * (getattr(config, "head_dim", None) or dim // heads),
            head=dim * vocab_size_of(lang_model),
            has_distances=False,
        )


def pass_flops(
    config: FlamingoConfig,
    batch: Iterable[Document],
    *,
    lang_model: LanguageModelSizes | None = None,
    has_features: bool = False,
) -> Flops:
    """Of the forward and the backward of one batch.

    A frozen vision encoder has a forward alone. A frozen language model has no gradients of
    weights, but those of its inputs down to the first one that is learnt: all of it, where the
    embedding of `<EOC>` is.

    Arguments:
        batch: a `Batch`, or documents of any sizes.
        lang_model: by default config.lm's.
        has_features: whether the vision encoder's outputs are given, and it doesn't run.

    Raises:
        ConfigError: the language model isn't ours, and `lang_model` is not given.
    """
    lm = lang_model or LanguageModelSizes.of_config(config.lm)
    counts = collections.Counter(batch)
    vision = vision_work(config.vision)
    media = collections.Counter[int]()
    for document, count in counts.items():
        for frames in document.frames:
            media[frames] += count
    is_perceiver = config.resampler.kind == "perceiver"
    sizes = [
        _Sizes(
            count,
            document.tokens,
            sum(
                config.resampler.num_latents if is_perceiver else frames * vision.tokens
                for frames in document.frames
            ),
        )
        for document, count in counts.items()
    ]
    has_gradient = not config.vision.is_frozen
    return Flops(
        vision=0 if has_features else sum(n * frames for frames, n in media.items()) * vision.flops,
        resampler=sum(
            n * _resampler(config.resampler, frames * vision.tokens, vision.features, has_gradient)
            for frames, n in media.items()
        ),
        conditioning=_conditioning(config, lm, sizes),
        lm=_lm(config, lm, sizes),
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """So many documents of L tokens each, and of so many tokens of media."""

    documents: int
    tokens: int
    media_tokens: int

    @property
    def rows(self) -> int:
        return self.documents * self.tokens


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


def _conditioning(config: FlamingoConfig, lm: LanguageModelSizes, batch: Sequence[_Sizes]) -> int:
    """Of all blocks and, of grafting, of the layers between them."""
    conditioning = config.conditioning
    inner = conditioning.heads * conditioning.dim_head
    dim_media = conditioning.dim_media or config.resampler.dim
    block = 0
    for each in batch:
        macs = 2 * each.rows * lm.dim * inner
        macs += 2 * each.documents * each.media_tokens * dim_media * inner
        if conditioning.kind != "vanilla_xattn":
            macs += _feed_forward(each.rows, lm.dim, conditioning.ff_mult)
        attention = _attention(each.tokens, each.media_tokens, inner)
        block += _learnt(macs) + each.documents * attention
    if conditioning.kind == "grafting":
        stack = LanguageModelSizes.of_config(stack_config(config.lm, conditioning, lm.dim))
        layer = _self_attention(stack, batch, is_frozen=False, has_gradient=True)
        layer += _learnt(_rows(batch) * stack.feed_forward)
        return conditioning.num_layers * (layer + block)
    return len(conditioning.layers(lm.depth)) * block


def _lm(config: FlamingoConfig, lm: LanguageModelSizes, batch: Sequence[_Sizes]) -> int:
    rows, is_frozen = _rows(batch), config.lm.is_frozen
    first_attention, first_feed_forward = _first_with_gradients(config, lm.depth)
    feed_forward = rows * lm.feed_forward
    flops = 0
    for index in range(lm.depth):
        flops += _self_attention(lm, batch, is_frozen, index >= first_attention)
        if is_frozen:
            flops += _frozen(feed_forward, index >= first_feed_forward)
        else:
            flops += _learnt(feed_forward)
    head = rows * lm.head
    flops += _frozen(head, has_gradient=True) if is_frozen else _learnt(head)
    return flops + _learnt(rows * lm.dim * len(config.learnt_token_ids))


def _first_with_gradients(config: FlamingoConfig, depth: int) -> tuple[int, int]:
    """Of the language model's layers, the first whose self-attention and whose feed-forward do."""
    if config.learnt_token_ids or not config.lm.is_frozen:
        return 0, 0
    conditioning: ConditioningConfig = config.conditioning
    if conditioning.kind == "grafting":
        return depth, depth
    first = conditioning.layers(depth)[0]
    return first + (conditioning.kind == "vanilla_xattn"), first


def _self_attention(
    lm: LanguageModelSizes, batch: Sequence[_Sizes], is_frozen: bool, has_gradient: bool
) -> int:
    """With relative positions: the distances' projection once, their scores with all queries."""
    macs = _rows(batch) * lm.attention
    flops = _frozen(macs, has_gradient) if is_frozen else _learnt(macs)
    for each in batch:
        flops += each.documents * _attention(each.tokens, each.tokens, lm.inner, has_gradient)
    if not lm.has_distances:
        return flops
    projection = (max((each.tokens for each in batch), default=0) + 1) * lm.dim * lm.inner
    scores = sum(each.rows * (each.tokens + 1) for each in batch) * lm.inner
    if is_frozen:
        return flops + 2 * projection + _frozen(scores, has_gradient)
    return flops + 4 * projection + _learnt(scores)


def _rows(batch: Sequence[_Sizes]) -> int:
    return sum(each.rows for each in batch)
