"""flamingo-mini's blocks and resampler, patched: doubles with its names, arguments and meaning."""

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

TEXT, VISUAL, LATENTS, HEADS = 24, 20, 5, 3

# Late and several images, side by side, none; more image tokens than the 3 images.
LOCATIONS = (
    ((0, 0, 1, 0, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0, 1, 0), (0,) * 8),
    ((1, 0, 1, 0, 1, 0, 1, 1), (0, 1, 1, 1, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0)),
)


class SquaredReLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() ** 2


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "sqrelu": SquaredReLU,
    "relu": nn.ReLU,
}


def feed_forward(width: int, act: str = "gelu") -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        ACTIVATIONS[act](),
        nn.Linear(4 * width, width, bias=False),
    )


class Attention(nn.Module):
    """Of text to the last image before it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale, self.n_visual = HEADS, 8**-0.5, LATENTS
        self.norm = nn.LayerNorm(TEXT)
        self.to_q = nn.Linear(TEXT, HEADS * 8, bias=False)
        self.to_kv = nn.Linear(VISUAL, 2 * HEADS * 8, bias=False)
        self.to_out = nn.Linear(HEADS * 8, TEXT, bias=False)

    def sees(self, text_time: torch.Tensor, media_time: torch.Tensor) -> torch.Tensor:
        return text_time == media_time

    def split(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, y, media_locations, visual_features, previous_kv=None, output_kv=False):
        kv = previous_kv
        if kv is None:
            kv = tuple(map(self.split, self.to_kv(visual_features.flatten(1, 2)).chunk(2, -1)))
        k, v = kv
        text_time = media_locations.cumsum(1)[:, -y.shape[1] :, None]
        media_time = torch.arange(k.shape[2]) // self.n_visual + 1
        scores = self.split(self.to_q(self.norm(y))) * self.scale @ k.mT
        hidden = ~self.sees(text_time, media_time)[:, None]
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        weights = scores.softmax(-1).masked_fill((text_time == 0)[:, None], 0)
        out = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out, kv if output_kv else None


class SeesAllBefore(Attention):
    def sees(self, text_time: torch.Tensor, media_time: torch.Tensor) -> torch.Tensor:
        return text_time >= media_time


class SeesAll(Attention):
    def sees(self, text_time: torch.Tensor, media_time: torch.Tensor) -> torch.Tensor:
        return (text_time >= 0).expand(-1, -1, len(media_time))


class NothingPastLast(Attention):
    """Where more image tokens came than there are images."""

    def forward(self, y, media_locations, visual_features, previous_kv=None, output_kv=False):
        out, kv = super().forward(y, media_locations, visual_features, previous_kv, True)
        text_time = media_locations.cumsum(1)[:, -y.shape[1] :, None]
        out = out.masked_fill(text_time > kv[0].shape[2] // self.n_visual, 0)
        return out, kv if output_kv else None


class DecodesDouble(Attention):
    """One token at a time, with keys and values from before."""

    def forward(self, y, media_locations, visual_features, previous_kv=None, output_kv=False):
        out, kv = super().forward(y, media_locations, visual_features, previous_kv, output_kv)
        return out if previous_kv is None or y.shape[1] > 1 else 2 * out, kv


class Block(nn.Module):
    def __init__(self, act: str = "gelu", attn: type = Attention) -> None:
        super().__init__()
        self.attn = attn()
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.ffw = feed_forward(TEXT, act)
        self.alpha_ffw = nn.Parameter(torch.zeros(1))

    def forward(self, y, visual_features, media_locations, previous_kv=None, output_kv=False):
        attended, kv = self.attn(y, media_locations, visual_features, previous_kv, output_kv)
        y = y + torch.tanh(self.alpha_attn) * attended
        return y + torch.tanh(self.alpha_ffw) * self.ffw(y), kv


class OtherGates(Block):
    """The same as long as they are closed."""

    def forward(self, y, visual_features, media_locations, previous_kv=None, output_kv=False):
        attended, kv = self.attn(y, media_locations, visual_features, previous_kv, output_kv)
        y = y + self.alpha_attn * attended
        return y + self.alpha_ffw * self.ffw(y), kv


class PerceiverAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, 8**-0.5
        self.norm_media, self.norm_latents = nn.LayerNorm(VISUAL), nn.LayerNorm(VISUAL)
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(VISUAL, HEADS * 8, bias=False) for _ in range(3)
        )
        self.to_out = nn.Linear(HEADS * 8, VISUAL, bias=False)

    def forward(self, features, latents):
        latents = self.norm_latents(latents)
        both = torch.cat((self.norm_media(features), latents), 1)
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.to_q(latents), self.to_k(both), self.to_v(both))
        )
        weights = (q * self.scale @ k.mT).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(LATENTS, VISUAL))
        self.time_pos_emb = nn.Parameter(torch.randn(4, 1, VISUAL))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(), feed_forward(VISUAL)]) for _ in range(2)
        )
        self.norm = nn.LayerNorm(VISUAL)

    def forward(self, x_f):
        x_f = (x_f + self.time_pos_emb[: x_f.shape[1]]).flatten(1, 2)
        x = self.latents.expand(len(x_f), -1, -1)
        for attn, ffw in self.layers:
            x = x + attn(x_f, x)
            x = x + ffw(x)
        return self.norm(x)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(state, "_told", set())


def inputs(model: nn.Module, locations: Any, dtype: torch.dtype = torch.bool) -> Any:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    y, visual = (
        torch.randn(shape, generator=generator).to(parameter)
        for shape in ((3, 8, TEXT), (3, 3, LATENTS, VISUAL))
    )
    return y, visual.requires_grad_(), torch.tensor(locations, dtype=dtype)


def call_block(locations: Any) -> Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]:
    """The text, what comes after it, and a few of its last tokens from the keys and values."""

    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        y, visual, media_locations = inputs(model, locations)
        out, kv = model(y, visual, media_locations, output_kv=True)
        later = nn.functional.pad(media_locations, (0, 1))
        after, same = model(y[:, :1], visual, later, previous_kv=kv, output_kv=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kv, same, strict=True))
        last, none = model(y[:, -3:], visual, media_locations, kv)
        assert none is None
        out = torch.cat((out, after, last), 1)
        return out, loss_of(out) + loss_of(torch.cat(kv))

    return call


@pytest.mark.parametrize("locations", LOCATIONS, ids=["usual", "more"])
@pytest.mark.parametrize(
    ("act", "dtype", "options"),
    [
        ("gelu", torch.float32, {}),
        ("gelu", torch.bfloat16, {}),
        ("sqrelu", torch.bfloat16, {"norm": False}),
        ("relu", torch.float32, {"gated_residual": False}),
        ("gelu", torch.float32, {"cross_attention": False}),
    ],
)
def test_block(locations: Any, act: str, dtype: torch.dtype, options: dict) -> None:
    model = open_gates(Block(act))
    report = check_parity(model, call_block(locations), dtype, unknown="probe", **options)
    left = {"gated_residual": "", "cross_attention": "attn"}
    assert [entry.name for entry in report.left] == [left[name] for name in options if name in left]


def test_gradients_of_media() -> None:
    model = open_gates(Block())
    gradients = []
    for _ in range(2):
        y, visual, locations = inputs(model, LOCATIONS[1])
        loss_of(model(y, visual, locations)[0]).backward()
        gradients.append(visual.grad)
        flamingo_fast.patch(model, unknown="probe")
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("frames", [1, 3])
def test_resampler(frames: int) -> None:
    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(frames)
        x = torch.randn(4, frames, 7, VISUAL, generator=generator).to(model.latents)
        out = model(x)
        return out, loss_of(out)

    model = Resampler()
    report = check_parity(model, call, unknown="probe")
    assert len(report.patched) == 2
    check_bf16_without_gradients(model, lambda model: call(model)[0], unknown="probe")
    assert not flamingo_fast.patch(model, resampler=False, unknown="probe").patched


def test_text_without_media_has_zeros_of_integers() -> None:
    model = open_gates(Block())
    y, visual, locations = inputs(model, [[0] * 8] * 3, torch.int64)
    before = model(y, visual, locations)[0]
    flamingo_fast.patch(model, unknown="probe")
    torch.testing.assert_close(model(y, visual, locations)[0], before)
    # What is added up may be more than one.
    y, visual, locations = inputs(model, [[0, 2, 0, 0, 1, 0, 0, 0]] * 3, torch.int64)
    after = model(y, visual, locations)[0]
    flamingo_fast.unpatch(model)
    torch.testing.assert_close(after, model(y, visual, locations)[0])


def test_chosen_beams() -> None:
    """Their keys and values are copies, no longer laid out by medium."""
    model = open_gates(Block())
    y, visual, locations = inputs(model, LOCATIONS[1])
    chosen = torch.tensor([2, 0, 0])

    def call() -> torch.Tensor:
        _, kv = model(y, visual, locations, output_kv=True)
        kv = [each.index_select(0, chosen) for each in kv]
        return model(y[:, -1:], visual, locations[chosen], previous_kv=kv)[0]

    with torch.no_grad():
        before = call()
        flamingo_fast.patch(model, unknown="probe")
        torch.testing.assert_close(call(), before)
        assert not state.state_of(model.attn).memory  # It is given its keys and values again.
        flamingo_fast.patch(model, unattended="zero", unknown="probe")
        after = call()
    torch.testing.assert_close(after[0], before[0])
    # The other beams are past their last image.
    alone = y[:, -1:] + model.alpha_ffw.tanh() * model.ffw(y[:, -1:])
    torch.testing.assert_close(after[1:], alone[1:])


@pytest.mark.parametrize("unattended", ["zero", "zero_block"])
def test_tokens_that_attend_to_nothing(unattended: str) -> None:
    model = open_gates(Block())
    y, visual, locations = inputs(model, LOCATIONS[1])
    theirs = model(y, visual, locations)[0]
    flamingo_fast.patch(model, unattended=unattended, unknown="probe")
    ours, _ = model(y, visual, locations)
    nothing = (locations.cumsum(1) > 3) | (locations.cumsum(1) == 0)
    torch.testing.assert_close(ours[~nothing], theirs[~nothing])
    if unattended == "zero_block":
        assert torch.equal(ours[nothing], y[nothing])
    else:
        alone = y + model.alpha_ffw.tanh() * model.ffw(y)
        torch.testing.assert_close(ours[nothing], alone[nothing])


def test_zero_block_is_of_both() -> None:
    model = open_gates(Block(attn=SeesAll))
    report = flamingo_fast.patch(model, unattended="zero_block", unknown="probe")
    assert not report.patched and "its attention is left" in report.left[0].reason


@pytest.mark.parametrize("attn", [SeesAllBefore, SeesAll, NothingPastLast, DecodesDouble])
def test_other_masks_are_left_alone(attn: type) -> None:
    model = open_gates(Block(attn=attn))
    report = flamingo_fast.patch(model, unknown="probe")
    assert [entry.name for entry in report.left] == ["attn"]
    assert "probed: results differ by" in report.left[0].reason
    # Without the probe all are: they are doubles, and none of the peer's code.
    assert not flamingo_fast.patch(model).patched


def test_other_blocks_are_left_alone_however_closed_their_gates() -> None:
    model = nn.ModuleList([OtherGates(), Block()])
    flamingo_fast.patch(model, unknown="probe")
    assert not is_patched(model[0]) and is_patched(model[1])
    assert not model[1].alpha_attn.any() and type(model[1].alpha_attn) is nn.Parameter


def test_broadcast_locations_take_its_own_forward() -> None:
    model = open_gates(Block())
    y, visual, locations = inputs(model, LOCATIONS[0])
    before = model(y, visual, locations[:1])[0]
    flamingo_fast.patch(model, unknown="probe")
    with pytest.warns(PatchWarning, match="unusual shape"):
        assert torch.equal(model(y, visual, locations[:1])[0], before)


def test_compiles() -> None:
    model = open_gates(Block())
    y, visual, locations = inputs(model, LOCATIONS[0])
    before = model(y, visual, locations)[0]
    flamingo_fast.patch(model, unknown="probe")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, visual, locations)[0], before)


def test_saved_and_copied() -> None:
    check_saved_and_copied(open_gates(Block()), call_block(LOCATIONS[0]), unknown="probe")
