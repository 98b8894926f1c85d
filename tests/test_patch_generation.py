"""Logits of cached decoding in bf16, before and after `patch`; in fp32 families test the tokens."""

import copy
from typing import Any

import pytest
import torch
from patch_models import FAMILIES, TOKENS, Family
from torch import nn

from flamingo_fast.patching import patch
from flamingo_fast.testing.compare import assert_close_to_oracle

pytest.importorskip("transformers")
# Neither an image nor the end, in both rows.
NEXT = torch.tensor([[7, 9], [8, 6], [11, 7], [5, 12]])


def _force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A token whose logits tie in bf16 would send the models apart."""
    forced = NEXT[ids.shape[1] - TOKENS]
    return torch.full_like(scores, -torch.inf).scatter(1, forced[:, None], 0)


def _logits(model: Any, family: Family) -> dict[str, torch.Tensor]:
    dtype = next(each.dtype for each in model.parameters())
    inputs = {
        name: each.to(dtype) if each.is_floating_point() else each
        for name, each in family.inputs().items()
    }
    # transformers 5 leaves a mask of ones alone out, and OpenFlamingo needs one.
    inputs["attention_mask"][1, :2] = 0
    found = model.generate(
        **inputs,
        max_new_tokens=len(NEXT),
        do_sample=False,
        logits_processor=[_force],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(found.sequences[:, -len(NEXT) :], NEXT.T)
    return {f"token {index}": each for index, each in enumerate(found.logits)}


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_in_bf16(name: str) -> None:
    family = FAMILIES[name]
    if not family.is_installed():
        pytest.skip(f"{name} is not installed")
    model: nn.Module = family.model().bfloat16()
    oracle = _logits(copy.deepcopy(model).double(), family)
    before = _logits(model, family)
    assert patch(model).patched
    assert_close_to_oracle(_logits(model, family), before, oracle)
