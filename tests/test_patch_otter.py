"""Otter's blocks and resampler, patched: doubles with its names, arguments and meaning."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patch_cases import (
    check_bf16_without_gradients,
    check_parity,
    check_saved_and_copied,
    loss_of,
    open_gates,
)
from torch import nn

import flamingo_fast
from flamingo_fast.patching import PatchWarning, state
from flamingo_fast.patching.state import is_patched

TEXT, VISUAL, HEADS = 24, 20, 3

# Otter's name for whether xformers attends in place of its own code, which has a mask.
XFORMERS_AVAIL = False

# Late and several images, side by side, none; more image tokens than the 3 images.
LOCATIONS = (
    ((0, 0, 1, 0, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0, 1, 0), (0,) * 8),
    ((1, 0, 1, 0, 1, 0, 1, 1), (0, 1, 1, 1, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0)),
)


def feed_forward(width: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        ]
    )


class Attention(nn.Module):
    """Of text to the image before or after it, or to all images up to that."""

    uses_mask = True

    def __init__(self, only_attend_immediate_media: bool = True) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, 8**-0.5
        self.norm = nn.LayerNorm(TEXT)
        self.to_q = nn.Linear(TEXT, HEADS * 8, bias=False)
        self.to_kv = nn.Linear(VISUAL, 2 * HEADS * 8, bias=False)
        self.to_out = nn.Linear(HEADS * 8, TEXT, bias=False)
        self.only_attend_immediate_media = only_attend_immediate_media

    def time(self, media_locations: torch.Tensor, attend_previous: bool) -> torch.Tensor:
        time = media_locations.cumsum(1)
        if not attend_previous:
            time = time + ~media_locations
            time = time.where(time <= media_locations.sum(1, keepdim=True), 0)
        return time[..., None]

    def forward(self, x, media, media_locations=None, attend_previous=True):
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (
                self.to_q(self.norm(x)) * self.scale,
                *self.to_kv(media.flatten(1, 2)).chunk(2, -1),
            )
        )
        scores = q @ k.mT
        if media_locations is not None and self.uses_mask:
            time = self.time(media_locations, attend_previous)
            media_time = torch.arange(k.shape[2]) // media.shape[2] + 1
            one = self.only_attend_immediate_media
            seen = time == media_time if one else time >= media_time
            scores = scores.masked_fill(~seen[:, None], -torch.finfo(scores.dtype).max)
        weights = scores.softmax(-1)
        if media_locations is not None and self.uses_mask and self.only_attend_immediate_media:
            weights = weights.masked_fill((time == 0)[:, None], 0)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class WithoutMask(Attention):
    """As with xformers."""

    uses_mask = False


class SeesAllBefore(Attention):
    def forward(self, x, media, media_locations=None, attend_previous=True):
        try:
            self.only_attend_immediate_media = False
            return super().forward(x, media, media_locations, attend_previous)
        finally:
            self.only_attend_immediate_media = True


class NextOfMedia(Attention):
    """After the last image token, the next image if there is one."""

    def time(self, media_locations: torch.Tensor, attend_previous: bool) -> torch.Tensor:
        time = media_locations.cumsum(1)
        return (time if attend_previous else time + ~media_locations)[..., None]


class NothingPastLast(Attention):
    """Where more image tokens came than there are images."""

    def forward(self, x, media, media_locations=None, attend_previous=True):
        out = super().forward(x, media, media_locations, attend_previous)
        if media_locations is None:
            return out
        return out.masked_fill(self.time(media_locations, attend_previous) > media.shape[1], 0)


class Block(nn.Module):
    def __init__(self, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = attn or Attention()
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = feed_forward(TEXT)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, media_locations=None, attend_previous=True):
        attended = self.attn(x, media, media_locations, attend_previous)
        residual = x = attended * self.attn_gate.tanh() + x
        for layer in self.feed_forward:
            x = layer(x)
        return x * self.ff_gate.tanh() + residual


class PerceiverBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, 8**-0.5
        self.norm_media, self.norm_latents = nn.LayerNorm(VISUAL), nn.LayerNorm(VISUAL)
        self.to_q = nn.Linear(VISUAL, HEADS * 8, bias=False)
        self.to_kv = nn.Linear(VISUAL, 2 * HEADS * 8, bias=False)
        self.to_out = nn.Linear(HEADS * 8, VISUAL, bias=False)
        self.feed_forward = feed_forward(VISUAL)

    def forward(self, x, latents):
        normed = self.norm_latents(latents)
        both = torch.cat((self.norm_media(x), normed), 2)
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for each in (self.to_q(normed), *self.to_kv(both).chunk(2, -1))
        )
        weights = (q * self.scale @ k.mT).softmax(-1)
        out = self.to_out((weights @ v).transpose(2, 3).flatten(3)) + latents
        y = out
        for layer in self.feed_forward:
            y = layer(y)
        return y + out


class Resampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, VISUAL))
        self.frame_embs = nn.Parameter(torch.randn(3, VISUAL))
        self.layers = nn.ModuleList(PerceiverBlock() for _ in range(2))
        self.norm = nn.LayerNorm(VISUAL)

    def forward(self, x):
        x = (x + self.frame_embs[: x.shape[2], None]).flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for block in self.layers:
            latents = block(x, latents)
        return self.norm(latents)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(state, "_told", set())


def inputs(model: nn.Module, locations: Any) -> Any:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    x, media = (
        torch.randn(shape, generator=generator).to(parameter)
        for shape in ((3, 8, TEXT), (3, 3, 5, VISUAL))
    )
    locations = None if locations is None else torch.tensor(locations, dtype=torch.bool)
    return x, media.requires_grad_(), locations


def call_block(
    locations: Any, attend_previous: bool
) -> Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]:
    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(*inputs(model, locations), attend_previous=attend_previous)
        return out, loss_of(out)

    return call


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all"])
@pytest.mark.parametrize(
    ("locations", "attend_previous"),
    [(LOCATIONS[0], True), (LOCATIONS[1], True), (LOCATIONS[0], False), (LOCATIONS[1], False)]
    + [(None, True)],
    ids=["usual", "more", "next", "next of more", "without"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_block(immediate: bool, locations: Any, attend_previous: bool, dtype: torch.dtype) -> None:
    model = open_gates(Block(Attention(immediate)))
    report = check_parity(model, call_block(locations, attend_previous), dtype, unknown="probe")
    assert len(report.patched) == 2
    assert ("attends to all media" in str(report)) == (not immediate)


@pytest.mark.parametrize(
    ("option", "left"),
    [("norm", []), ("gated_residual", [""]), ("cross_attention", ["attn"]), ("media_kv_cache", [])],
)
def test_features(option: str, left: list[str]) -> None:
    call = call_block(LOCATIONS[0], True)
    report = check_parity(open_gates(Block()), call, unknown="probe", **{option: False})
    assert [entry.name for entry in report.left] == left


def test_gradients_of_media() -> None:
    model = open_gates(Block())
    gradients = []
    for _ in range(2):
        x, media, locations = inputs(model, LOCATIONS[1])
        loss_of(model(x, media, locations)).backward()
        gradients.append(media.grad)
        flamingo_fast.patch(model, unknown="probe")
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("frames", [1, 3])
def test_resampler(frames: int) -> None:
    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(frames)
        x = torch.randn(2, 3, frames, 7, VISUAL, generator=generator).to(model.latents)
        out = model(x)
        return out, loss_of(out)

    model = Resampler()
    assert len(check_parity(model, call, unknown="probe").patched) == 2
    check_parity(model, call, torch.bfloat16, unknown="probe")
    check_bf16_without_gradients(model, lambda model: call(model)[0], unknown="probe")
    assert not flamingo_fast.patch(model, resampler=False, unknown="probe").patched


def test_decoding_projects_media_once() -> None:
    """And sees none of them, as Otter: no image token is among the new ids."""
    model = open_gates(Block()).eval()
    x, media, locations = inputs(model, LOCATIONS[0])
    media = media.detach()
    before = [model(x, media, locations), model(x[:, :1], media, locations[:, :1])]
    flamingo_fast.patch(model, unknown="probe")
    calls = []
    linear = nn.functional.linear
    with torch.no_grad():
        for tokens in (8, 1, 1):
            with pytest.MonkeyPatch.context() as context:
                context.setattr(
                    nn.functional, "linear", lambda *args: calls.append(args[1]) or linear(*args)
                )
                after = model(x[:, :tokens], media, locations[:, :tokens])
            torch.testing.assert_close(after, before[tokens == 1])
        assert sum(weight is model.attn.to_kv.weight for weight in calls) == 1
        # Media that changed in place are others.
        media.mul_(2)
        after = model(x, media, locations)
        flamingo_fast.unpatch(model)
        torch.testing.assert_close(after, model(x, media, locations))


def test_media_are_not_kept_alive() -> None:
    model = open_gates(Block())
    flamingo_fast.patch(model, unknown="probe")
    x, media, locations = inputs(model, LOCATIONS[0])
    with torch.no_grad():
        model(x, media, locations)
    alive = weakref.ref(media)
    del media
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("attend_previous", [True, False])
@pytest.mark.parametrize("unattended", ["zero", "zero_block"])
def test_tokens_that_attend_to_nothing(unattended: str, attend_previous: bool) -> None:
    model = open_gates(Block())
    x, media, locations = inputs(model, LOCATIONS[1])
    theirs = model(x, media, locations, attend_previous)
    flamingo_fast.patch(model, unattended=unattended, unknown="probe")
    ours = model(x, media, locations, attend_previous)
    time = model.attn.time(locations, attend_previous)[..., 0]
    nothing = (time > 3) | (time == 0)
    torch.testing.assert_close(ours[~nothing], theirs[~nothing])
    expected = x
    if unattended == "zero":
        expected = x + model.ff_gate.tanh() * nn.Sequential(*model.feed_forward)(x)
    torch.testing.assert_close(ours[nothing], expected[nothing])
    assert torch.equal(ours[nothing], x[nothing]) == (unattended == "zero_block")


@pytest.mark.parametrize("attn", [WithoutMask, SeesAllBefore, NextOfMedia, NothingPastLast])
def test_other_masks_are_left_alone(attn: type) -> None:
    model = open_gates(Block(attn()))
    report = flamingo_fast.patch(model, unknown="probe")
    assert [entry.name for entry in report.left] == ["attn"]
    assert "probed: results differ by" in report.left[0].reason
    # Without the probe all are: they are doubles, and none of the peer's code.
    assert not flamingo_fast.patch(model).patched
    report = flamingo_fast.patch(model, unattended="zero_block", unknown="probe")
    assert not report.patched and "its attention is left" in report.left[0].reason


def test_xformers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "XFORMERS_AVAIL", True)
    model = Block()
    report = flamingo_fast.patch(model, unknown="probe")
    assert is_patched(model) and not is_patched(model.attn)
    assert "xformers, without its mask" in report.left[0].reason


def test_broadcast_media_take_its_own_forward() -> None:
    model = open_gates(Block())
    x, media, locations = inputs(model, LOCATIONS[0])
    before = model(x, media[:1], locations)
    flamingo_fast.patch(model, unknown="probe")
    with pytest.warns(PatchWarning, match="unusual shape"):
        assert torch.equal(model(x, media[:1], locations), before)


def test_saved_and_copied() -> None:
    check_saved_and_copied(open_gates(Block()), call_block(LOCATIONS[0], True), unknown="probe")
