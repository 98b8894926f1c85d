"""Modules against the peers': outputs and every gradient by name, by the three-way rule."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from flamingo_fast.testing.compare import Comparison, compare
from flamingo_fast.testing.inputs import random_tensor

FP32, BF16 = torch.float32, torch.bfloat16

Call = Callable[..., torch.Tensor]


def randomized(module: nn.Module, std: float = 0.3, seed: int = 0) -> nn.Module:
    """Random values in every parameter: gates open, norms with weights of their own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu") * std
            noise = noise.to(parameter.device)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
            if name.endswith("gate"):
                parameter.copy_(0.5 + noise)
    return module


def inputs_of(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        name: random_tensor(shape, dtype, seed=seed, requires_grad=True)
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }


def results(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    call: Call | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of inputs and parameters.

    Arguments:
        call: a function of the module and the inputs; by default the module's.
        dtype: what to convert all to first.
    """
    module = copy.deepcopy(module).to(dtype)
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in inputs.items()
    }
    out = module(**leaves) if call is None else call(module, **leaves)
    out.backward(random_tensor(tuple(out.shape), torch.float64, seed=99).to(out.dtype))
    found = {"out": out.detach()}
    for name, leaf in (*leaves.items(), *module.named_parameters()):
        if leaf.requires_grad:
            found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def check(
    ours: nn.Module,
    peer: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    call: Call | None = None,
    call_peer: Call | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """The three-way rule: eager is the peer's module, and the oracle is that in fp64.

    Arguments:
        ours: with the peer's weights and dtype.
        call, call_peer: as of `results`; the peer is called as ours by default.
        names: the peer's parameters that have another name, to ours.
    """
    call_peer = call_peer or call
    names = {f"d{theirs}": f"d{our}" for theirs, our in (names or {}).items()}

    def renamed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {names.get(name, name): tensor for name, tensor in found.items()}

    found = results(ours, inputs, call)
    eager = renamed(results(peer, inputs, call_peer))
    oracle = renamed(results(peer, inputs, call_peer, torch.float64))
    assert found.keys() == oracle.keys()
    ordered: dict[str, Any] = {name: found[name] for name in oracle}
    # Sums over all elements of the output, whose terms cancel: as a random walk of such steps.
    scale = 2 * found["out"].numel() ** 0.5 * found["out"].abs().max().item()
    scales = {
        name: scale
        for name, tensor in found.items()
        if name.endswith("gate") and tensor.numel() == 1
    }
    # Of the few elements of a vector eager's largest error may be small by luck.
    for name, tensor in oracle.items():
        if found["out"].is_cuda:
            # Each shape of a product has another order of its terms there.
            scales.setdefault(name, 2 * tensor.abs().max().item())
        if tensor.dim() == 1 and tensor.numel() > 1:
            scales[name] = 4 * tensor.abs().max().item()
    comparisons = [
        compare(name, tensor, eager[name], oracle[name], scales.get(name))
        for name, tensor in ordered.items()
    ]
    # Not the drift of ops that round once: through several products the errors of a row's elements
    # have one cause, and so one direction.
    failed = [each for each in comparisons if not dataclasses.replace(each, drift_ulp=0.0).ok]
    assert not failed, "\n".join(map(str, failed))
    return comparisons


def like(peer: nn.Module, ours: nn.Module) -> nn.Module:
    """Ours with the peer's weights, each key of it, and dtype."""
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.to(next(peer.parameters()).dtype)


def saved_bytes(
    call: Callable[[], Any], given: Iterable[torch.Tensor | None] = ()
) -> dict[int, int]:
    """Of each storage that the backward of `call` keeps: its bytes by address.

    Arguments:
        given: tensors whose storages are not counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in given if tensor is not None}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Alive, or an address would be another storage's later.
        out = call()
    assert all(tensor.requires_grad for tensor in pytree.tree_leaves(out))
    return {address: nbytes for address, (nbytes, _) in kept.items()}
