"""Vision encoders: images as features, by timm or by any module that makes tokens.

n images, H and W their height and width in pixels, S features of an image.
"""

import contextlib
import difflib
import functools
import math
from typing import Any

import torch
from torch import nn

from flamingo_fast.models.config import ConfigError, VisionConfig
from flamingo_fast.models.extras import require

# OpenAI's CLIP has QuickGELU, which timm's plain vit_large_patch14_clip_224 lacks; and the first
# of that one's weights, which timm would load, are of a model fine-tuned on ImageNet.
_TIMM_NAMES = {
    "nfnet_f6": "dm_nfnet_f6",
    "nfnet_f0": "dm_nfnet_f0",
    "clip_vit_l14": "vit_large_patch14_clip_quickgelu_224.openai",
}
# Small variants, and the model whose images' preprocessing they share.
_MINI_NAMES = {"nfnet_mini": "nfnet_f0", "vit_mini": "clip_vit_l14"}
# Arguments of timm.data.create_transform.
_PADDED: dict[str, Any] = {"crop_mode": "border", "crop_pct": 1.0}


class VisionEncoder(nn.Module):
    """Features of images (Flamingo, section 2.1 and appendix A.1.1), one by one.

    An NFNet gives the features of its last 1x1 convolution after its activation, for every 32x32
    pixels, row by row; a vision transformer all its tokens, the class token first, after the last
    norm. OpenFlamingo's encoder is another view of CLIP's transformer: OpenCLIP's tokens, which
    have no class token and, before its version 2.23, no last norm (since then only with
    `visual.final_ln_after_pool = True`). For its checkpoints wrap OpenCLIP's `visual` by
    `from_module`.

    Images may be of any size: position embeddings are interpolated, and images whose sides are
    not multiples of a patch are padded with 0, the mean colour. `load_state_dict` takes position
    embeddings of another image size, and interpolates them to this encoder's.

    Frozen, it is in eval mode whatever `train` says, and its outputs have no graph.

    Arguments:
        config: of the encoder.
        device: of the weights; on "meta" none are loaded, even if `config.is_pretrained`.
        dtype: of the weights.

    Raises:
        ConfigError: vision.encoder is no name that timm knows, or has no weights to load;
            vision.image_size is less than a patch of vit_mini.
        ImportError: timm is not installed.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        model = _build(config, device)
        self._wrap(model.to(dtype=dtype), model.num_features, config.is_frozen)

    @classmethod
    def from_module(
        cls, module: nn.Module, features: int, *, is_frozen: bool = True
    ) -> "VisionEncoder":
        """Of any module that makes tokens of images.

        Arguments:
            module: maps (n, 3, H, W) to (n, S, features), or to (pooled, (n, S, features)) as
                OpenCLIP's `visual` does where its `output_tokens` is true.
            features: width of the tokens.
            is_frozen: whether the module gets no gradients.
        """
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._wrap(module, features, is_frozen)
        return encoder

    def _wrap(self, model: nn.Module, features: int, is_frozen: bool) -> None:
        self.model = model
        self.features = features
        self.freeze(is_frozen)
        self.register_load_state_dict_pre_hook(_resample_positions)

    def freeze(self, is_frozen: bool = True) -> None:
        """Stops or, for fine-tuning (the paper's table 2), starts gradients to the weights."""
        self.is_frozen = is_frozen
        self.model.requires_grad_(not is_frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """As a module's `train`, but a frozen model stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.model.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations are recomputed in the backward, for unfrozen encoders.

        Raises:
            ValueError: the module is not timm's and has no `set_grad_checkpointing`.
        """
        set_grad_checkpointing = getattr(self.model, "set_grad_checkpointing", None)
        if set_grad_checkpointing is None:
            raise ValueError(
                f"model: expected a module with set_grad_checkpointing, got "
                f"{type(self.model).__name__}"
            )
        set_grad_checkpointing(enable)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Arguments:
            images: (n, 3, H, W) floating point, normalised as the encoder wants
                (`FlamingoProcessor`), cast to the weights' dtype. n may be 0, at one image's cost.

        Returns:
            (n, S, features) in the weights' dtype, or what autocast makes of it.

        Raises:
            ValueError: images of another shape or dtype, or a wrapped module whose output has
                another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape (n, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images: expected normalised ones of a floating point dtype, got {images.dtype}"
            )
        # Scalars, which FSDP leaves whole, may be wider.
        weights = (
            each for each in self.model.parameters() if each.is_floating_point() and each.dim()
        )
        dtype = next((each.dtype for each in weights), images.dtype)
        # Of none timm's transformers can't say how many tokens an image has.
        some = images if len(images) else images.new_zeros(1, *images.shape[1:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self._tokens(self.model(some.to(dtype)))[: len(images)]

    def _tokens(self, output: Any) -> torch.Tensor:
        tokens = output[-1] if isinstance(output, tuple | list) else output
        if tokens.dim() == 4:
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            tokens = tokens.flatten(1, 2) if is_last else tokens.flatten(2).mT
        if tokens.dim() != 3 or tokens.shape[-1] != self.features:
            raise ValueError(
                f"{type(self.model).__name__}: expected an output of shape "
                f"(n, S, {self.features}), got {tuple(tokens.shape)}"
            )
        return tokens

    def extra_repr(self) -> str:
        return f"features={self.features}, is_frozen={self.is_frozen}"


def data_config(config: VisionConfig) -> dict[str, Any]:
    """How images become the encoder's input, as arguments of `timm.data.create_transform`.

    That of the encoder's weights in timm, for images of `config.image_size`; with
    `config.pad_images` all of an image is there, and padding around it.

    Raises:
        ConfigError: vision.encoder is no name that timm knows.
    """
    timm = require("timm")
    name = _timm_name(_MINI_NAMES.get(config.encoder, config.encoder))
    weights = timm.models.get_pretrained_cfg(name).to_dict()
    found = timm.data.resolve_data_config({"img_size": config.image_size}, pretrained_cfg=weights)
    return found | (_PADDED if config.pad_images else {})


def _timm_name(encoder: str) -> str:
    timm = require("timm")
    name = _TIMM_NAMES.get(encoder, encoder)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        ours = [*_TIMM_NAMES, *_MINI_NAMES]
        close = difflib.get_close_matches(encoder, [*ours, *timm.list_models()])
        raise ConfigError(
            f"vision.encoder: expected one of {', '.join(ours)}, or a model of timm; got "
            f"{encoder!r}" + (f". Close to it: {', '.join(close)}" if close else "")
        )
    tags = [each.partition(".")[2] for each in timm.list_models(architecture, pretrained=True)]
    if tag and tag not in tags:
        raise ConfigError(
            f"vision.encoder: expected weights of {architecture} that timm knows "
            f"({', '.join(tags) or 'none'}), got {encoder!r}"
        )
    return name


def _build(config: VisionConfig, device: torch.device) -> Any:
    name, size = config.encoder, config.image_size
    timm = require("timm")
    # The context, since not all of timm's models take a device.
    with device if device != torch.get_default_device() else contextlib.nullcontext():
        if name in _MINI_NAMES:
            if config.is_pretrained:
                raise ConfigError(f"vision.is_pretrained: there are no weights of {name}")
            return _nfnet_mini() if name == "nfnet_mini" else _vit_mini(size)
        name = _timm_name(name)
        create = functools.partial(
            timm.create_model,
            name,
            pretrained=config.is_pretrained and device.type != "meta",
            num_classes=0,
        )
        if timm.models.get_pretrained_cfg(name).fixed_input_size:
            try:
                model = create(img_size=size, dynamic_img_size=True, dynamic_img_pad=True)
            except TypeError:
                # Windowed transformers are of one size alone.
                model = create(img_size=size)
        else:
            model = create()
        # After the weights are loaded: those of models that pool by attention have its weights.
        model.reset_classifier(0, "")
        return model


def _nfnet_mini() -> nn.Module:
    """NFNet-F0 with an eighth of its width, and fewer layers."""
    nfnet = require("timm.models.nfnet")
    config = nfnet.NfCfg(
        depths=(1, 1, 2, 1),
        channels=(32, 64, 192, 192),
        stem_type="deep_quad",
        stem_chs=16,
        group_size=16,
        extra_conv=True,
        gamma_in_act=True,
        same_padding=True,
        skipinit=True,
        num_features=384,
        act_layer="gelu",
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
    return nfnet.NormFreeNet(config, num_classes=0, global_pool="")


def _vit_mini(image_size: int) -> nn.Module:
    """CLIP's vision transformer with a sixteenth of its width, and three layers."""
    patch = 14
    if image_size < patch:
        raise ConfigError(
            f"vision.image_size: expected at least {patch}, a patch of vit_mini, got {image_size}"
        )
    return require("timm.models.vision_transformer").VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=64,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="",
        pre_norm=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu",
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )


def _resample_positions(
    encoder: VisionEncoder, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Position embeddings of another image size, for square ones, to the encoder's size."""
    model: Any = encoder.model
    key = f"{prefix}model.pos_embed"
    old, new = state_dict.get(key), getattr(model, "pos_embed", None)
    if old is None or new is None or old.shape == new.shape or old.dim() != 3:
        return
    if not hasattr(model, "num_prefix_tokens"):
        # Not timm's: nothing says which of them are of places.
        return
    num_prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    if math.isqrt(old.shape[1] - num_prefix) ** 2 != old.shape[1] - num_prefix:
        return
    state_dict[key] = require("timm.layers").resample_abs_pos_embed(
        old, new_size=model.patch_embed.grid_size, num_prefix_tokens=num_prefix
    )
