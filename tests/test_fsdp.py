"""FSDP2 on two gloo ranks: fully_shard gated blocks, with gates of shape (1,), and a resampler."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_cases import met, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flamingo_fast.modules import (
    GatedCrossAttentionBlock,
    GatedResidual,
    GatedResidualNorm,
    LayerNorm,
    PerceiverResampler,
    SquaredReLU,
)

WORLD = 2


class Block(nn.Module):
    """A gated feed-forward with every module of the op family."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.norm = LayerNorm(16, impl=impl)
        self.inner = nn.Linear(16, 16)
        self.gated_norm = GatedResidualNorm(16, norm="rms", impl=impl)
        self.activation = SquaredReLU(impl=impl)
        self.gated = GatedResidual(impl=impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual, normed = self.gated_norm(x, self.inner(self.norm(x)))
        return self.gated(residual, self.activation(normed))


class Flamingo(nn.Module):
    """What Flamingo adds to two layers of a language model."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        heads = {"heads": 2, "dim_head": 8, "impl": impl}
        self.resampler = PerceiverResampler(
            dim=12, depth=2, num_latents=3, max_num_frames=2, **heads
        )
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(dim=16, dim_visual=12, **heads) for _ in range(2)
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The text (samples, 6, 16) and, in the same rows, two images (2, 2, 12) each."""
        text, features = batch.split([96, 48], -1)
        x = text.unflatten(-1, (6, 16))
        media = self.resampler(features.unflatten(-1, (2, 2, 12)))
        where = torch.zeros(x.shape[:2], dtype=torch.bool)
        where[:, [1, 3]] = True
        for block in self.blocks:
            x = block(x, media, where)
        return x


def _train(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for parameter in model.parameters()
    ]


def _blocks(impl: str) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(Block(impl), Block(impl)), torch.randn(WORLD, 6, 16)


def _flamingo(impl: str) -> tuple[nn.Module, torch.Tensor]:
    return Flamingo(impl), torch.randn(WORLD, 2, 144)


def _parts(model: nn.Module) -> list[nn.Module]:
    """What is sharded on its own."""
    return [model.resampler, *model.blocks] if isinstance(model, Flamingo) else list(model)


def _worker(rank: int, store: str, impl: str, make: Callable[[str], Any]) -> None:
    with met(rank, WORLD, store):
        torch.manual_seed(0)
        whole, batches = make(impl)
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.3)
        sharded = copy.deepcopy(whole)
        mesh = init_device_mesh("cpu", (WORLD,))
        for part in _parts(sharded):
            fully_shard(part, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        got = _train(sharded, batches[rank])
        expected = _train(whole, batches.flatten(0, 1))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "impl"),
    [(_blocks, "torch"), (_blocks, "triton"), (_flamingo, "torch"), (_flamingo, "triton")],
)
def test_two_ranks_train_as_one(make, impl, tmp_path):
    on_ranks(WORLD, _worker, str(tmp_path / "store"), impl, make)
