"""How a model is spread over ranks: precision, FSDP2, activation checkpointing, torch.compile."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from flamingo_fast.models.conditioning import find_layers
from flamingo_fast.models.config import ConfigError
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.training.config import PRECISIONS, ParallelConfig
from flamingo_fast.training.tensor_parallel import fsdp_placement, parallelize

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Ranks of one `dp_rank` share each layer and are given the same batches.

    Attributes:
        device: that this process computes on.
        rank, world_size: among all.
        dp_rank, dp_size: among those that have different rows.
        mesh: ("dp", "tp"), or None for one process.
        dp_group: of `TrainStep`; None where dp_size is 1.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None or self.dp_size == 1 else self.mesh.get_group("dp")


def init_distributed(device: str | torch.device | None = None) -> torch.device:
    """Joins the processes that torchrun started, if it did; the device of this one.

    Arguments:
        device: "cpu", "cuda" or one GPU; None: a GPU if there is one. With torchrun each process
            of a machine has a GPU of its own.

    Raises:
        ConfigError: more processes than GPUs; no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: expected a device of PyTorch, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: expected one that is there, got {device!r} without a GPU")
    is_launched = "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ
    if chosen.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if is_launched else chosen.index or 0
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: expected a GPU for each process of a machine, got "
                f"{torch.cuda.device_count()} GPUs and a process {index}"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if is_launched and not dist.is_initialized():
        is_gpu = chosen.type == "cuda"
        # Messages of the host, such as a checkpoint's, go by gloo.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo", device_id=chosen if is_gpu else None
        )
    return chosen


def make_ranks(parallel: ParallelConfig, device: torch.device | str) -> Ranks:
    """Which ranks share what, of the processes that `init_distributed` joined.

    Ranks of one layer follow each other, so that they are on one machine.

    Raises:
        ConfigError: a number of processes that parallel.tensor_parallel doesn't divide.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size % parallel.tensor_parallel:
        raise ConfigError(
            f"parallel.tensor_parallel: expected a divisor of the {world_size} processes, got "
            f"{parallel.tensor_parallel}"
        )
    device = torch.device(device)
    if world_size == 1:
        return Ranks(device)
    dp_size = world_size // parallel.tensor_parallel
    mesh = init_device_mesh(
        device.type, (dp_size, parallel.tensor_parallel), mesh_dim_names=("dp", "tp")
    )
    rank = dist.get_rank()
    return Ranks(device, rank, world_size, rank // parallel.tensor_parallel, dp_size, mesh)


def prepare(
    model: Flamingo,
    parallel: ParallelConfig,
    precision: str,
    device: torch.device | str,
    ranks: Ranks | None = None,
) -> Ranks:
    """Makes a model ready for `TrainStep`, in place; before that one is made.

    Of "bf16" frozen weights become bf16, and what is trained computes in it. With FSDP the trained
    weights stay fp32 and are gathered as bf16, gradients are summed over ranks in fp32. Without,
    they are bf16, and have what they were before as an attribute `wide` for the master weights.

    FSDP shards each of these on its own, trained and frozen parameters apart: the language model's
    layers, new layers, resampler, vision encoder, learnt tokens, and what is left of the language
    model. Gradients are summed, not averaged. Modules move to the device one by one as they are
    sharded.

    Arguments:
        model: with the same weights on all ranks; or on "meta", then see `load_sharded`.
        precision: "bf16" or "fp32".
        ranks: what `make_ranks` returned, if that was called before.

    Raises:
        ConfigError: a field of `parallel` that this model or these ranks don't have.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    ranks = make_ranks(parallel, device) if ranks is None else ranks
    is_sharded = parallel.fsdp and ranks.dp_size > 1
    is_meta = any(each.is_meta for each in model.parameters())
    if ranks.mesh is not None and parallel.tensor_parallel > 1:
        if not is_meta:
            model.to(ranks.device)
        parallelize(model, ranks.mesh["tp"])
    _cast(model, _DTYPES[precision], is_sharded)
    if parallel.activation_checkpointing:
        model.checkpoint()
        vision = model.vision_encoder
        if not vision.is_frozen and hasattr(vision.model, "set_grad_checkpointing"):
            vision.set_grad_checkpointing()
    if parallel.compile:
        _compile(model)
    if is_sharded:
        assert ranks.mesh is not None
        _shard(model, ranks.mesh["dp"], precision, parallel.reshard_after_forward)
    elif not is_meta:
        model.to(ranks.device)
    return ranks


def _cast(model: nn.Module, dtype: torch.dtype, is_sharded: bool) -> None:
    """Frozen parameters to `dtype`, trained ones too unless FSDP does so; those to fp32."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            # Of tied weights each of the modules gets the new one.
            if parameter not in done:
                done[parameter] = _cast_parameter(parameter, dtype, is_sharded)
            module._parameters[name] = done[parameter]


def _cast_parameter(parameter: nn.Parameter, dtype: torch.dtype, is_sharded: bool) -> nn.Parameter:
    if not parameter.requires_grad:
        if parameter.dtype == dtype:
            return parameter
        return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    if is_sharded or dtype == wide.dtype:
        return parameter if wide.dtype == parameter.dtype else nn.Parameter(wide)
    narrow = nn.Parameter(wide.to(dtype))
    narrow.__dict__["wide"] = wide
    return narrow


def _layers(model: Flamingo) -> Iterator[Any]:
    """New ones and the language model's."""
    yield from model.conditioning.blocks
    yield from model.conditioning.layers
    yield from find_layers(model.lang_model)


def _compile(model: Flamingo) -> None:
    """Of layers their forward alone: hooks are around it, those of the new layers among them."""
    vision: Any = model.vision_encoder.model
    stages = [block for stage in getattr(vision, "stages", ()) for block in stage]
    for layer in (*_layers(model), model.resampler, *getattr(vision, "blocks", ()), *stages):
        layer.forward = torch.compile(layer.forward)
    # Called in the middle of a layer by vanilla cross-attention. It looks the media up, which
    # would be a graph for each batch.
    conditioning: Any = model.conditioning
    conditioning.attend = torch.compiler.disable(conditioning.attend)


def _shard(model: Flamingo, mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "shard_placement_fn": functools.partial(fsdp_placement, size=mesh.size()),
    }
    # Nothing here changes what a module returned in place, of which FSDP warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model.resampler, reshard_after_forward=reshard, **options)
    if any(True for _ in model.vision_encoder.parameters()):
        fully_shard(model.vision_encoder, reshard_after_forward=reshard, **options)
    if model.tokens is not None:
        # The loss has its weight after `embed`, so it stays.
        fully_shard(model.tokens, reshard_after_forward=False, **options)
        register_fsdp_forward_method(model.tokens, "embed")
    # What is left: embedding, last norm and head.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # By gloo there are only sums.
            module.set_force_sum_reduction_for_comms(True)
            # A parameter that only one rank's batch reached would be missing from the others'
            # messages. Not in the first versions of PyTorch that have the rest.
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True, recurse=False)
