"""Blocks of rows that attend to the same keys, or nearly, and the ranges of keys of each.

Found from a layout's tensors on a CPU, for `cpu_several_media`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import torch

from flamingo_fast.ops.cpu_buffers import valid_lengths

# Blocks of rows that attend to different media: rows at most, and what a block takes, in units of
# one row and one key. A call costs as much as so many more rows and keys.
_MIXED_ROWS, _ROWS_OF_A_CALL, _KEYS_OF_A_CALL, _COST_OF_A_MASK = 256, 32, 64, 1.125
# Rows that attend to nothing interrupt blocks; more often than that, the other rows are gathered.
_INTERRUPTIONS = 4
# Media in one word of a set, which is then a positive int64.
_WORD = 62

# Medium (of its sample), first and end key (of all samples).
Part = tuple[int, int, int]


@dataclasses.dataclass
class Block:
    """Consecutive rows of a sample, and the media that any of them attends to, as bits."""

    begin: int
    end: int
    media: int
    dense: bool
    mixed: bool = False

    def cost(self, num_keys: int) -> float:
        keys = self.media.bit_count() * num_keys
        cost = (self.end - self.begin + _ROWS_OF_A_CALL) * (keys + _KEYS_OF_A_CALL)
        return cost * _COST_OF_A_MASK if self.mixed else cost

    def attends(self, medium: int) -> bool:
        return bool(self.media >> medium & 1)


@dataclasses.dataclass
class Sample:
    """A sample's rows in blocks; rows that attend to nothing are in none.

    rows: (rows,) the rows that blocks and `attends` count; None: all.
    attends: (rows, N) bool.
    parts: the valid keys of each medium that has any; padding: the others.
    """

    index: int
    rows: torch.Tensor | None
    attends: torch.Tensor
    blocks: list[Block]
    parts: list[Part]
    padding: list[Part]

    def of(self, tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """The sample's rows of (B, L, H, ...) as (rows, Hkv, G, ...)."""
        tensor = tensor[self.index]
        if self.rows is not None:
            tensor = tensor[self.rows]
        return tensor.unflatten(1, (kv_heads, -1))

    def parts_of(self, block: Block) -> list[Part]:
        """The keys that a block's rows attend to, in the order of memory."""
        parts = [part for part in self.parts if block.attends(part[0])]
        return sorted(parts + self.padding) if block.dense else parts

    def attended(self) -> list[tuple[int, int]]:
        """Ranges of the keys that any row attends to, in order."""
        everything = functools.reduce(lambda media, block: media | block.media, self.blocks, 0)
        dense = any(block.dense for block in self.blocks)
        parts = self.parts_of(Block(0, 0, everything, dense))
        return [(begin, end) for _, begin, end in joined_parts(parts)]

    def columns(self, block: Block, parts: list[Part], group: int) -> torch.Tensor | None:
        """(rows * G, keys) bool: the keys of `parts` that rows attend to; None: to all."""
        if not block.mixed:
            return None
        attends = self.attends[block.begin : block.end, [medium for medium, *_ in parts]]
        if attends.all():
            return None
        lengths = [end - begin for _, begin, end in parts]
        if min(lengths) == max(lengths):
            attends = attends[..., None].expand(-1, -1, lengths[0]).flatten(1)
        else:
            attends = attends.repeat_interleave(torch.tensor(lengths), 1)
        return attends if group == 1 else attends.repeat_interleave(group, 0)


def samples_of(
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    media_bits: torch.Tensor | None,
    dense: bool,
    num_keys: int,
    most_rows: int,
) -> Iterator[Sample]:
    """Samples with a row that attends to something; `most_rows` of a block."""
    for index, (first, last) in enumerate(itertools.pairwise(cu_media.tolist())):
        media = torch.arange(last - first)
        start, end = media_start[index, :, None], media_end[index, :, None]
        attends = (media >= start) & (media < end)
        if media_bits is not None:
            attends &= (media_bits[index][:, media // 64] >> media % 64 & 1).bool()
        seqlens = None if media_seqlens is None else media_seqlens[first:last]
        if seqlens is not None:
            attends &= seqlens > 0
        lengths = valid_lengths(seqlens, len(media), num_keys)
        some = attends.any(1)
        is_dense = torch.zeros_like(some)
        if dense:
            is_dense = (~some[:, None] & ((start != len(media)) | (end != len(media))))[:, 0]
            attends |= is_dense[:, None]
            some = attends.any(1)
        if not some.any():
            continue
        rows = None
        if (some[1:] < some[:-1]).sum() > _INTERRUPTIONS:
            rows = some.nonzero()[:, 0]
            attends, is_dense = attends[rows], is_dense[rows]
        keys = [(first + medium) * num_keys for medium in range(len(media))]
        whole = list(zip(range(len(media)), keys, lengths, strict=True))
        yield Sample(
            index,
            rows,
            attends,
            _blocks(attends, is_dense, num_keys, most_rows),
            [(medium, key, key + length) for medium, key, length in whole if length > 0],
            [
                (medium, key + length, key + num_keys)
                for medium, key, length in whole
                if length < num_keys
            ],
        )


def _blocks(
    attends: torch.Tensor, is_dense: torch.Tensor, num_keys: int, most_rows: int
) -> list[Block]:
    changes = (attends[1:] != attends[:-1]).any(1) | (is_dense[1:] != is_dense[:-1])
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), changes.nonzero()[:, 0] + 1])
    place = 2 ** torch.arange(_WORD)
    words = [(word * place[: word.shape[1]]).sum(1) for word in attends[begins].split(_WORD, 1)]
    blocks: list[Block] = []
    runs = zip(
        itertools.pairwise([*begins.tolist(), len(attends)]),
        torch.stack(words, 1).tolist(),
        is_dense[begins].tolist(),
        strict=True,
    )
    for (first, last), words_of_run, dense in runs:
        media = sum(word << _WORD * place for place, word in enumerate(words_of_run))
        if media == 0:
            continue
        for begin in range(first, last, most_rows):
            block = Block(begin, min(begin + most_rows, last), media, dense)
            before = blocks[-1] if blocks else block
            both = Block(before.begin, block.end, before.media | media, dense, mixed=True)
            if (
                before.end == block.begin
                and not before.dense
                and not dense
                and block.end - before.begin <= min(_MIXED_ROWS, most_rows)
                and both.cost(num_keys) <= before.cost(num_keys) + block.cost(num_keys)
            ):
                blocks[-1] = both
            else:
                blocks.append(block)
    return blocks


def cut_parts(parts: Iterable[Part], length: int) -> list[Part]:
    """The same keys in the same order, at most `length` of them in a part."""
    return [
        (medium, key, min(key + length, end))
        for medium, begin, end in parts
        for key in range(begin, end, length)
    ]


def grouped_parts(parts: Iterable[Part], most_keys: int) -> Iterator[list[Part]]:
    """Several parts of `most_keys` together, or one part."""
    group: list[Part] = []
    total = 0
    for part in parts:
        keys = part[2] - part[1]
        if group and total + keys > most_keys:
            yield group
            group, total = [], 0
        group.append(part)
        total += keys
    if group:
        yield group


def joined_parts(parts: Iterable[Part]) -> list[Part]:
    """Parts that are neighbours in memory as one, of the first one's medium."""
    joined: list[Part] = []
    for medium, begin, end in parts:
        if joined and joined[-1][2] == begin:
            joined[-1] = (*joined[-1][:2], end)
        else:
            joined.append((medium, begin, end))
    return joined


def gathered_keys(tensor: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    """The keys of the parts, (keys, Hkv, D); a view if they are neighbours."""
    ranges = [tensor[begin:end] for _, begin, end in joined_parts(parts)]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)
