"""Bytes and products of the kernels of a resampler's attention, launch by launch.

Written from what each launch has to do, with its configuration as an argument: nothing here repeats
how that is chosen. Loads are counted as lanes ask for them. Left out are the media's lengths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flamingo_fast.bench.work import Work


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call: its sizes, bytes of an element, and of each medium the features that are valid."""

    batch: int
    latents: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    lengths: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Of a medium that share a key/value head."""
        return self.latents * self.heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.itemsize

    @property
    def lse_bytes(self) -> int:
        return 8 if self.itemsize == 4 else 4

    def valid_keys(self) -> list[int]:
        lengths = (self.num_keys,) * self.batch if self.lengths is None else self.lengths
        return [min(max(length, 0), self.num_keys) for length in lengths]


def _walk(call: Attention, constexprs: Mapping[str, Any], dots: int, keys: int) -> Work:
    """Keys of one source that the blocks of rows of a medium load and multiply."""
    block_m, block_n = constexprs["BLOCK_M"], constexprs["BLOCK_N"]
    blocks = -(-call.rows // block_m)
    flops = dots * 2 * block_m * block_n * constexprs["BLOCK_D"]
    return Work(blocks * 2 * keys * call.row_bytes, 0, 0, blocks * -(-keys // block_n) * flops)


def _valid_of_split(valid: int, split: int, num_splits: int, keys: int) -> int:
    return valid if num_splits == 1 else min(max(valid - split * keys, 0), keys)


def forward_work(call: Attention, constexprs: Mapping[str, Any], num_splits: int) -> Work:
    """The forward and, of split keys, the kernel that combines the splits.

    Arguments:
        constexprs: of the first launch.
        num_splits: the size of its grid's second dimension.
    """
    rows = call.rows
    log_sums = call.lse_bytes if constexprs["STORE_LSE"] else 0
    total = Work(0, call.batch * rows * (call.row_bytes + log_sums), 0)
    for valid in call.valid_keys():
        for split in range(num_splits):
            media = _valid_of_split(valid, split, num_splits, constexprs["SPLIT_KEYS"])
            latents = call.latents if split == num_splits - 1 else 0
            total += Work(rows * call.row_bytes, 0, 0)
            total += _walk(call, constexprs, 2, media) + _walk(call, constexprs, 2, latents)
            if num_splits > 1:
                sums = rows * call.head_dim * 4 if media + latents else 0
                total += Work(rows * 8 + sums, rows * 8 + sums, 0)
    return total * call.kv_heads


def backward_work(call: Attention, constexprs: Mapping[str, Any], num_splits: int) -> Work:
    """The one pass, or that for dQ, and of split keys the kernel that adds their dQ.

    Arguments:
        constexprs, num_splits: as in `forward_work`.
    """
    need_dq = constexprs["NEED_DQ"]
    needs = constexprs["NEED_DMEDIA"], constexprs["NEED_DLATENTS"]
    rows, total = call.rows, Work(0, 0, 0)
    delta = 4 if constexprs["STORE_DELTA"] else 0
    for valid in call.valid_keys():
        total += Work(0, rows * (delta + (call.row_bytes if need_dq else 0)), 0)
        for split in range(num_splits):
            media = _valid_of_split(valid, split, num_splits, constexprs["SPLIT_KEYS"])
            latents = call.latents if split == num_splits - 1 else 0
            total += Work(2 * rows * call.row_bytes, 0, 0)
            if need_dq or any(needs):
                total += Work(rows * (call.row_bytes + call.lse_bytes), 0, 0)
            for keys, need in zip((media, latents), needs, strict=True):
                if need_dq or need:
                    dots = 2 + 2 * need + need_dq
                    total += _walk(call, constexprs, dots, keys)
            if num_splits > 1 and need_dq:
                sums = rows * call.head_dim * 4
                total += Work(sums, sums, 0)
        stored = needs[0] * call.num_keys + needs[1] * call.latents
        total += Work(0, 2 * stored * call.row_bytes, 0)
    return total * call.kv_heads


def dkv_work(call: Attention, constexprs: Mapping[str, Any]) -> Work:
    """The second of two passes."""
    block_m, block_n = constexprs["BLOCK_M"], constexprs["BLOCK_N"]
    per_row = 2 * call.row_bytes + call.lse_bytes + 4
    flops = -(-call.rows // block_m) * 4 * 2 * block_m * block_n * constexprs["BLOCK_D"]
    total = Work(0, 0, 0)
    for valid in call.valid_keys():
        sources = []
        if constexprs["NEED_DMEDIA"]:
            sources.append((valid, call.num_keys))
        if constexprs["NEED_DLATENTS"]:
            sources.append((call.latents, call.latents))
        for loaded, stored in sources:
            tiles = -(-loaded // block_n)
            total += Work(
                2 * loaded * call.row_bytes + tiles * call.rows * per_row,
                2 * stored * call.row_bytes,
                0,
                tiles * flops,
            )
    return total * call.kv_heads
