"""FSDP2 on two gloo ranks: fully_shard a gated block, whose gate has shape (1,)."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flamingo_fast.modules import GatedResidual, GatedResidualNorm, LayerNorm, SquaredReLU

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


def _train(model: nn.Module, batch: torch.Tensor, steps: int = 2) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for parameter in model.parameters()
    ]


def _worker(rank: int, store: str, impl: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.manual_seed(0)
        whole = nn.Sequential(Block(impl), Block(impl))
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.3)
        batches = torch.randn(WORLD, 6, 16)
        sharded = copy.deepcopy(whole)
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in sharded:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        got = _train(sharded, batches[rank])
        expected = _train(whole, batches.flatten(0, 1))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        # A rank that leaves while the other still talks to it can abort it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_two_ranks_train_as_one(impl, tmp_path):
    mp.spawn(_worker, args=(str(tmp_path / "store"), impl), nprocs=WORLD)
