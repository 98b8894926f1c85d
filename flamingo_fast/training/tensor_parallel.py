"""Tensor parallel: ranks share each layer, as in Megatron-LM (arXiv 1909.08053, section 3).

Of attention each rank has whole heads, of a feed-forward a part of its hidden width. The linear
layers before are split by outputs and the ones after by inputs, so attention and feed-forward each
need one sum over ranks in the forward and one, of their input's gradient, in the backward. All else
is whole on every rank, and the same: embedding and head, norms, gates, biases of outputs, layouts,
the vision encoder, and what passes between layers.

What is split is a DTensor of the whole's shape under the whole's name. Modules compute on its local
tensor: fused ops see plain tensors, as they do on one rank.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from flamingo_fast.models.chinchilla import ChinchillaLM, RelativeAttention
from flamingo_fast.models.config import ConfigError
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.modules.cross_attention import MaskedCrossAttention
from flamingo_fast.modules.feed_forward import FeedForward
from flamingo_fast.modules.plain import has_hooks, is_plain
from flamingo_fast.modules.resampler import PerceiverAttention, SelfAttention
from flamingo_fast.ops.feed_forward import feed_forward
from flamingo_fast.ops.gated_residual import gated_residual
from flamingo_fast.training.pieces import pieces_of, rows_in_pieces

# Linear layers before attention, and how many projections each is of: (q, k, v) are three.
_BEFORE = {
    RelativeAttention: {"to_qkv": 3, "to_position": 1},
    MaskedCrossAttention: {"to_q": 1, "to_kv": 2},
    PerceiverAttention: {"to_q": 1, "to_kv": 2},
    SelfAttention: {"to_qkv": 3},
}


@dataclasses.dataclass(frozen=True)
class _Ranks:
    """Those that share a layer, and which this one is. A name can be copied, a group can't."""

    group: str
    size: int
    rank: int


def _sum(x: torch.Tensor, ranks: _Ranks) -> torch.Tensor:
    """Over ranks, a new tensor. Of nothing (a batch without media) there is nothing to send."""
    if x.numel() == 0:
        return x.clone()
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", ranks.group))


class _Enter(torch.autograd.Function):
    """x, which is the same on all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: _Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.ranks), None


class _Leave(torch.autograd.Function):
    """The sum of all ranks' x; the gradient of each is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: _Ranks) -> torch.Tensor:
        return _sum(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Own(torch.autograd.Function):
    """A rank's part of a bias that is whole on all of them; the gradient is the whole's."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, pieces: int, ranks: _Ranks) -> torch.Tensor:
        ctx.pieces, ctx.ranks, ctx.shape = pieces, ranks, bias.shape
        return _own_rows(bias, pieces, ranks)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole = grad.new_zeros(ctx.pieces, ctx.ranks.size, grad.numel() // ctx.pieces)
        whole[:, ctx.ranks.rank] = grad.view(ctx.pieces, -1)
        return _sum(whole.view(ctx.shape), ctx.ranks), None, None


def _own_rows(whole: torch.Tensor, pieces: int, ranks: _Ranks) -> torch.Tensor:
    """Of each piece of the rows the part of this rank; a copy, so that the whole can go."""
    parts = whole.unflatten(0, (pieces, ranks.size, -1))
    return parts[:, ranks.rank].clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class ColumnLinear(nn.Linear):
    """A linear layer of which each rank makes some outputs: of each of its pieces whole heads.

    Attributes:
        ranks: that share it.
        pieces: how many projections, one after another, the rows of its weight are.
    """

    ranks: _Ranks
    pieces: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features / ranks)."""
        return F.linear(self.enter(x), _local(self.weight), self.local_bias())

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x, whose gradient is summed over ranks."""
        return _Enter.apply(x, self.ranks)

    def local_bias(self) -> torch.Tensor | None:
        if self.bias is None or isinstance(self.bias, DTensor):
            return None if self.bias is None else _local(self.bias)
        return _Own.apply(self.bias, self.pieces, self.ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks.size}"


class RowLinear(nn.Linear):
    """A linear layer of which each rank has some inputs; the sum over ranks is its output."""

    ranks: _Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features / ranks) -> (..., out_features), the same on all ranks."""
        return self.leave(F.linear(x, _local(self.weight)))

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """The output, of this rank's part of the matrix product."""
        out = _Leave.apply(partial, self.ranks)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks.size}"


class _SharedFeedForward(FeedForward):
    """Each rank has a part of the hidden width; the fused path goes as far as the sum."""

    def is_plain(self) -> bool:
        is_as_made = not has_hooks(self) and "forward" not in self.__dict__
        return is_as_made and is_plain(self[0]) and self._activation() is not None

    def _can_fuse(self, up: Any, activation: Any, down: Any) -> bool:
        are_shared = type(up) is ColumnLinear and type(down) is RowLinear
        return are_shared and not has_hooks(up) and not has_hooks(down) and is_plain(activation)

    def after_norm(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What follows the norm, and residual + tanh(gate) * it if these are given."""
        activation = self._activation()
        if activation is None:
            return super().after_norm(normed, residual, gate)
        up, down = self[1], self[3]
        out = down.leave(
            feed_forward(
                up.enter(normed),
                _local(up.weight),
                up.local_bias(),
                _local(down.weight),
                None,
                activation=activation,
                impl=self.impl,
            )
        )
        if residual is None or gate is None:
            return out
        return gated_residual(residual, out, gate, impl=self.impl)


class _SharedRelativeAttention(RelativeAttention):
    """Its biases are those of a rank's heads."""

    def _biased(self, q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return super()._biased(q, _local(bias))


def parallelize(model: Flamingo, mesh: DeviceMesh) -> None:
    """Splits a model's layers over the ranks of a mesh, in place.

    To be called before `fully_shard`, on whole weights that are the same on all ranks, or on
    "meta". Split are self-attention, cross-attention and feed-forwards of the language model, the
    new layers and the resampler; every rank must be given the same batches.

    Arguments:
        model: with a language model of kind "chinchilla".
        mesh: of one dimension.

    Raises:
        ValueError: a mesh of more dimensions; a model that is sharded already.
        ConfigError: a language model of another kind; heads or hidden widths that the ranks don't
            divide; linear layers that are more than that (LoRA, quantised, hooked), by name.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}")
    ranks = _Ranks(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    if ranks.size == 1:
        return
    if not isinstance(model.lang_model, ChinchillaLM):
        raise ConfigError(
            "parallel.tensor_parallel: expected a language model of kind chinchilla, got "
            f"{type(model.lang_model).__name__}, whose layers we don't split"
        )
    if any(isinstance(each, DTensor) for each in model.parameters()):
        raise ValueError("model: expected whole weights, got some that are sharded already")
    found = list(_layers(model))
    for name, module in found:
        _check(name, module, ranks.size)
    for _, module in found:
        _split(module, mesh, ranks)


def _layers(model: Flamingo) -> Iterator[tuple[str, Any]]:
    """What is split, by name; config's names come first."""
    parts = {"lm": model.lang_model, "conditioning": model.conditioning}
    parts["resampler"] = model.resampler
    for name, part in parts.items():
        for path, module in part.named_modules():
            if type(module) in _BEFORE or type(module) is FeedForward:
                yield f"{name}.{path}", module


def _linears(module: Any) -> dict[str, Any]:
    """A layer's linear layers by name, the one after its middle last."""
    if isinstance(module, FeedForward):
        return {"1": module[1], "3": module[3]}
    return {name: getattr(module, name) for name in (*_BEFORE[type(module)], "to_out")}


def _check(name: str, module: Any, size: int) -> None:
    part = name.partition(".")[0]
    for linear_name, linear in _linears(module).items():
        if not is_plain(linear):
            kinds = {type(each).__name__ for each in (linear, *linear._parameters.values())}
            raise ConfigError(
                f"{name}.{linear_name}: expected a linear layer with whole weights and no hooks to "
                f"split, got {', '.join(sorted(kinds))}"
            )
    if isinstance(module, FeedForward):
        sizes = {"ff_mult": module[1].out_features}
    else:
        sizes = {"heads": module.heads, "kv_heads": getattr(module, "kv_heads", module.heads)}
    for field, number in sizes.items():
        if number % size:
            what = "a hidden width" if field == "ff_mult" else "a number"
            raise ConfigError(
                f"{part}.{field}: expected {what} that parallel.tensor_parallel = {size} divides, "
                f"got {number}"
            )


def _split(module: Any, mesh: DeviceMesh, ranks: _Ranks) -> None:
    linears = _linears(module)
    *before, after = linears
    for name in before:
        pieces = _BEFORE.get(type(module), {}).get(name, 1)
        _split_outputs(linears[name], pieces, mesh, ranks)
    linears[after].__class__, linears[after].ranks = RowLinear, ranks
    _distribute(linears[after], "weight", Shard(1), mesh, ranks)
    if isinstance(module, FeedForward):
        module.__class__ = _SharedFeedForward
        return
    module.heads //= ranks.size
    if hasattr(module, "kv_heads"):
        module.kv_heads //= ranks.size
    if isinstance(module, RelativeAttention):
        for name in ("content_bias", "position_bias"):
            _distribute(module, name, Shard(0), mesh, ranks)
        module.__class__ = _SharedRelativeAttention


def _split_outputs(linear: Any, pieces: int, mesh: DeviceMesh, ranks: _Ranks) -> None:
    linear.__class__, linear.ranks, linear.pieces = ColumnLinear, ranks, pieces
    _distribute(linear, "weight", rows_in_pieces(pieces), mesh, ranks)
    # A bias of several pieces stays whole: FSDP could shard it along no other dimension.
    if linear.bias is not None and pieces == 1:
        _distribute(linear, "bias", rows_in_pieces(1), mesh, ranks)


def _distribute(
    module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh, ranks: _Ranks
) -> None:
    """Replaces a parameter by a DTensor, of this rank's part of it."""
    whole = module._parameters[name]
    assert whole is not None
    with torch.no_grad():
        if placement == Shard(1):
            part = whole.chunk(ranks.size, 1)[ranks.rank]
            local = part.clone(memory_format=torch.contiguous_format)
        else:
            local = _own_rows(whole, getattr(placement, "split_factor", 1), ranks)
        shared = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    module._parameters[name] = nn.Parameter(shared, requires_grad=whole.requires_grad)


def fsdp_placement(parameter: nn.Parameter, *, size: int) -> Shard | None:
    """`shard_placement_fn` of `fully_shard` over `size` ranks, for models that were split.

    Rows of several pieces are no range, so FSDP shards columns there, which it does in equal parts
    alone.

    Raises:
        ConfigError: as many columns as the ranks don't divide.
    """
    if pieces_of(parameter) == 1:
        return None
    if parameter.shape[1] % size:
        raise ConfigError(
            f"parallel.tensor_parallel: with parallel.fsdp, expected data-parallel ranks that "
            f"divide the widths of layers, got {size} and a width of {parameter.shape[1]}"
        )
    return Shard(1)
