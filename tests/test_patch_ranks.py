"""Patched models on two gloo ranks: sharded by FSDP2, and copied by DDP."""

from pathlib import Path

import pytest
import torch
from patch_cases import outcomes
from patch_models import FAMILIES, Family, assert_close, patched_names, recompute
from rank_cases import met, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flamingo_fast.patching import patch, unpatch

pytest.importorskip("transformers")
WORLD = 2


def _shard(model: nn.Module, family: Family, norms: bool) -> None:
    """By layers; norms in them as groups of their own too, whose weights nobody else may read."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in reversed(list(model.modules())):
        name = type(module).__name__
        if name in family.layers or (norms and "Norm" in name and list(module.parameters())):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _check_sharded(family: Family, rank: int, first: str) -> None:
    row = lambda model: family.call(model, slice(rank, rank + 1))
    expected = outcomes(family.model(), family.call)
    alone, _ = row(family.model())
    model = family.model()
    if first == "patch":
        patch(model)
    _shard(model, family, norms=first == "shard")
    if first == "shard":
        patch(model)
    whole = family.model()
    patch(whole)
    assert patched_names(model) == patched_names(whole)

    def check() -> None:
        found = outcomes(model, row)
        torch.testing.assert_close(found["logits"], alone.detach(), rtol=1e-4, atol=1e-5)
        names = [name for name in expected if name[:2] == "d "]
        assert_close(
            {name: found[name].full_tensor() for name in names},
            {name: expected[name] for name in names},
        )

    check()
    if hasattr(model, "gradient_checkpointing_enable"):
        model.train()
        recompute(model)
        check()
    unpatch(model)
    assert not patched_names(model)
    check()


def _check_copied(family: Family, rank: int) -> None:
    expected = outcomes(family.model(), family.call)
    model = family.model()
    assert patch(model).patched
    found = outcomes(
        DistributedDataParallel(model), lambda model: family.call(model, slice(rank, rank + 1))
    )
    assert_close(
        {name.replace("d module.", "d "): each for name, each in found.items() if name[:2] == "d "},
        {name: each for name, each in expected.items() if name[:2] == "d "},
    )


def _worker(rank: int, store: str) -> None:
    with met(rank, WORLD, store):
        for family in FAMILIES.values():
            if family.is_installed():
                for first in ("patch", "shard"):
                    _check_sharded(family, rank, first)
                _check_copied(family, rank)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    on_ranks(WORLD, _worker, str(tmp_path / "store"))
