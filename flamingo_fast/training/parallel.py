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
from flamingo_fast.training.config import DTYPES, PRECISIONS, ParallelConfig
from flamingo_fast.training.tensor_parallel import fsdp_placement, parallelize


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
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda, got {device!r}")
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
    model. Gradients are summed, not averaged. One after another they get their dtype, move to the
    device and are sharded. So of a model that `from_pretrained` left in its files no rank has more
    than one of these and its own shards in memory.

    Arguments:
        model: with the same weights on all ranks, which is not checked.
        precision: "bf16" or "fp32".
        ranks: what `make_ranks` returned, if that was called before.

    Raises:
        ConfigError: precision; a field of `parallel` that this model or these ranks don't have.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    ranks = make_ranks(parallel, device) if ranks is None else ranks
    dtype = DTYPES[precision]
    if ranks.mesh is not None and parallel.tensor_parallel > 1:
        parallelize(model, ranks.mesh["tp"])
    if parallel.activation_checkpointing:
        model.checkpoint()
        vision = model.vision_encoder
        if not vision.is_frozen and hasattr(vision.model, "set_grad_checkpointing"):
            vision.set_grad_checkpointing()
    if parallel.compile:
        _compile(model)
    if ranks.mesh is not None and parallel.fsdp and ranks.dp_size > 1:
        _shard(model, ranks, dtype, parallel.reshard_after_forward)
    else:
        _cast(model, dtype, ranks.device, is_sharded=False)
        # What is left are buffers; parameters that are moved may lose their attribute.
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(ranks.device)
    for module in model.modules():
        # Batch norm with weights of 16 bits takes no statistics of 32.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and dtype != torch.float32:
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    return ranks


def _cast(model: nn.Module, dtype: torch.dtype, device: torch.device, is_sharded: bool) -> None:
    """Parameters to the device, frozen ones to `dtype`, trained ones too unless FSDP does so."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            # Of tied weights each of the modules gets the new one.
            if parameter not in done:
                done[parameter] = _cast_parameter(parameter, dtype, device, is_sharded)
            module._parameters[name] = done[parameter]


def _cast_parameter(
    parameter: nn.Parameter, dtype: torch.dtype, device: torch.device, is_sharded: bool
) -> nn.Parameter:
    values = parameter.detach()
    if not parameter.requires_grad:
        cast = values.to(device, dtype)
        return parameter if cast is values else nn.Parameter(cast, requires_grad=False)
    wide = values.to(device, torch.float32)
    if is_sharded or dtype == torch.float32:
        return parameter if wide is values else nn.Parameter(wide)
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
    # Where timm's transformers and NFNets have their layers.
    stages = [each for each in getattr(vision, "stages", ()) if isinstance(each, nn.Sequential)]
    of_vision = [*getattr(vision, "blocks", ()), *(block for stage in stages for block in stage)]
    for layer in (*_layers(model), model.resampler, *of_vision):
        layer.forward = torch.compile(layer.forward)
    # Called in the middle of a layer by vanilla cross-attention. It looks the media up, which
    # would be a graph for each batch.
    conditioning: Any = model.conditioning
    conditioning.attend = torch.compiler.disable(conditioning.attend)


def _shard(model: Flamingo, ranks: Ranks, dtype: torch.dtype, reshard: bool) -> None:
    assert ranks.mesh is not None
    mesh = ranks.mesh["dp"]
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    placement = functools.partial(fsdp_placement, size=mesh.size())

    def shard(module: nn.Module, reshard_after_forward: bool) -> None:
        _cast(module, dtype, ranks.device, is_sharded=True)
        # FSDP takes no scalars, and NFNets have some: they stay whole, and `TrainStep` sums their
        # gradients.
        scalars = {parameter for parameter in module.parameters() if parameter.dim() == 0}
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
            ignored_params=scalars,
        )

    # Nothing here changes what a module returned in place, of which FSDP warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for layer in (*_layers(model), model.resampler, model.vision_encoder):
        shard(layer, reshard)
    if model.tokens is not None:
        # The loss has its weight after `embed`, so it stays.
        shard(model.tokens, False)
        register_fsdp_forward_method(model.tokens, "embed")
    # What is left: embedding, last norm and head.
    shard(model, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # By gloo there are only sums.
            module.set_force_sum_reduction_for_comms(True)
            # A parameter that only one rank's batch reached would be missing from the others'
            # messages. Not in the first versions of PyTorch that have the rest.
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True, recurse=False)
