"""Two ranks that share a model whose batches differ in what there is to do (FSDP2, gloo)."""

import copy
import dataclasses

import pytest
import torch
from model_cases import IMAGE, flamingo, open_gates
from rank_cases import met, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flamingo_fast.models.config import VisionConfig

WORLD = 2


def _model():
    model = open_gates(flamingo("chinchilla", resampler={"max_num_frames": 3})).train()
    model.config = dataclasses.replace(model.config, vision=VisionConfig(image_size=8))
    return model


def _batches(is_packed):
    """Rank 0 has videos of three lengths, rank 1 text alone."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, IMAGE, 7, IMAGE, 9, 10, IMAGE, 8]])
    videos = [torch.randn(frames, 3, 8, 8, generator=generator) for frames in (1, 3, 2)]
    text = torch.tensor([[6, 7, 8, 9, 10, 11, 12, 13]])
    options = {"labels": ids, "num_media": [3]}, {"labels": text, "num_media": [0]}
    if is_packed:
        for each, counts in zip(options, ([1, 2], [0, 0]), strict=True):
            each |= {"cu_seqlens": [0, 3, 8], "num_media": counts}
    return (
        {"input_ids": ids, "videos": videos, **options[0]},
        {"input_ids": text, **options[1]},
    )


def _gradients(model, batch):
    model(**batch, loss_reduction="sum").loss.backward()


def _worker(rank, store):
    with met(rank, WORLD, store):
        for is_frozen in (True, False):
            whole = _model()
            whole.vision_encoder.freeze(is_frozen)
            sharded = copy.deepcopy(whole)
            mesh = init_device_mesh("cpu", (WORLD,))
            for part in (sharded.vision_encoder, sharded.resampler, *sharded.conditioning.blocks):
                fully_shard(part, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            for is_packed in (False, True):
                batches = _batches(is_packed)
                for batch in batches:
                    _gradients(whole, batch)
                _gradients(sharded, batches[rank])
                for (name, one), other in zip(
                    sharded.named_parameters(), whole.parameters(), strict=True
                ):
                    assert (one.grad is None) == (other.grad is None), name
                    if other.grad is None:
                        continue
                    largest = float(other.grad.abs().max())
                    # FSDP makes means.
                    torch.testing.assert_close(
                        WORLD * one.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4 * largest
                    )


@pytest.mark.slow
def test_videos_of_several_lengths_beside_text_alone(tmp_path):
    """Gradients over both are those of one process with both batches, and nobody waits for ever."""
    on_ranks(WORLD, _worker, str(tmp_path / "store"))
