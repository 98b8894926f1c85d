"""MediaLayout of masks and of masks of tiles, against loops over tokens."""

import dataclasses
import random

import pytest
import torch
from layout_cases import assert_attends_as, assert_media_rows, locations_of, random_mask

from flamingo_fast.layout import ATTEND, MediaLayout
from flamingo_fast.schedule import one_medium_schedule, several_media_rows
from flamingo_fast.testing import peers

IMAGE, EOS, TEXT = 7, 2, 5


def _ids(sample: str) -> list[int]:
    return [{"i": IMAGE, "e": EOS}.get(token, TEXT) for token in sample]


def _one_hot(media: list[list[int]], num_media: int) -> torch.Tensor:
    """-1: the token attends to none."""
    return torch.tensor([[[m == t for m in range(num_media)] for t in row] for row in media])


@pytest.mark.parametrize("density", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_media", [0, 1, 63, 64, 65, 130])
def test_any_mask(num_media, density):
    mask = random_mask(num_media, 2, 11, num_media, density=density)
    layout = MediaLayout.from_media_mask(mask)
    assert (layout.max_media_per_token, layout.max_media) == (max(num_media, 2), num_media)
    assert layout.media_total == 2 * num_media
    assert layout.media_start.dtype == layout.media_end.dtype == torch.int32
    assert layout.media_bits.shape == (2, 11, -(-num_media // 64))
    assert layout.media_bits.dtype == torch.int64
    assert not layout.past_last().any()
    assert_attends_as(layout, mask)


def test_the_first_and_the_last_bit_of_a_word():
    mask = torch.zeros(1, 5, 129, dtype=torch.bool)
    for token, media in enumerate([[0], [63], [64], [63, 128], []]):
        mask[0, token, media] = True
    layout = MediaLayout.from_media_mask(mask)
    lowest, highest = 1, -(2**63)
    assert layout.media_bits[0].tolist() == [
        [lowest, 0, 0],
        [highest, 0, 0],
        [0, lowest, 0],
        [highest, 0, lowest],
        [0, 0, 0],
    ]
    assert layout.media_start.tolist() == [[0, 63, 64, 63, 0]]
    assert layout.media_end.tolist() == [[1, 64, 65, 129, 0]]
    assert_attends_as(layout, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_dtypes_of_masks(dtype):
    mask = random_mask(3, 2, 6, 4)
    values = mask.to(dtype) if dtype == torch.bool else mask.to(dtype) * 3
    given = values.clone()
    assert MediaLayout.from_media_mask(values) == MediaLayout.from_media_mask(mask)
    assert torch.equal(values, given)
    tiles = values[..., None].expand(-1, -1, -1, 2)
    expected = MediaLayout.from_media_mask(mask)
    layout = MediaLayout.from_tile_mask(tiles, 5)
    assert torch.equal(layout.to_mask(), expected.to_mask())


@pytest.mark.parametrize("seed", range(4))
def test_ragged_masks_and_media_without_valid_tokens(seed):
    """A row that attends to empty media only attends to nothing."""
    generator = random.Random(seed)
    num_media = [generator.choice([0, 1, 3, 5]) for _ in range(3)]
    mask = random_mask(seed, 3, 9, 6)
    for sample, count in enumerate(num_media):
        mask[sample, :, count:] = False
    lengths = [generator.choice([0, 0, 2, 7]) for _ in range(sum(num_media))]
    seqlens = torch.tensor(lengths, dtype=torch.int64)
    layout = MediaLayout.from_media_mask(mask, num_media=num_media, media_seqlens=seqlens)
    expected, flat = mask[..., : max(num_media)].clone(), 0
    for sample, count in enumerate(num_media):
        for medium in range(count):
            if lengths[flat] == 0:
                expected[sample, :, medium] = False
            flat += 1
    assert layout.media_total == sum(num_media) and layout.media_seqlens.dtype == torch.int32
    assert_attends_as(layout, expected)


def test_empty_media_by_hand():
    mask = torch.tensor([[[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]])
    layout = MediaLayout.from_media_mask(mask, media_seqlens=torch.tensor([0, 4, 0]))
    assert layout.media_start.tolist() == [[1, 0, 1, 1, 0]]
    assert layout.media_end.tolist() == [[2, 0, 2, 2, 0]]
    assert layout.attends().tolist() == [[True, False, True, True, False]]
    one = MediaLayout.from_media_mask(mask[:, [2, 4]], 1, media_seqlens=torch.tensor([1, 0, 1]))
    assert not one.attends().any() and one.media_start.tolist() == one.media_end.tolist()


@pytest.mark.parametrize(("seqlen", "num_media"), [(1, 1), (7, 3), (400, 2), (400, 70)])
def test_one_hot_masks(seqlen, num_media):
    """In any order, they take the schedule of one medium a token."""
    generator = random.Random(seqlen + num_media)
    media = [[generator.randint(-1, num_media - 1) for _ in range(seqlen)] for _ in range(2)]
    mask = _one_hot(media, num_media)
    layout = MediaLayout.from_media_mask(mask, 1)
    assert layout.media_bits is None and layout.max_media_per_token == 1
    assert sorted(layout.row_index.tolist()) == list(range(2 * seqlen))
    assert layout.work_items is not None and layout.split_media is not None
    assert_attends_as(layout, mask)
    assert_media_rows(layout, mask, exact=True)
    assert torch.equal(MediaLayout.from_media_mask(mask, num_media).to_mask(), mask)


@pytest.mark.parametrize("seed", range(4))
def test_what_holds_of_fewer_media_a_token_than_columns(seed):
    mask = random_mask(seed, 2, 9, 8, density=0.2)
    most = int(mask.sum(2).max())
    layout = MediaLayout.from_media_mask(mask, most)
    assert layout.max_media_per_token == most > 1
    assert_attends_as(layout, mask)


def _idefics_media_by_hand(sample: str, num_images: int) -> list[int]:
    """Of each token: its last image, -1 before the first and after the end of a document."""
    media, seen, closed = [], 0, False
    for token in sample:
        seen += token == "i"
        closed = closed and token != "i"
        is_there = 0 < seen <= num_images and not closed
        media.append(seen - 1 if is_there else -1)
        closed = closed or token == "e"
    return media


@pytest.mark.parametrize("num_images", [1, 3, 5])
def test_masks_of_the_idefics_processor(num_images):
    samples = [".i..ei.i.e..", "...i.......i", ".e..........", "iiiii.e.i..."]
    mask = peers.idefics_image_attention_mask(
        torch.tensor(list(map(_ids, samples))), IMAGE, EOS, num_images
    )
    assert mask.dtype == torch.int64
    by_hand = [_idefics_media_by_hand(sample, num_images) for sample in samples]
    expected = _one_hot(by_hand, num_images)
    layout = MediaLayout.from_media_mask(mask, 1)
    assert_attends_as(layout, expected)
    assert_media_rows(layout, expected, exact=True)
    assert_attends_as(MediaLayout.from_media_mask(mask), expected)


def _mllama_media_by_hand(sample: str) -> list[set[int]]:
    """An image's tokens end at the next image, but consecutive images end together."""
    positions = [position for position, token in enumerate(sample) if token == "i"]
    media: list[set[int]] = [set() for _ in sample]
    for image, position in enumerate(positions):
        end = position + 1
        while end < len(sample) and sample[end] == "i":
            end += 1
        while end < len(sample) and sample[end] != "i":
            end += 1
        for token in range(position, end):
            media[token].add(image)
    return media


MLLAMA = [
    (["..i...."], [[4]]),
    (["..i....", "i......"], [[1], [3]]),
    ([".i..i..i."], [[2, 1, 4]]),
    (["ii..i.iii.", ".ii......."], [[4, 1, 2, 3, 4, 1], [2, 2]]),
    ([".i...ii"], [[1, 4, 2]]),
    ([".i....", "......"], [[3], []]),
    (["i"], [[2]]),
]


@pytest.mark.parametrize(("samples", "tiles"), MLLAMA)
def test_masks_of_the_mllama_processor(samples, tiles):
    mask = peers.mllama_cross_attention_mask(list(map(_ids, samples)), IMAGE, tiles)
    layout = MediaLayout.from_tile_mask(mask, 5)
    batch, seqlen, num_images, _ = mask.shape
    expected = torch.zeros(batch, seqlen, num_images, dtype=torch.bool)
    for sample, text in enumerate(samples):
        for token, media in enumerate(_mllama_media_by_hand(text)):
            expected[sample, token, list(media)] = True
    assert_attends_as(layout, expected)
    assert_media_rows(layout, expected, exact=True)
    assert layout.media_total == batch * num_images
    lengths = [5 * count for row in tiles for count in (*row, *[0] * (num_images - len(row)))]
    assert layout.media_seqlens.tolist() == lengths
    # Each tile a medium of its own says the same.
    of_tiles = MediaLayout.from_media_mask(mask.flatten(2))
    assert torch.equal(of_tiles.to_mask().unflatten(2, (num_images, 4)), mask.bool())


def test_decoding_with_a_tile_mask():
    """The mask of one token knows only of the images that it attends to."""
    text = ["ii..i.iii.", ".ii......."]
    tiles = [[4, 1, 2, 3, 4, 1], [2, 2]]
    mask = peers.mllama_cross_attention_mask(list(map(_ids, text)), IMAGE, tiles)
    whole = MediaLayout.from_tile_mask(mask, 5)
    for token in range(10):
        step = MediaLayout.from_tile_mask(mask[:, token : token + 1], 5)
        assert torch.equal(step.to_mask(), whole.to_mask()[:, token : token + 1])
        attended = step.to_mask().flatten()
        assert torch.equal(step.media_seqlens, whole.media_seqlens * attended)
    assert torch.equal(whole.last(1).to_mask(), step.to_mask())


def test_tile_mask_of_one_image_a_token():
    mask = torch.zeros(1, 4, 2, 3, dtype=torch.int64)
    mask[0, 1:3, 0, :2] = mask[0, 3:, 1, :] = 1
    layout = MediaLayout.from_tile_mask(mask, 1601, max_media_per_token=1)
    assert layout.media_bits is None and layout.media_seqlens.tolist() == [3202, 4803]
    assert_attends_as(layout, _one_hot([[-1, 0, 0, 1]], 2))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ([1, 0, 0, 0], r"tiles \[1, 0, 0, 0\] of image 1; expected all of its first 2 or none"),
        ([0, 1, 0, 0], r"tiles \[0, 1, 0, 0\] of image 1; expected all of its first 2 or none"),
        ([1, 1, 0, 1], r"tiles \[1, 1, 0, 0\] of image 1; expected all of its first 3 or none"),
    ],
)
def test_wrong_patterns_of_tiles(tiles, message):
    mask = torch.zeros(2, 4, 2, 4, dtype=torch.int64)
    mask[1, 2:, 1] = torch.tensor([1, 1, 0, 0])
    mask[1, 3, 1] = torch.tensor(tiles)
    token = 2 if tiles[3] else 3
    with pytest.raises(ValueError, match=f"mask: token {token} of sample 1 attends to {message}"):
        MediaLayout.from_tile_mask(mask, 5)


def test_tiles_that_are_not_the_first():
    mask = torch.zeros(1, 3, 1, 4, dtype=torch.bool)
    mask[0, 1:, 0, 1:3] = True
    message = (
        r"token 1 of sample 0 attends to tiles \[0, 1, 1, 0\] of image 0; expected all of its "
        r"first 2 or none \(from_media_mask\(mask.flatten\(2\)\) takes tiles as media\)"
    )
    with pytest.raises(ValueError, match=message):
        MediaLayout.from_tile_mask(mask, 5)


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("seed", range(4))
def test_media_rows_of_layouts_in_order(seed, attend):
    """Exactly the first and the last row that attends, where media do not go back."""
    generator = random.Random(seed)
    samples = ["".join(generator.choice("...i") for _ in range(13)) for _ in range(3)]
    num_media = [generator.choice([0, 2, 5]) for _ in samples]
    layout = MediaLayout.from_media_locations(locations_of(*samples), num_media, attend)
    assert_media_rows(layout, layout.to_mask(), exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_media_rows_of_intervals_in_any_order(seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 6, (3, 10), generator=generator)
    end = torch.minimum(
        start + torch.randint(0, 4, start.shape, generator=generator), start * 0 + 6
    )
    layout = MediaLayout.from_intervals(start, end, 6, 3)
    assert_media_rows(layout, layout.to_mask())
    ordered, order = torch.sort(start, dim=1, stable=True)
    end = torch.cummax(end.gather(1, order), 1).values
    in_order = MediaLayout.from_intervals(ordered, end, 6, 6)
    assert_media_rows(in_order, in_order.to_mask(), exact=True)


def test_media_rows_by_hand():
    """A row between the first and the last need not attend; a medium in a hole need not either."""
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, 0, [0, 2]] = mask[0, 1, 1] = mask[0, 3, 2] = mask[1, 2, 4] = True
    rows = MediaLayout.from_media_mask(mask).media_rows
    assert rows[[0, 1, 2]].tolist() == [[0, 1], [0, 2], [0, 4]]
    assert rows[9].tolist() == [6, 7]
    nobody = rows[[3, 4, 5, 6, 7, 8]]
    assert torch.equal(nobody[:, 0], nobody[:, 1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("in_order", [True, False])
def test_garbage_stays_inside_the_batch(in_order, seed):
    """What is on a device is not validated."""
    generator = torch.Generator().manual_seed(seed)
    batch, seqlen, total = 3, 7, 5
    limit = [3, 9, 1000, 2**31 - 2, 2**31 - 2, 2**31 - 2][seed]

    def values(*shape):
        return torch.randint(-limit, limit, shape, generator=generator).int()

    start, end = values(batch, seqlen), values(batch, seqlen)
    for cu_media in (values(batch + 1), torch.tensor([0, 2, 2, 5]).int()):
        several = several_media_rows(start, end, cu_media, total, 4)
        items, split, row_index, one = one_medium_schedule(start, end, cu_media, total, in_order)
        for rows in (several, one, items[:, 1:3]):
            assert 0 <= rows.min() and rows.max() <= batch * seqlen
        assert several.shape == one.shape == (total, 2)
        assert items[:, 0].min() >= -1 and items[:, 0].max() < total
        assert row_index is None or sorted(row_index.tolist()) == list(range(batch * seqlen))


def test_validate_counts_what_the_bits_say():
    """An interval may be longer than what is in it."""
    mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 1, 0]]])
    layout = MediaLayout.from_media_mask(mask, 2)
    layout.validate()
    more = dataclasses.replace(layout, max_media_per_token=1)
    message = r"token 0 of sample 0 attends to media \[0, 4\): more than max_media_per_token 1"
    with pytest.raises(ValueError, match=message):
        more.validate()
