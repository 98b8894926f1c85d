"""Layouts, and what their tests compare with."""

import itertools

import torch

from flamingo_fast.layout import MediaLayout
from flamingo_fast.schedule import chunk_rows, num_slots


def locations_of(*samples: str) -> torch.Tensor:
    """ "..i." is a sample whose third of four tokens is an image token."""
    return torch.tensor([[token == "i" for token in sample] for sample in samples])


LOCATIONS = locations_of(".i.i", "i...")
START = torch.zeros(2, 4, dtype=torch.int32)


def assert_schedule(layout: MediaLayout) -> None:
    """Every promise of work_items and split_media, item by item."""
    chunk = chunk_rows(layout.seqlen)
    flat_start = (layout.cu_media[:-1, None] + layout.media_start).flatten()
    attends = (layout.media_end > layout.media_start).flatten()
    expected = torch.where(attends, flat_start, -1).tolist()
    owners: list[int | None] = [None] * len(expected)
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    lengths = []
    rows = None if layout.row_index is None else layout.row_index.tolist()
    for medium, begin, end, slot in layout.work_items.tolist():
        lengths.append(end - begin)
        assert 0 <= begin <= end <= min(begin + chunk * 5 // 4, len(expected))
        assert -1 <= medium < layout.media_total
        if medium >= 0:
            pieces.setdefault(medium, []).append((begin, end, slot))
        else:
            assert slot == -1
        for row in range(begin, end) if rows is None else rows[begin:end]:
            assert owners[row] is None, f"row {row} is in two items"
            owners[row] = medium
    assert owners == expected
    assert lengths == sorted(lengths, reverse=True)
    slots, split = 0, []
    # A medium that nobody attends to has an item too, which writes zeros as its gradients.
    for medium in range(layout.media_total if expected else 0):
        items = sorted(pieces[medium])
        if len(items) == 1:
            assert items[0][2] == -1
            continue
        assert [slot for *_, slot in items] == list(range(slots, slots + len(items)))
        split.append([medium, slots, slots + len(items)])
        slots += len(items)
        *whole, last = [end - begin for begin, end, _ in items]
        assert len(set(whole)) == 1 and whole[0] % 32 == 0 and last <= whole[0] <= chunk
    assert slots <= num_slots(layout.batch_size, layout.seqlen)
    entries = layout.split_media.tolist()
    assert entries[: len(split)] == split
    assert all(medium == -1 for medium, *_ in entries[len(split) :])


def random_mask(seed: int, *shape: int, density: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    mask[:, 1::3] = False
    return mask


def assert_attends_as(layout: MediaLayout, mask: torch.Tensor) -> None:
    """All that a layout says of its tokens, token by token; `mask` is (B, L, max_media) bool."""
    assert torch.equal(layout.to_mask(), mask)
    batch, seqlen, num_media = mask.shape
    starts, ends, attends = (
        tensor.tolist() for tensor in (layout.media_start, layout.media_end, layout.attends())
    )
    bits = None if layout.media_bits is None else layout.media_bits.tolist()
    for sample, token in itertools.product(range(batch), range(seqlen)):
        media = [m for m in range(num_media) if mask[sample, token, m]]
        start, end = starts[sample][token], ends[sample][token]
        assert attends[sample][token] == bool(media)
        assert (start, end) == (media[0], media[-1] + 1) if media else start == end
        if bits is not None:
            words = bits[sample][token]
            assert [m for m in range(64 * len(words)) if words[m // 64] >> m % 64 & 1] == media
    assert_media_rows(layout, mask)
    if layout.max_media_per_token <= 1:
        assert_schedule(layout)
    layout.validate()


def assert_media_rows(layout: MediaLayout, mask: torch.Tensor, exact: bool = False) -> None:
    """Every row that attends is inside; if `exact`, the first and the last are the bounds."""
    batch, seqlen, _ = mask.shape
    bounds = layout.media_rows.tolist()
    assert len(bounds) == layout.media_total and layout.media_rows.dtype == torch.int32
    offsets = layout.cu_media.tolist()
    for sample in range(batch):
        for medium in range(offsets[sample + 1] - offsets[sample]):
            begin, end = bounds[offsets[sample] + medium]
            assert 0 <= begin <= max(begin, end) <= batch * seqlen
            rows = [sample * seqlen + t for t in range(seqlen) if mask[sample, t, medium]]
            assert all(begin <= row < end for row in rows)
            if exact:
                assert (begin, end) == (rows[0], rows[-1] + 1) if rows else begin == end
