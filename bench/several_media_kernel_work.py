"""Bytes and products of the kernels of attention to several media, launch by launch.

Written from what each launch has to do, with its configuration as an argument: nothing here repeats
how that is chosen. Loads are counted as lanes ask for them. Left out are a program's own numbers:
its sample's media and their lengths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from flamingo_fast.bench.work import Work
from flamingo_fast.layout import MediaLayout


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call: its layout, on a CPU, its sizes and types.

    dense: rows that attend to nothing attend to everything, but for rows past the last medium.
    """

    layout: MediaLayout
    heads: int
    kv_heads: int
    head_dim: int
    num_keys: int
    itemsize: int
    dense: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.itemsize

    @property
    def lse_bytes(self) -> int:
        return 8 if self.itemsize == 4 else 4

    @property
    def packed_rows(self) -> int:
        return self.layout.seqlen * self.group

    def mask_bytes(self, words: int) -> int:
        """An interval of media of a row, and `words` of bits."""
        return 8 + (0 if self.layout.media_bits is None else 8 * words)

    def num_media(self, sample: int) -> int:
        return int(self.layout.cu_media[sample + 1] - self.layout.cu_media[sample])

    def dense_rows(self, sample: int) -> torch.Tensor:
        """(L,) bool."""
        if not self.dense:
            return torch.zeros(self.layout.seqlen, dtype=torch.bool)
        return ~self.layout.attends()[sample] & ~self.layout.past_last()[sample]

    def attended(self, sample: int) -> torch.Tensor:
        """(L, N) bool."""
        mask = self.layout.to_mask()[sample, :, : self.num_media(sample)]
        return mask | self.dense_rows(sample)[:, None]

    def valid_keys(self, sample: int) -> torch.Tensor:
        """(N,) of the media of a sample."""
        first, last = self.layout.cu_media[sample : sample + 2].tolist()
        if self.layout.media_seqlens is None:
            return torch.full((last - first,), self.num_keys)
        return self.layout.media_seqlens[first:last].clamp(0, self.num_keys).long()


def _words(media: torch.Tensor) -> int:
    """Words of 64 media between the first and the last of those."""
    index = media.nonzero()[:, 0]
    return 0 if len(index) == 0 else int(index[-1] // 64 - index[0] // 64 + 1)


def _tiles(media: torch.Tensor, keys: torch.Tensor, constexprs: Mapping[str, Any]) -> int:
    """Tiles of the first `keys` keys of `media`, both (N,)."""
    block, num_keys = constexprs["BLOCK_N"], constexprs["NUM_KEYS"]
    if not constexprs["CROSS_MEDIA"]:
        return int(((keys + block - 1) // block)[media].sum())
    tiles = set()
    for medium in (media & (keys > 0)).nonzero()[:, 0].tolist():
        word, first = medium // 64, medium % 64 * num_keys
        tiles |= {
            (word, tile) for tile in range(first // block, (first + num_keys - 1) // block + 1)
        }
    return len(tiles)


def _walk(
    call: Attention, constexprs: Mapping[str, Any], dots: int, split: tuple[int, int, int, int]
) -> Work:
    """The keys that blocks of rows of one key/value head load and multiply, and the rows' bits.

    split: first and end medium of a sample, first and end key of a medium.
    """
    first_medium, end_medium, first_key, end_key = split
    block_m, block_n = constexprs["BLOCK_M"], constexprs["BLOCK_N"]
    flops = dots * 2 * block_m * block_n * constexprs["BLOCK_D"]
    total = Work(0, 0, 0)
    for sample in range(call.layout.batch_size):
        inside = torch.zeros(call.num_media(sample), dtype=torch.bool)
        inside[first_medium:end_medium] = True
        attended = call.attended(sample).repeat_interleave(call.group, 0) & inside
        dense = call.dense_rows(sample).repeat_interleave(call.group)
        for begin in range(0, call.packed_rows, block_m):
            rows = slice(begin, begin + block_m)
            media = attended[rows].any(0)
            keys = call.valid_keys(sample)
            if dense[rows].any():
                keys = torch.full_like(keys, call.num_keys)
            keys = (keys.clamp(max=end_key) - first_key).clamp(min=0)
            bits = call.mask_bytes(_words(media)) - call.mask_bytes(0)
            total += Work(
                2 * int(keys[media].sum()) * call.row_bytes + len(attended[rows]) * bits,
                0,
                0,
                _tiles(media, keys, constexprs) * flops,
            )
    return total


def forward_work(call: Attention, constexprs: Mapping[str, Any], num_splits: int) -> Work:
    """The forward and, of split keys, the kernel that combines the splits.

    Arguments:
        constexprs: of the first launch.
        num_splits: the size of its grid's second dimension.
    """
    rows = call.layout.batch_size * call.packed_rows
    log_sums = call.lse_bytes if constexprs["STORE_LSE"] else 0
    out = Work(0, rows * (call.row_bytes + log_sums), 0)
    per_row = call.row_bytes + call.mask_bytes(0)
    if num_splits == 1:
        everything = (0, call.layout.max_media, 0, call.num_keys)
        total = out + Work(rows * per_row, 0, 0) + _walk(call, constexprs, 2, everything)
        return total * call.kv_heads
    total = out
    media, keys = constexprs["SPLIT_MEDIA"], constexprs["SPLIT_KEYS"]
    pieces = -(-call.num_keys // keys)
    for split in range(num_splits):
        first, first_key = split // pieces * media, split % pieces * keys
        total += _walk(call, constexprs, 2, (first, first + media, first_key, first_key + keys))
        attending = 0
        for sample in range(call.layout.batch_size):
            valid = call.valid_keys(sample).expand(call.layout.seqlen, -1)
            valid = torch.where(call.dense_rows(sample)[:, None], call.num_keys, valid)
            some = (call.attended(sample) & (valid > first_key))[:, first : first + media]
            attending += int(some.any(1).sum()) * call.group
        sums = attending * call.head_dim * 4
        total += Work(rows * per_row, rows * 8 + sums, 0) + Work(rows * 8 + sums, 0, 0)
    return total * call.kv_heads


def dq_work(call: Attention, constexprs: Mapping[str, Any]) -> Work:
    rows = call.layout.batch_size * call.packed_rows
    total = Work(2 * rows * call.row_bytes, 4 * rows if constexprs["NEED_DKV"] else 0, 0)
    if constexprs["NEED_DQ"]:
        per_row = call.row_bytes + call.lse_bytes + call.mask_bytes(0)
        total += Work(rows * per_row, rows * call.row_bytes, 0)
        total += _walk(call, constexprs, 3, (0, call.layout.max_media, 0, call.num_keys))
    return total * call.kv_heads


def dkv_work(call: Attention, constexprs: Mapping[str, Any]) -> Work:
    block_m, block_n = constexprs["BLOCK_M"], constexprs["BLOCK_N"]
    per_row = 2 * call.row_bytes + call.lse_bytes + 4 + call.mask_bytes(1)
    flops = 4 * 2 * block_m * block_n * constexprs["BLOCK_D"]
    total = Work(0, 2 * call.layout.media_total * call.num_keys * call.row_bytes, 0)
    for sample in range(call.layout.batch_size):
        first, last = call.layout.cu_media[sample : sample + 2].tolist()
        bounds = call.layout.media_rows[first:last] - sample * call.layout.seqlen
        valid = call.valid_keys(sample)
        valid = torch.where(bounds[:, 0] < bounds[:, 1], valid, 0)
        if call.dense:
            bounds, valid = torch.zeros_like(bounds), torch.full_like(valid, call.num_keys)
            bounds[:, 1] = call.layout.seqlen
        total += Work(2 * int(valid.sum()) * call.row_bytes, 0, 0)
        for media in _key_blocks(valid, constexprs):
            begin, end = int(bounds[media, 0].min()), int(bounds[media, 1].max())
            rows = (end - begin) * call.group
            total += Work(rows * per_row, 0, 0, -(-rows // block_m) * flops)
    return total * call.kv_heads


def _key_blocks(valid: torch.Tensor, constexprs: Mapping[str, Any]) -> list[list[int]]:
    """The media of each block of keys that has valid ones; `valid` (N,): of each medium."""
    block, num_keys = constexprs["BLOCK_N"], constexprs["NUM_KEYS"]
    if not constexprs["CROSS_MEDIA"]:
        return [
            [medium] for medium, keys in enumerate(valid.tolist()) for _ in range(0, keys, block)
        ]
    blocks: dict[tuple[int, int], set[int]] = {}
    loaded: set[tuple[int, int]] = set()
    for medium, keys in enumerate(valid.tolist()):
        for key in range(num_keys if keys else 0):
            column = (medium // 64, (medium % 64 * num_keys + key) // block)
            blocks.setdefault(column, set()).add(medium)
            if key < keys:
                loaded.add(column)
    return [sorted(media) for column, media in sorted(blocks.items()) if column in loaded]


def dense_mask_work(call: Attention, kernel: str, constexprs: Mapping[str, Any]) -> Work:
    """What a kernel of the same tiles would do that meets all keys, but for its mask's bytes.

    Arguments:
        kernel: "forward", "dq" or "dkv".
    """
    batch, rows = call.layout.batch_size, call.packed_rows
    keys = call.layout.max_media * call.num_keys
    log_sums = call.lse_bytes if kernel != "forward" or constexprs["STORE_LSE"] else 0
    if kernel == "dkv":
        blocks = -(-keys // constexprs["BLOCK_N"])
        per_row = 2 * call.row_bytes + log_sums + 4
        loaded = 2 * keys * call.row_bytes + blocks * rows * per_row
        stored = 2 * keys * call.row_bytes
    else:
        blocks = -(-rows // constexprs["BLOCK_M"])
        loaded = blocks * 2 * keys * call.row_bytes
        loaded += rows * (call.row_bytes if kernel == "forward" else 3 * call.row_bytes + log_sums)
        stored = rows * (call.row_bytes + (log_sums if kernel == "forward" else 4))
    return Work(loaded, stored, 0) * batch * call.kv_heads
