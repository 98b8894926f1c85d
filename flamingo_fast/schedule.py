"""The schedules of a MediaLayout: which rows attend to a medium, and the kernels' work items.

Made by sorted searches over the rows: nothing is read back from a GPU.
"""

import torch

# The most rows of a tile of a one-medium kernel; pieces of split media are multiples of it.
TILE_ROWS = 32


def chunk_rows(seqlen: int) -> int:
    """Rows of a piece of a split medium at most, in rows of `seqlen` text tokens.

    A medium is split from five quarters of this on. Of the media of random image positions the
    longest has several times the mean, and a GPU waits for it; but each piece of a split medium
    reads K and V again, and its fp32 sums of dK and dV are written and read. A sixteenth of a row
    keeps both, and the memory for those sums, small.
    """
    # Not by bit_length: torch.compile would make a graph for every sixteen tokens.
    rows = 128
    while 16 * rows < seqlen:
        rows *= 2
    return rows


def num_slots(batch: int, seqlen: int) -> int:
    """Work items of split media at most: two for each whole chunk of a medium."""
    chunk = chunk_rows(seqlen)
    return 2 * batch * (seqlen // chunk) if seqlen > chunk + chunk // 4 else 0


def one_medium_schedule(
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_total: int,
    in_order: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(work_items, split_media, row_index, media_rows), where a token attends to one medium.

    Segments are the rows of each medium, then runs of rows without one. Their number and that of
    their pieces are bounds from shapes.

    Arguments:
        in_order: the media of a sample's tokens never go back, rows without one included.
    """
    batch, seqlen = media_start.shape
    rows, chunk, device = batch * seqlen, chunk_rows(seqlen), media_start.device
    media = torch.arange(media_total, dtype=torch.int32, device=device)
    first, attends = cu_media[:-1, None], media_end > media_start
    row_index = None
    if in_order:
        # Sorted as they are: 2 * g + 1 for rows of medium g, 2 * g for rows just before those.
        keys = (2 * (first + media_start) + attends).flatten()
        wanted = torch.cat([2 * media + 1, 2 * cu_media])
    else:
        flat = first + media_start
        # Values that nobody validated: a row that attends to what there is not attends to nothing.
        exists = attends & (flat >= 0) & (flat < media_total)
        keys, order = torch.sort(torch.where(exists, flat, media_total).flatten(), stable=True)
        row_index = order.int()
        wanted = torch.arange(media_total + 1, dtype=torch.int32, device=device)
    begin = torch.searchsorted(keys, wanted, out_int32=True)
    end = torch.searchsorted(keys, wanted, right=True, out_int32=True)
    if in_order:
        # The rows between two samples once, even if the samples between them have no media.
        end[media_total:-1] = torch.where(
            cu_media[1:] == cu_media[:-1], begin[media_total:-1], end[media_total:-1]
        )
    bounds = torch.stack([begin[:media_total], end[:media_total]], 1)
    if row_index is not None and rows > 0:
        bounds[:, 1] -= 1
        bounds = row_index[bounds.clamp_(0, rows - 1)]
        bounds[:, 1] += 1
    first_row = _sample_of(media, cu_media)[:, None] * seqlen
    media_rows = torch.where((end > begin)[:media_total, None], bounds, first_row)
    num_segments = len(wanted)
    medium = torch.full_like(begin, -1)
    medium[:media_total] = media
    pieces = torch.where(
        end - begin > chunk + chunk // 4,
        (end - begin + (chunk - 1)) // chunk,
        (end > begin).int(),
    )
    # Media without rows have an item too, which writes their gradients: zeros.
    pieces[:media_total].clamp_(min=1)
    cu_items = pieces.cumsum(0, dtype=torch.int32)
    item = torch.arange(num_segments + rows // chunk, dtype=torch.int32, device=device)
    segment = torch.searchsorted(cu_items, item, right=True, out_int32=True)
    used = segment < num_segments
    segment = torch.where(used, segment, 0)
    piece = item - (cu_items - pieces)[segment]
    # Of equal size, but for whole tiles of the kernels.
    piece_rows = (end - begin + (pieces - 1)) // pieces.clamp(min=1)
    piece_rows = (piece_rows + (TILE_ROWS - 1)) // TILE_ROWS * TILE_ROWS
    item_begin = begin[segment] + piece * piece_rows[segment]
    item_end = torch.minimum(item_begin + piece_rows[segment], end[segment])
    is_split = pieces[:media_total] > 1
    cu_slots = torch.where(is_split, pieces[:media_total], 0).cumsum(0, dtype=torch.int32)
    first_slot = torch.full_like(pieces, -1)
    first_slot[:media_total] = torch.where(is_split, cu_slots - pieces[:media_total], -1)
    slot = torch.where(first_slot[segment] >= 0, first_slot[segment] + piece, -1)
    items = torch.stack(
        [
            torch.where(used, medium[segment], -1),
            torch.where(used, item_begin, 0),
            torch.where(used, item_end, 0),
            torch.where(used, slot, -1),
        ],
        1,
    )
    longest_first = torch.sort(items[:, 2] - items[:, 1], descending=True, stable=True).indices
    entries = min(num_slots(batch, seqlen) // 2, media_total)
    entry = torch.arange(1, entries + 1, dtype=torch.int32, device=device)
    index = torch.searchsorted(is_split.cumsum(0, dtype=torch.int32), entry, out_int32=True)
    found = index < media_total
    index = torch.where(found, index, 0)
    split_media = torch.stack(
        [torch.where(found, index, -1), first_slot[index], cu_slots[index]], 1
    )
    return items[longest_first], split_media, row_index, media_rows


def several_media_rows(
    media_start: torch.Tensor,
    media_end: torch.Tensor,
    cu_media: torch.Tensor,
    media_total: int,
    max_media: int,
) -> torch.Tensor:
    """media_rows, where a token attends to several media.

    The rows between the first and the last that may attend to a medium: exact where the media of
    later tokens don't go back, otherwise with rows between them that do not.
    """
    batch, seqlen = media_start.shape
    device = media_start.device
    if media_total == 0 or seqlen == 0 or max_media == 0:
        return torch.zeros(media_total, 2, dtype=torch.int32, device=device)
    attends = media_end > media_start
    rows = torch.arange(seqlen, dtype=torch.int32, device=device).expand(batch, seqlen)
    earliest, latest = torch.where(attends, rows, seqlen), torch.where(attends, rows, -1)

    def by_medium(media: torch.Tensor, values: torch.Tensor, reduce: str) -> torch.Tensor:
        table = torch.full_like(values[:, :1], seqlen if reduce == "amin" else -1)
        table = table.repeat(1, max_media)
        return table.scatter_reduce_(1, media.long().clamp_(0, max_media - 1), values, reduce)

    # A row that attends to medium m starts at m or before it, and ends after it.
    last_medium = media_end - 1
    first = torch.maximum(
        by_medium(media_start, earliest, "amin").cummin(1).values,
        by_medium(last_medium, earliest, "amin").flip(1).cummin(1).values.flip(1),
    )
    last = torch.minimum(
        by_medium(media_start, latest, "amax").cummax(1).values,
        by_medium(last_medium, latest, "amax").flip(1).cummax(1).values.flip(1),
    )
    media = torch.arange(media_total, dtype=torch.int32, device=device)
    sample = _sample_of(media, cu_media)
    index = (media - cu_media[sample]).clamp_(0, max_media - 1)
    bounds = torch.stack([first[sample, index], last[sample, index] + 1], 1)
    bounds = torch.where(bounds[:, :1] < bounds[:, 1:], bounds, 0)
    return bounds + (sample * seqlen)[:, None]


def _sample_of(media: torch.Tensor, cu_media: torch.Tensor) -> torch.Tensor:
    sample = torch.searchsorted(cu_media[1:], media, right=True, out_int32=True)
    return sample.clamp_(max=max(len(cu_media) - 2, 0))
