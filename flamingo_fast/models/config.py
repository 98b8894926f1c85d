"""FlamingoConfig: all that a Flamingo model is made of; each thing table 3 ablates is a field.

"Table", "section" and "appendix" are Flamingo's (arXiv 2204.14198).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flamingo_fast.layout import ATTEND
from flamingo_fast.models.fields import (
    ConfigError,
    at_least,
    check_fields,
    from_dict,
    hidden_width,
    one_of,
    positive,
)
from flamingo_fast.ops.feed_forward import ACTIVATIONS
from flamingo_fast.ops.masked_cross_attention import PAST_LAST, UNATTENDED
from flamingo_fast.ops.norm import NORMS

RESAMPLERS = ("perceiver", "mlp", "transformer")
CONDITIONINGS = ("gated_xattn_dense", "vanilla_xattn", "grafting")
LANGUAGE_MODELS = ("chinchilla", "huggingface")
OPTIMISATIONS = ("accumulation", "round_robin")
SINGLE_IN_MIDDLE = "single_in_middle"
DATASETS = ("m3w", "align", "ltip", "vtp", "laion")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What turns images into features.

    Attributes:
        encoder: "nfnet_f6" (the paper's), "nfnet_f0", "clip_vit_l14", their small variants
            "nfnet_mini" and "vit_mini", or any of timm's models, by its name there.
        image_size: height and width of images, in pixels. The paper's are 320.
        is_frozen: whether it gets no gradients and stays in eval mode (table 3's baseline).
        is_pretrained: whether timm's weights are loaded, which needs a network or a cache.
        pad_images: whether images keep their aspect, and are padded to a square with the mean
            colour (appendix B.1.2); if not, they are cropped or squashed as the encoder's weights
            in timm want it.
    """

    encoder: str = "nfnet_f6"
    image_size: int = 320
    is_frozen: bool = True
    is_pretrained: bool = False
    pad_images: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "vision")
        at_least("vision", self, 1, "image_size")


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """What turns the features of a medium into the tokens that text attends to.

    Attributes:
        kind: "perceiver", or row vi of table 3: "mlp" or "transformer", which keep all features.
        dim, depth, heads, dim_head, ff_mult, activation, bias, norm: see `PerceiverResampler`.
        num_latents: tokens of a medium; of "perceiver" alone.
        max_num_frames: learnt embeddings of so many frames; more are interpolated (appendix B.1.2).
        max_num_media: learnt embeddings of media's places; None: none (the paper, OpenFlamingo).
        project_features: whether a linear layer comes first even if features are `dim` wide; where
            they are not, there always is one.
    """

    kind: str = "perceiver"
    dim: int = 1536
    depth: int = 6
    heads: int = 16
    dim_head: int = 128
    num_latents: int = 64
    ff_mult: float = 4.0
    activation: str = "squared_relu"
    bias: bool = True
    norm: str = "layer"
    max_num_frames: int | None = 8
    max_num_media: int | None = None
    project_features: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "resampler")
        one_of("resampler.kind", self.kind, RESAMPLERS)
        at_least("resampler", self, 1, "dim", "heads", "dim_head", "num_latents")
        at_least("resampler", self, 0, "depth")
        at_least("resampler", self, 1, "max_num_frames", "max_num_media")
        hidden_width("resampler.ff_mult", self.ff_mult, self.dim)
        one_of("resampler.activation", self.activation, ACTIVATIONS)
        one_of("resampler.norm", self.norm, NORMS)


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """How the language model sees the media.

    Attributes:
        kind: "gated_xattn_dense": a gated block before a layer (section 2.2). "vanilla_xattn":
            cross-attention between a layer's self-attention and its feed-forward. "grafting": a
            stack of layers of self-attention and gated blocks on the whole language model (both of
            row iv of table 3, and section 4.4.2 of v1).
        every: a block for every so many layers (row v), or "single_in_middle". Not of grafting.
        first: the first layer that has one: 0 in the paper (appendix B.1.1), `every` - 1 in
            OpenFlamingo. Not of grafting, nor of "single_in_middle".
        num_layers: of the stack; of grafting alone. The paper doesn't say: 12 fit its count.
        tanh_gating: row iii. Without it there are no gates.
        heads, dim_head, ff_mult, activation, bias, norm, media_norm: see
            `GatedCrossAttentionBlock`.
        attend: "previous", "next" or "all_previous" (table 10) media, see `MediaLayout`.
        unattended, past_last: see `GatedCrossAttentionBlock`; None: its defaults.
        dim_media: the width that keys and values are projected from. None: the resampler's. Where
            it is more, the resampler's columns are repeated to fill it: the paper's counts want the
            language model's width there, and it doesn't say how tokens of 1536 get so wide.
    """

    kind: str = "gated_xattn_dense"
    every: int | str = 1
    first: int = 0
    num_layers: int = 12
    tanh_gating: bool = True
    heads: int = 16
    dim_head: int = 128
    ff_mult: float = 4.0
    activation: str = "squared_relu"
    bias: bool = True
    norm: str = "layer"
    media_norm: bool = True
    attend: str = "previous"
    unattended: str | None = None
    past_last: str | None = None
    dim_media: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "conditioning")
        one_of("conditioning.kind", self.kind, CONDITIONINGS)
        if isinstance(self.every, str):
            one_of("conditioning.every", self.every, (SINGLE_IN_MIDDLE,))
        else:
            at_least("conditioning", self, 1, "every")
        at_least("conditioning", self, 0, "first")
        at_least("conditioning", self, 1, "num_layers", "heads", "dim_head", "dim_media")
        positive("conditioning.ff_mult", self.ff_mult)
        one_of("conditioning.activation", self.activation, ACTIVATIONS)
        one_of("conditioning.norm", self.norm, NORMS)
        one_of("conditioning.attend", self.attend, ATTEND)
        if self.unattended is not None:
            one_of("conditioning.unattended", self.unattended, (*UNATTENDED, "zero_block"))
        if self.past_last is not None:
            known = ("zero",) if self.unattended == "zero_block" else PAST_LAST
            one_of("conditioning.past_last", self.past_last, known)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Which of a language model's `depth` layers have a block; of grafting none.

        Raises:
            ConfigError: none of them would.
        """
        if self.kind == "grafting":
            return ()
        if isinstance(self.every, str):
            return (depth // 2,)
        if self.first >= depth:
            raise ConfigError(
                f"conditioning.first: expected one of the language model's {depth} layers, "
                f"got {self.first}"
            )
        return tuple(range(self.first, depth, self.every))


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The language model.

    Attributes:
        kind: "chinchilla": a decoder of our own, of the sizes below (arXiv 2203.15556, table A9).
            "huggingface": a causal language model of transformers.
        vocab_size, dim, depth, heads, dim_head, ff_mult: of "chinchilla" alone.
        name: of "huggingface": a folder, or a name that transformers finds.
        hf_config: of "huggingface": the model's own config as a dict, to make it without weights.
        is_frozen: whether it gets no gradients (row viii).
        is_pretrained: whether its weights are to come from elsewhere (row viii); for the record,
            and for "huggingface" whether those of `name` are loaded.
    """

    kind: str = "chinchilla"
    vocab_size: int = 32_000
    dim: int = 2048
    depth: int = 24
    heads: int = 16
    dim_head: int = 128
    ff_mult: float = 4.0
    name: str | None = None
    hf_config: dict[str, Any] | None = None
    is_frozen: bool = True
    is_pretrained: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "lm")
        one_of("lm.kind", self.kind, LANGUAGE_MODELS)
        at_least("lm", self, 1, "vocab_size", "dim", "depth", "heads", "dim_head")
        hidden_width("lm.ff_mult", self.ff_mult, self.dim)


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """A Flamingo model, and on what it is trained.

    Attributes:
        vision, resampler, conditioning, lm: its parts.
        image_token_id, eoc_token_id: of `<image>` and `<EOC>`, the end of a chunk. Ids from the
            language model's vocabulary, or the next ones after it. eoc_token_id may be None.
        learnt_token_ids: tokens whose embedding is learnt, while that of all others stays frozen
            (section 2.4: `<EOC>`); those after the vocabulary must be among them.
        datasets: names of what it is trained on (row i).
        optimisation: "accumulation": a gradient of all datasets each step; "round_robin" (row ii).
        p_next: probability that a web page's text attends to the next image, not the previous one
            (appendix A.3.2).

    Raises:
        ConfigError: a field, by name.
    """

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    resampler: ResamplerConfig = dataclasses.field(default_factory=ResamplerConfig)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    lm: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    image_token_id: int = 3
    eoc_token_id: int | None = 4
    learnt_token_ids: tuple[int, ...] = ()
    datasets: tuple[str, ...] = ("m3w", "align", "ltip", "vtp")
    optimisation: str = "accumulation"
    p_next: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "")
        one_of("optimisation", self.optimisation, OPTIMISATIONS)
        at_least("", self, 0, "image_token_id")
        at_least("", self, 0, "eoc_token_id")
        if self.eoc_token_id == self.image_token_id:
            raise ConfigError(
                f"eoc_token_id: expected another token than image_token_id, got {self.eoc_token_id}"
            )
        if not 0 <= self.p_next <= 1:
            raise ConfigError(f"p_next: expected a probability, got {self.p_next!r}")
        for name in self.datasets:
            one_of("datasets", name, DATASETS)
        if len(set(self.learnt_token_ids)) != len(self.learnt_token_ids):
            raise ConfigError(
                f"learnt_token_ids: expected different ids, got {self.learnt_token_ids}"
            )
        if any(token_id < 0 for token_id in self.learnt_token_ids):
            raise ConfigError(f"learnt_token_ids: expected at least 0, got {self.learnt_token_ids}")
        if len(set(self.datasets)) != len(self.datasets):
            raise ConfigError(f"datasets: expected different ones, got {self.datasets}")
        dim_media = self.conditioning.dim_media
        if dim_media is not None and dim_media < self.resampler.dim:
            raise ConfigError(
                f"conditioning.dim_media: expected at least resampler.dim = {self.resampler.dim}, "
                f"got {dim_media}"
            )
        if self.lm.kind == "chinchilla":
            self.conditioning.layers(self.lm.depth)

    @classmethod
    def preset(cls, name: str) -> "FlamingoConfig":
        """One of `presets.PRESETS`, such as "flamingo-3b".

        Raises:
            ConfigError: there is none of this name; says which there are.
        """
        from flamingo_fast.models.presets import PRESETS

        one_of("preset", name, tuple(PRESETS))
        return PRESETS[name]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "FlamingoConfig":
        """Of what `to_json` returned; fields that are not there have their defaults.

        Raises:
            ConfigError: not JSON, a field that no config has, or a wrong value, by its name.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config: expected JSON ({error})") from None
        return from_dict(cls, values, "")

    @classmethod
    def from_file(cls, path: str | Path) -> "FlamingoConfig":
        """`from_json` of a file's text."""
        return cls.from_json(Path(path).read_text())
