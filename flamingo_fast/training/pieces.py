"""Weights whose rows are several projections, one after another, with a part of each on a rank.

Rows of (q, k, v) by heads are such: a rank's local tensor is no range of the whole, but one of each
piece. DTensor has a placement for it, `_StridedShard`, with which arithmetic is right, but
`full_tensor` of PyTorch 2.11 refuses it, and torch.distributed.checkpoint takes every local tensor
for one range and writes rows to wrong places.
"""

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


def rows_in_pieces(pieces: int) -> Placement:
    """The placement of rows that are so many pieces, each shared by all ranks."""
    return Shard(0) if pieces == 1 else _StridedShard(0, split_factor=pieces)


def pieces_of(tensor: torch.Tensor) -> int:
    """Of how many ranges of rows a rank has a part: 1 unless it was placed by `rows_in_pieces`."""
    index = _in_pieces(tensor)
    return 1 if index is None else tensor.placements[index].split_factor  # type: ignore[attr-defined]


def _in_pieces(tensor: torch.Tensor) -> int | None:
    """Which mesh dimension shares pieces.

    FSDP has the same placement for rows that tensor parallelism splits once more afterwards: of
    these each rank has one range.
    """
    if not isinstance(tensor, DTensor):
        return None
    for index, placement in enumerate(tensor.placements):
        if isinstance(placement, _StridedShard):
            after = tensor.placements[index + 1 :]
            if not any(isinstance(each, Shard) and each.dim == placement.dim for each in after):
                return index
    return None


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank; ranks must call this together. A plain tensor is whole already."""
    if not isinstance(tensor, DTensor):
        return tensor
    index = _in_pieces(tensor)
    if index is None:
        return tensor.full_tensor()
    # Gathered as if it were a range, the rows are each rank's pieces, rank after rank.
    mesh, placements = tensor.device_mesh, [*tensor.placements]
    placements[index] = Shard(0)
    ranges = DTensor.from_local(
        tensor.to_local(),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    parts = ranges.full_tensor().unflatten(0, (mesh.size(index), pieces_of(tensor), -1))
    return parts.transpose(0, 1).flatten(0, 2)


def checkpointable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or in its place one that torch.distributed.checkpoint writes and reads rightly.

    What is read is written into the memory of `tensor`.

    Raises:
        NotImplementedError: pieces whose rows are sharded once more.
    """
    return tensor if _in_pieces(tensor) is None else _Pieces(tensor)


class _Pieces(torch.Tensor):
    """Not a tensor to compute with: its shape is the whole's, its memory is a DTensor's.

    torch.distributed.checkpoint asks a tensor that has the three methods below what it consists of.
    """

    _chunks: list[tuple[ChunkStorageMetadata, torch.Tensor]]

    @staticmethod
    def __new__(cls, tensor: Any) -> "_Pieces":
        made = torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )
        made._chunks = _chunks(tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func}: of pieces that are only to be saved and loaded")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"_Pieces(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(local),
                    size=self.shape,
                ),
            )
            for chunk, local in self._chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for chunk, local in self._chunks:
            if chunk.offsets == index.offset:
                return local
        raise ValueError(f"{index.fqn}: no piece of this rank is at {index.offset}")


def _chunks(tensor: DTensor) -> list[tuple[ChunkStorageMetadata, torch.Tensor]]:
    """This rank's ranges of the whole, with their memory."""
    mesh_dim, mesh = _in_pieces(tensor), tensor.device_mesh
    assert mesh_dim is not None
    local = tensor._local_tensor.detach()
    pieces, sizes = pieces_of(tensor), [*local.shape]
    offsets = [0] * tensor.ndim
    for dim, placement in enumerate(tensor.placements):
        if dim == mesh_dim or not isinstance(placement, Shard | _StridedShard):
            continue
        size = tensor.shape[placement.dim] // mesh.size(dim)
        if placement.dim == 0 or size != sizes[placement.dim] or offsets[placement.dim]:
            raise NotImplementedError(
                f"{tuple(tensor.placements)}: expected pieces of rows, and another dimension in "
                "equal parts"
            )
        offsets[placement.dim] = mesh.get_local_rank(dim) * size
    sizes[0] //= pieces
    result = []
    for piece, part in enumerate(local.split(sizes[0])):
        offsets[0] = (piece * mesh.size(mesh_dim) + mesh.get_local_rank(mesh_dim)) * sizes[0]
        result.append((ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), part))
    return result
