"""What an update is made of: fp32 weights, AdamW with the paper's settings, the gradients' norm.

"Section" and "appendix" are Flamingo's (arXiv 2204.14198).
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from flamingo_fast.training.config import OptimizerConfig

_NARROW = (torch.bfloat16, torch.float16)
# Of an all-reduce of gradients.
_BUCKET_ELEMENTS = 32 * 2**20


class MasterWeights:
    """fp32 weights of a model's trainable parameters, which the optimiser updates.

    A parameter of 16 bits has a copy. Its gradients are added up in the copy's, in fp32, as soon as
    a backward has made them, so that several backwards lose no bits; then they are freed. A wider
    parameter, that of FSDP among them, is its own master weight.

    Arguments:
        model: of which the trainable parameters are taken now. One of 16 bits may have its values
            before they were rounded as an attribute `wide`, see `parallel.prepare`.
        widen: whether those of 16 bits have a copy; otherwise they are their own master weights.

    Attributes:
        parameters: of the model, by its names.
        weights: fp32, if widened, by the same names.

    Raises:
        ValueError: nothing in the model is trainable.
    """

    def __init__(self, model: nn.Module, *, widen: bool = True) -> None:
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not self.parameters:
            raise ValueError("model: expected trainable parameters, all of them are frozen")
        self.weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype not in _NARROW or not widen:
                self.weights[name] = parameter
                continue
            wide = parameter.__dict__.pop("wide", None)
            master = parameter.detach().float() if wide is None else wide
            parameter.register_post_accumulate_grad_hook(functools.partial(_move_grad, master))
            self.weights[name] = master

    def gradients(self) -> list[torch.Tensor]:
        """Of all weights, in their order; where a backward made none, zeros.

        Ranks must agree on what there is, and what a step does must not depend on whether one of
        its batches reached a parameter.
        """
        gradients = []
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        return gradients

    def clear_gradients(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """After the weights have changed."""
        pairs = [
            (parameter, self.weights[name])
            for name, parameter in self.parameters.items()
            if self.weights[name] is not parameter
        ]
        if pairs:
            parameters, weights = zip(*pairs, strict=True)
            torch._foreach_copy_([local(each) for each in parameters], [*map(local, weights)])


def _move_grad(master: torch.Tensor, parameter: torch.Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    parameter.grad = None


def trained_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a state dict has, of parts with trainable parameters (batch norm's)."""
    parameters = model.named_parameters()
    parts = {name.partition(".")[0] for name, each in parameters if each.requires_grad}
    kept = model.state_dict()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.partition(".")[0] in parts and name in kept
    }


def make_optimizer(
    weights: Mapping[str, torch.Tensor], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW of these weights, by the model's names; its moments are there from the start.

    The resampler has a weight decay of its own (appendix B.1.2); the others' is of all weights,
    gates, biases and norms among them, as the paper makes no exception.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        decay = config.weight_decay
        if name.startswith("resampler."):
            decay = config.resampler_weight_decay
        # One call of a kernel takes tensors of one mesh.
        groups.setdefault((decay, _mesh_of(weight)), []).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for (decay, _), params in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(each.device.type in ("cpu", "cuda") for each in weights.values()),
    )
    # Otherwise they appear with the first update, and a checkpoint that is loaded before it has
    # nowhere to go.
    for weight in weights.values():
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
        }
    return optimizer


def warm_up(config: OptimizerConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: linear up to step `warmup_steps`, then constant.

    The first step's is not 0, which would waste its batch.
    """
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def all_reduce_gradients(gradients: Iterable[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums of all ranks, in place, in a few large messages."""
    bucket: list[torch.Tensor] = []
    for gradient in map(local, gradients):
        if bucket and sum(each.numel() for each in bucket) + gradient.numel() > _BUCKET_ELEMENTS:
            _all_reduce_bucket(bucket, group)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _all_reduce_bucket(bucket, group)


def _all_reduce_bucket(bucket: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([each.flatten() for each in bucket])
    dist.all_reduce(flat, group=group)
    parts = flat.split([each.numel() for each in bucket])
    torch._foreach_copy_(
        bucket, [part.view_as(each) for part, each in zip(parts, bucket, strict=True)]
    )


@torch.no_grad()
def global_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, fp32 scalar, the same on all ranks.

    They may be whole or DTensors of several meshes, which torch.nn.utils.get_total_norm refuses.
    """
    by_ranks: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            groups = tuple(
                mesh.get_group(dim)
                for dim, placement in enumerate(gradient.placements)
                if not isinstance(placement, Replicate)
            )
        by_ranks.setdefault(groups, []).append(local(gradient))
    squares = []
    for groups, tensors in by_ranks.items():
        square = torch.stack(torch._foreach_norm(tensors)).float().square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def clip(gradients: Iterable[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scales gradients of this norm down to `max_norm`, in place."""
    torch._foreach_mul_([*map(local, gradients)], (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _mesh_of(tensor: torch.Tensor) -> Any:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
