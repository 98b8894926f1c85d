"""flamingo-pytorch: OpenFlamingo's classes without cached media, as they were before it.

Of flamingo_pytorch/flamingo_pytorch.py, and of what vendors or subclasses its classes. The rule of
its Perceiver attention is OpenFlamingo's.

B batch, L text tokens, N media of a sample, S features of a medium, R tokens of a medium.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.patching import open_flamingo
from flamingo_fast.patching.attention import leaves_one_medium, random_like, refuses_block
from flamingo_fast.patching.rules import Call, Rule, has, takes
from flamingo_fast.patching.state import own_forward, tell_once
from flamingo_fast.ranges import within


def _is_of_it(module: nn.Module) -> bool:
    """By its forward's arguments: those of OpenFlamingo and Otter have one more."""
    return takes(module, "x", "media", "media_locations") and not (
        takes(module, "use_cached_media") or takes(module, "attend_previous")
    )


def attention(
    self: nn.Module,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, L, dim) of text x (B, L, dim), media (B, N, R, dim) and their places (B, L).

    Without media_locations all attend to all media.
    """
    if leaves_one_medium(self, x, media.shape[1]):
        return own_forward(self)(x, media, media_locations)
    layout = open_flamingo.layout_of_call(self, self, x, media, media_locations)
    if layout is None:
        tell_once(self, open_flamingo.BROADCASTS)
        return own_forward(self)(x, media, media_locations)
    return open_flamingo.attend_to_media(self, x, media, layout)


def block(
    self: Any,
    x: torch.Tensor,
    media: torch.Tensor,
    media_locations: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result of `attention`."""
    attended = within("attention", self.attn, x, media, media_locations=media_locations)
    return open_flamingo.finish(self, x, attended, media, media_locations)


def resampler(self: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, N, R, dim) of features x (B, N, S, dim), or (B, S, dim) of one medium."""
    if x.dim() == 3:
        x = x[:, None]
    if x.dim() != 4:
        return own_forward(self)(x)
    return open_flamingo.resample(self, x + self.media_pos_emb[: x.shape[1]])


def _attention_probes(module: Any) -> Iterator[Call]:
    return open_flamingo.attention_probes(module, takes_cached=False)


def _block_probes(module: Any) -> Iterator[Call]:
    return open_flamingo.block_probes(module, takes_cached=False)


def _resampler_probes(module: Any) -> Iterator[Call]:
    latents = module.latents
    for shape in ((2, 2, 5), (2, 5)):
        yield (random_like(latents, *shape, latents.shape[1]),), {}


_VERSION = "flamingo-pytorch 0.1.2"

RULES: tuple[Rule, ...] = (
    Rule(
        name="flamingo_pytorch.attention",
        features=("cross_attention",),
        matches=lambda module: open_flamingo.is_attention(module) and _is_of_it(module),
        forward=attention,
        known={"f86c2f3aa736eca3": _VERSION},
        notes=open_flamingo.attention_notes,
        probes=_attention_probes,
    ),
    Rule(
        name="flamingo_pytorch.block",
        features=("cross_attention", "gated_residual", "norm"),
        matches=lambda module: open_flamingo.is_block(module) and _is_of_it(module),
        forward=block,
        known={"9a7106a9a0e24626": _VERSION},
        refuses=refuses_block,
        probes=_block_probes,
    ),
    Rule(
        name="flamingo_pytorch.resampler",
        features=("resampler",),
        matches=lambda module: (
            open_flamingo.is_resampler(module) and has(module, tensors=("media_pos_emb",))
        ),
        forward=resampler,
        known={"115f973b94ba00b8": _VERSION},
        code=open_flamingo.code_of_resampler,
        refuses=open_flamingo.refuses_resampler,
        probes=_resampler_probes,
    ),
)
