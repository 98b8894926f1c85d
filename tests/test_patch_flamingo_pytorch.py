"""Patched flamingo-pytorch: its modules in a small decoder, alone, and with other meanings."""

from typing import Any

import patch_cases
import pytest
import torch
from torch import nn

from flamingo_fast import modules
from flamingo_fast.patching import patch
from flamingo_fast.testing import peers

DIM, VOCAB, IMAGE = 24, 20, 0
SIZES: dict[str, Any] = {"dim": DIM, "dim_head": 8, "heads": 3}
FP32, BF16 = torch.float32, torch.bfloat16


class Decoder(nn.Module):
    """A resampler, and gated blocks between layers that mix what came before."""

    def __init__(self, immediate: bool, dim: int = DIM) -> None:
        super().__init__()
        sizes = SIZES | {"dim": dim}
        peer = peers.flamingo_pytorch()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.resampler = peer.PerceiverResampler(**sizes, depth=2, num_latents=4)
        self.blocks = nn.ModuleList(
            peer.GatedCrossAttentionBlock(**sizes, only_attend_immediate_media=immediate)
            for _ in range(2)
        )
        self.mixers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x, media = self.embedding(ids), self.resampler(features)
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            x = block(x, media, media_locations=ids == IMAGE)
            x = x + mixer(x.cumsum(1) / x.shape[1])
        return x @ self.embedding.weight.mT


def _decoder(immediate: bool, dim: int = DIM) -> Any:
    torch.manual_seed(0)
    model = patch_cases.open_gates(Decoder(immediate, dim))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
    return model


def _ids() -> torch.Tensor:
    """First image late, images side by side, more image tokens than images, and none."""
    ids = torch.randint(1, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))
    for row, places in enumerate([(3, 7), (1, 2), (0, 4, 6), ()]):
        ids[row, list(places)] = IMAGE
    return ids


def _call_with(features: int) -> patch_cases.Call:
    def call(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight = model.embedding.weight
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(4, 2, features, weight.shape[1], generator=generator)
        logits = model(_ids(), inputs.to(weight.dtype))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), _ids().flatten())

    return call


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("features", [5, 40])
def test_decoder(immediate: bool, dtype: torch.dtype, features: int) -> None:
    report = patch_cases.check_parity(_decoder(immediate), _call_with(features), dtype)
    assert not report.left and {entry.source for entry in report.patched} == {
        "flamingo-pytorch 0.1.2"
    }
    assert ["first image" in note for note in report.notes()] == [not immediate]


def test_decoder_of_middle_size_in_training_mode() -> None:
    patch_cases.check_parity(_decoder(True, dim=256).train(), _call_with(5))


def test_saved_and_copied() -> None:
    patch_cases.check_saved_and_copied(_decoder(True), _call_with(5))


def test_without_places_all_text_attends_to_all_media() -> None:
    block = _decoder(True).blocks[0]
    x, media = torch.randn(2, 5, DIM), torch.randn(2, 3, 4, DIM)
    before = block(x, media)
    patch(block)
    torch.testing.assert_close(block(x, media), before)


def test_one_image_to_resample() -> None:
    resampler = _decoder(True).resampler
    features = torch.randn(2, 6, DIM)
    before = resampler(features)
    patch(resampler)
    torch.testing.assert_close(resampler(features), before)
    with pytest.raises(RuntimeError, match="must match"):
        resampler(torch.randn(2, 5, 6, DIM))  # It has embeddings of four media.


@pytest.mark.parametrize("unattended", ["zero", "zero_block"])
def test_other_meanings_of_text_without_media(unattended: str) -> None:
    decoder = _decoder(False)
    options: dict[str, Any] = {"only_attend_immediate_media": False, "past_last": "zero"}
    ours = modules.GatedCrossAttentionBlock(**SIZES, **options, unattended=unattended)
    ours.load_state_dict(decoder.blocks[0].state_dict())
    x, media = torch.randn(4, 9, DIM), torch.randn(4, 2, 5, DIM)
    patch(decoder, unattended=unattended)
    found = decoder.blocks[0](x, media, _ids() == IMAGE)
    torch.testing.assert_close(found, ours(x, media, _ids() == IMAGE))


def test_edited_code_is_probed() -> None:
    peer = peers.flamingo_pytorch()

    class Later(peer.MaskedCrossAttention):  # type: ignore[misc,name-defined]
        def forward(self, x, media, media_locations=None):
            return super().forward(x, media, media_locations.roll(1, 1))

    class Same(peer.MaskedCrossAttention):  # type: ignore[misc,name-defined]
        def forward(self, x, media, media_locations=None):
            return super().forward(x, media, media_locations)

    assert not patch(Same(**SIZES)).patched
    assert patch(Same(**SIZES), unknown="probe").patched
    report = patch(Later(**SIZES), unknown="probe")
    assert "probed: results differ" in report.left[0].reason
