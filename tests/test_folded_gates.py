"""Gates that are multiplied into the output layers for inference, and when they are not used."""

import copy
import pickle

import pytest
import torch
from torch import nn

from flamingo_fast.modules import GatedCrossAttentionBlock


def _block(dtype=torch.float32, **options) -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(dim=32, dim_visual=24, dim_head=8, heads=4, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block.to(dtype)


def _inputs(dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[0, [2, 5]] = locations[1, [0, 1, 4]] = True
    generator = torch.Generator().manual_seed(1)
    x, media = (torch.randn(*shape, generator=generator) for shape in ((2, 9, 32), (2, 3, 5, 24)))
    return x.to(dtype), media.to(dtype), locations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "vector_gates": True, "activation": "squared_relu", "norm": "rms"},
        {"unattended": "zero_block", "media_norm": True},
    ],
    ids=["open_flamingo", "paper", "zero_block"],
)
@torch.no_grad()
def test_folding_changes_nothing_but_rounding(dtype, options):
    block, inputs = _block(dtype, **options), _inputs(dtype)
    truth = _block(torch.float64, **options)
    truth.load_state_dict(block.state_dict())
    exact = truth(*(tensor.double() for tensor in inputs[:2]), inputs[2])
    error = (block(*inputs).double() - exact).abs().max()
    keys = block.state_dict().keys()
    block.fold_gates()
    folded, media_kv = block(*inputs, return_media_kv=True)
    assert block._folded_weights() is not None
    assert (folded.double() - exact).abs().max() <= 2 * error + torch.finfo(dtype).eps
    assert torch.equal(block(inputs[0], None, inputs[2], media_kv=media_kv), folded)
    if block.leaves_unattended:
        assert torch.equal(folded[0, :2], inputs[0][0, :2])
    assert block.state_dict().keys() == keys


class _LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _hook(block):
    block.attn.to_out.register_forward_hook(lambda module, args, out: out + 1)


def _replace(block):
    block.ff[3] = _LoRA(128, 32, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.attn_gate.mul_(2),
        lambda block: block.attn.to_out.weight.add_(1),
        lambda block: setattr(block, "ff_gate", nn.Parameter(torch.ones(1))),
        lambda block: block.load_state_dict({k: v + 1 for k, v in block.state_dict().items()}),
        _hook,
        _replace,
    ],
    ids=["gate", "weight", "new", "load", "hook", "lora"],
)
@torch.no_grad()
def test_what_is_no_longer_right_is_not_used(change):
    block, inputs = _block(), _inputs()
    block.fold_gates()
    block(*inputs)
    change(block)
    fresh = copy.deepcopy(block)
    fresh.fold_gates(False)
    assert torch.equal(block(*inputs), fresh(*inputs))


def test_gradients_and_copies_do_without():
    block, inputs = _block(), _inputs()
    expected = block(*inputs)
    block.fold_gates()
    assert torch.equal(block(*inputs), expected)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad():
            assert torch.equal(copied(*inputs), expected)


def test_what_can_not_be_folded_says_so():
    with pytest.raises(ValueError, match="tanh_gating"):
        _block(tanh_gating=False).fold_gates()
    block = _block()
    _replace(block)
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        block.fold_gates()
