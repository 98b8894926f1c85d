"""MediaLayout of masks, of masks of tiles and of packed documents, against loops over tokens."""

import copy
import dataclasses
import itertools
import pickle
import random

import matplotlib
import pytest
import torch
from test_layout import _assert_schedule, _locations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from flamingo_fast.layout import ATTEND, MediaLayout
from flamingo_fast.schedule import one_medium_schedule, several_media_rows
from flamingo_fast.testing import peers

matplotlib.use("Agg")

IMAGE, EOS, TEXT = 7, 2, 5


def _ids(sample: str) -> list[int]:
    return [{"i": IMAGE, "e": EOS}.get(token, TEXT) for token in sample]


def _random_mask(seed: int, *shape: int, density: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    mask[:, 1::3] = False
    return mask


def _one_hot(media: list[list[int]], num_media: int) -> torch.Tensor:
    """-1: the token attends to none."""
    return torch.tensor([[[m == t for m in range(num_media)] for t in row] for row in media])


def _assert_attends_as(layout: MediaLayout, mask: torch.Tensor) -> None:
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
    _assert_media_rows(layout, mask)
    if layout.max_media_per_token <= 1:
        _assert_schedule(layout)
    layout.validate()


def _assert_media_rows(layout: MediaLayout, mask: torch.Tensor, exact: bool = False) -> None:
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


@pytest.mark.parametrize("density", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_media", [0, 1, 63, 64, 65, 130])
def test_any_mask(num_media, density):
    mask = _random_mask(num_media, 2, 11, num_media, density=density)
    layout = MediaLayout.from_media_mask(mask)
    assert (layout.max_media_per_token, layout.max_media) == (max(num_media, 2), num_media)
    assert layout.media_total == 2 * num_media
    assert layout.media_start.dtype == layout.media_end.dtype == torch.int32
    assert layout.media_bits.shape == (2, 11, -(-num_media // 64))
    assert layout.media_bits.dtype == torch.int64
    assert not layout.past_last().any()
    _assert_attends_as(layout, mask)


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
    _assert_attends_as(layout, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_dtypes_of_masks(dtype):
    mask = _random_mask(3, 2, 6, 4)
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
    mask = _random_mask(seed, 3, 9, 6)
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
    _assert_attends_as(layout, expected)


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
    _assert_attends_as(layout, mask)
    _assert_media_rows(layout, mask, exact=True)
    assert torch.equal(MediaLayout.from_media_mask(mask, num_media).to_mask(), mask)


@pytest.mark.parametrize("seed", range(4))
def test_what_holds_of_fewer_media_a_token_than_columns(seed):
    mask = _random_mask(seed, 2, 9, 8, density=0.2)
    most = int(mask.sum(2).max())
    layout = MediaLayout.from_media_mask(mask, most)
    assert layout.max_media_per_token == most > 1
    _assert_attends_as(layout, mask)


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
    _assert_attends_as(layout, expected)
    _assert_media_rows(layout, expected, exact=True)
    _assert_attends_as(MediaLayout.from_media_mask(mask), expected)


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
    _assert_attends_as(layout, expected)
    _assert_media_rows(layout, expected, exact=True)
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
    _assert_attends_as(layout, _one_hot([[-1, 0, 0, 1]], 2))


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


@dataclasses.dataclass(frozen=True)
class Packed:
    """rows: their documents; "-" marks padding, a document without media."""

    rows: list[list[str]]
    num_media: list[int] | None = None
    seqlen: int = 0

    @property
    def documents(self) -> list[str]:
        return list(itertools.chain.from_iterable(self.rows))

    @property
    def counts(self) -> list[int]:
        if self.num_media is not None:
            return self.num_media
        return [document.count("i") for document in self.documents]

    def arguments(self) -> tuple[torch.Tensor, list[int], list[int]]:
        width = self.seqlen or len("".join(self.rows[0]))
        locations = _locations(*("".join(row).ljust(width, "-") for row in self.rows))
        cu_seqlens = list(itertools.accumulate(map(len, self.documents), initial=0))
        return locations, cu_seqlens, self.counts

    def expected(self, attend: str | list[str]) -> tuple[torch.Tensor, list[int]]:
        """The mask from each document alone, and the media of each row of the batch."""
        counts = iter(self.counts)
        attends = iter([attend] * len(self.documents) if isinstance(attend, str) else attend)
        masks, per_row = [], []
        locations, *_ = self.arguments()
        for row in self.rows:
            blocks = []
            for document in row:
                alone = MediaLayout.from_media_locations(
                    _locations(document).bool(), next(counts), next(attends)
                )
                blocks.append(alone.to_mask()[0])
            masks.append(torch.block_diag(*blocks))
            per_row.append(sum(block.shape[1] for block in blocks))
        mask = torch.zeros(*locations.shape, max(per_row), dtype=torch.bool)
        for sample, block in enumerate(masks):
            mask[sample, : block.shape[0], : block.shape[1]] = block
        return mask, per_row


PACKED = {
    "one_document": Packed([["..i.i."]]),
    "text_before_each_first_image": Packed([["..i..", ".i", "...i.i"]]),
    "starts_with_images": Packed([["i..", "i.i."]]),
    "documents_without_media": Packed([["..i.", "...", "i..", "..", "."]]),
    "nothing_but_text": Packed([["..", "..."], ["....", "."]]),
    "documents_without_tokens": Packed([["", "i..", "", "", ".i"], ["..", "", "i.i", ""]]),
    "their_media": Packed([["", "i..", "", ".i"]], [2, 1, 3, 1]),
    "their_media_at_the_end": Packed([["i..", ".i"], ["i....", ""]], [1, 1, 1, 2]),
    # Which row has the media makes no difference to any token: the second.
    "their_media_between_rows": Packed([["i..", ".i"], ["", "i...."]], [1, 1, 3, 1]),
    "padding": Packed([["..i.", "i.", "----"], ["i.i.i.", "----"]]),
    "ends_early": Packed([["..i.", "i.", "----"], ["i.i.i.i"]], seqlen=10),
    "last_row_is_padding": Packed([["..i.", "i."], []], seqlen=6),
    "several_rows": Packed([["i...", ".i..."], ["..i", "i....."], ["........i"]]),
    "more_image_tokens_than_media": Packed([["i.i.i", ".i.i"], ["iiii", ".i..."]], [1, 2, 0, 1]),
    "fewer_image_tokens_than_media": Packed([["i...", ".i."], ["..", "....i"]], [3, 2, 1, 2]),
    "of_one_token": Packed([["i", "i", ".", "i"]]),
    "split": Packed([["." + "i" + "." * 200, "." * 90 + "i" + "." * 170]]),
}


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED.keys())
def test_packed_documents_are_as_each_alone(case, attend):
    locations, cu_seqlens, num_media = case.arguments()
    layout = MediaLayout.packed(locations, cu_seqlens, num_media, attend)
    expected, per_row = case.expected(attend)
    assert layout.is_packed and layout.max_media == max(per_row)
    assert layout.cu_media.tolist() == list(itertools.accumulate(per_row, initial=0))
    assert layout.max_media_per_token == (max(*num_media, 2) if attend == "all_previous" else 1)
    _assert_attends_as(layout, expected)
    _assert_media_rows(layout, expected, exact=True)
    assert not layout.past_last().any()


def _random_packed(seed: int) -> Packed:
    generator = random.Random(seed)
    rows, num_media = [], []
    for _ in range(3):
        lengths = [generator.choice([0, 1, 4, 9]) for _ in range(generator.randint(0, 6))]
        row = ["".join(generator.choices("....i", k=length)) for length in lengths]
        rows.append([*row, "-" * (60 - sum(lengths))])
        wanted = [document.count("i") + generator.choice([0, 0, 1, -1]) for document in rows[-1]]
        num_media += [max(0, count) for count in wanted]
    # Of documents without tokens none, so that they are not of the row before or after.
    is_empty = [document == "" for row in rows for document in row]
    return Packed(rows, [0 if empty else n for empty, n in zip(is_empty, num_media, strict=True)])


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("seed", range(4))
def test_random_packed_documents(seed, attend):
    case = _random_packed(seed)
    layout = MediaLayout.packed(*case.arguments(), attend)
    expected, _ = case.expected(attend)
    _assert_attends_as(layout, expected)
    _assert_media_rows(layout, expected, exact=True)


@pytest.mark.parametrize("of_all", [ATTEND[:2], ATTEND])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED.keys())
def test_each_packed_document_attends_as_it_is_told(case, of_all):
    attend = [of_all[index % len(of_all)] for index in range(len(case.documents))]
    layout = MediaLayout.packed(*case.arguments(), attend)
    _assert_attends_as(layout, case.expected(attend)[0])
    has_all = "all_previous" in attend
    assert layout.max_media_per_token == (max(*case.counts, 2) if has_all else 1)


def test_forms_of_the_arguments_of_packed():
    locations = _locations("i..i.i", ".i....")
    expected = MediaLayout.packed(locations, [0, 3, 6, 12], [2, 2, 2])
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([0, 3, 6, 12], dtype=dtype)
        given = cu_seqlens.clone()
        for num_media in (2, (2, 2, 2), torch.tensor([2, 2, 2])):
            assert MediaLayout.packed(locations, cu_seqlens, num_media) == expected
        assert torch.equal(cu_seqlens, given)
    assert MediaLayout.packed(locations, (0, 3, 6, 12), 2, media_total=6) == expected
    seqlens = torch.tensor([1, 0, 2, 0, 0, 3])
    layout = MediaLayout.packed(locations, [0, 3, 6, 12], 2, media_seqlens=seqlens)
    assert torch.equal(layout.media_seqlens, seqlens)
    valid = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    assert torch.equal(layout.to_mask(), expected.to_mask() & valid[:, None])
    assert torch.equal(layout.attends(), layout.to_mask().any(2))


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 12])
def test_last_of_packed_documents(num_tokens, attend):
    case = Packed([["..i..", ".i", "...i."], ["i..", ".i......."]])
    whole = MediaLayout.packed(*case.arguments(), attend)
    last = whole.last(num_tokens)
    assert last.is_packed
    _assert_attends_as(last, whole.to_mask()[:, 12 - num_tokens :])


@pytest.mark.parametrize(
    ("locations", "cu_seqlens", "num_media"),
    [
        (torch.zeros(0, 5, dtype=torch.bool), [0], []),
        (torch.zeros(2, 0, dtype=torch.bool), [0], []),
        (torch.zeros(2, 0, dtype=torch.bool), [0, 0, 0], [2, 1]),
        (torch.ones(2, 3, dtype=torch.bool), [0], 4),
        (torch.ones(1, 3, dtype=torch.bool), [0, 3], 0),
    ],
)
@pytest.mark.parametrize("attend", ATTEND)
def test_packed_of_nothing(attend, locations, cu_seqlens, num_media):
    layout = MediaLayout.packed(locations, cu_seqlens, num_media, attend)
    assert layout.to_mask().shape[:2] == layout.attends().shape == locations.shape
    assert not layout.attends().any()
    _assert_attends_as(layout, layout.to_mask())


def _layouts() -> dict[str, MediaLayout]:
    """As many tokens and media each."""
    locations = _locations("..i.i", "i....")
    mask = _random_mask(5, 2, 5, 2)
    mask[0, 3] = mask[1, 4] = True
    seqlens = torch.tensor([3, 0, 0, 2])
    return {
        "one": MediaLayout.from_media_locations(locations, 2),
        "all": MediaLayout.from_media_locations(locations, 2, "all_previous"),
        "bits": MediaLayout.from_media_mask(mask),
        "one_hot": MediaLayout.from_media_mask(mask & ~mask.roll(1, 2), 1),
        "all_with_lengths": MediaLayout.from_media_locations(
            locations, 2, "all_previous", media_seqlens=seqlens
        ),
        "bits_with_lengths": MediaLayout.from_media_mask(mask, media_seqlens=seqlens),
        "tiles": MediaLayout.from_tile_mask(mask[..., None], 3),
        "packed": MediaLayout.packed(locations, [0, 5, 10], 2),
        "packed_all": MediaLayout.packed(locations, [0, 5, 10], 2, "all_previous"),
    }


SAME_MEDIA = [
    ("bits", "bits"),
    ("one", "bits"),
    ("bits", "all"),
    ("one_hot", "bits"),
    ("one_hot", "one"),
    ("all_with_lengths", "bits_with_lengths"),
    ("packed", "packed"),
    ("packed", "packed_all"),
]
OTHER_MEDIA = [
    ("all_with_lengths", "bits"),
    ("bits", "all_with_lengths"),
    ("tiles", "bits_with_lengths"),
    ("tiles", "one"),
]


def _assert_combined(layout: MediaLayout, parts: list[MediaLayout], mask: torch.Tensor) -> None:
    assert torch.equal(layout.to_mask(), mask)
    assert torch.equal(layout.attends(), mask.any(2))
    _assert_media_rows(layout, mask)
    assert layout.max_media_per_token == max(part.max_media_per_token for part in parts)
    if layout.max_media_per_token == 1:
        assert layout.media_bits is None
        _assert_schedule(layout)
    assert layout.is_packed == parts[0].is_packed
    layout.validate()


@pytest.mark.parametrize("names", SAME_MEDIA + OTHER_MEDIA, ids="-".join)
def test_cat_along_the_batch(names):
    parts = [_layouts()[name] for name in names]
    layout = MediaLayout.cat([*parts, parts[0]])
    _assert_combined(layout, parts, torch.cat([part.to_mask() for part in [*parts, parts[0]]]))
    assert (layout.batch_size, layout.media_total) == (6, 12)


def test_cat_of_different_numbers_of_media():
    """Of more words of bits than one of them has."""
    few, many = _random_mask(1, 1, 4, 3), _random_mask(2, 2, 4, 70)
    parts = [MediaLayout.from_media_mask(mask) for mask in (few, many)]
    for first, second in (parts, parts[::-1]):
        layout = MediaLayout.cat([first, second])
        masks = [
            torch.nn.functional.pad(p.to_mask(), (0, 70 - p.max_media)) for p in (first, second)
        ]
        _assert_attends_as(layout, torch.cat(masks))


@pytest.mark.parametrize("names", SAME_MEDIA, ids="-".join)
def test_cat_along_the_text(names):
    first, second = (_layouts()[name] for name in names)
    parts = [first, second, first.last(2)]
    layout = MediaLayout.cat(parts, dim=1)
    _assert_combined(layout, parts, torch.cat([part.to_mask() for part in parts], 1))
    assert (layout.seqlen, layout.media_total) == (12, 4)


def test_cat_along_the_text_compiles():
    layout = _layouts()["bits"]
    whole = torch.compile(
        lambda layout: MediaLayout.cat([layout, layout.last(2)], dim=1),
        fullgraph=True,
        backend="eager",
    )(layout)
    assert whole == MediaLayout.cat([layout, layout.last(2)], dim=1)


@pytest.mark.parametrize("name", ["bits", "tiles", "packed_all", "all_with_lengths"])
def test_builders_look_at_no_values_of_fake_tensors(name):
    with FakeTensorMode():
        layout = _layouts()[name]
        assert MediaLayout.cat([layout, layout], dim=1).seqlen == 10
    assert layout.media_start.shape == _layouts()[name].media_start.shape


def test_a_module_that_takes_a_layout_can_be_exported():
    class Attends(torch.nn.Module):
        def forward(self, x, layout):
            return x * layout.attends()

    layout, x = _layouts()["bits"], torch.randn(2, 5)
    exported = torch.export.export(Attends(), (x, layout)).module()
    assert torch.equal(exported(x, layout), Attends()(x, layout))


def test_cat_refuses_packed_and_not():
    layouts = _layouts()
    for dim in (0, 1):
        with pytest.raises(ValueError, match=rf"layouts\[1\]: .* along dim {dim}"):
            MediaLayout.cat([layouts["packed"], layouts["one"]], dim)


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 11])
@pytest.mark.parametrize("num_media", [1, 65])
def test_last_of_masks(num_media, num_tokens):
    mask = _random_mask(0, 2, 11, num_media)
    last = MediaLayout.from_media_mask(mask).last(num_tokens)
    _assert_attends_as(last, mask[:, 11 - num_tokens :])


@pytest.mark.parametrize("name", sorted(set(sum(SAME_MEDIA + OTHER_MEDIA, ()))))
def test_moves_and_copies(name):
    layout = _layouts()[name]
    for same in (
        layout.to("cpu"),
        copy.deepcopy(layout),
        pickle.loads(pickle.dumps(layout)),
        pytree.tree_unflatten(*pytree.tree_flatten(layout)),
    ):
        assert same == layout and not same != layout
        assert (same.media_bits is None) == (layout.media_bits is None)
        assert same.is_packed == layout.is_packed
    moved = layout.to("meta")
    assert {leaf.device.type for leaf in pytree.tree_leaves(moved)} == {"meta"}
    leaves, spec = pytree.tree_flatten(layout)
    tensors = [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    assert set(map(id, leaves)) == set(map(id, tensors))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_equality():
    mask = _random_mask(4, 2, 5, 3)
    mask[0, 0] = torch.tensor([True, False, True])
    layout = MediaLayout.from_media_mask(mask)
    assert layout == MediaLayout.from_media_mask(mask.long(), 3, num_media=3, media_total=6)
    # The same interval without its hole.
    filled = mask.clone()
    filled[0, 0, 1] = True
    assert layout != MediaLayout.from_media_mask(filled)
    assert layout != MediaLayout.from_media_mask(mask, media_seqlens=torch.full((6,), 9))
    assert layout != layout.last(4)
    locations = _locations("i.i..", "..i.i")
    intervals = MediaLayout.from_media_locations(locations, 2, "all_previous")
    assert MediaLayout.from_media_mask(intervals.to_mask()) == intervals
    assert intervals == MediaLayout.from_media_mask(intervals.to_mask())
    alone = MediaLayout.from_media_locations(locations, 2)
    assert MediaLayout.packed(locations, [0, 5, 10], 2) != alone
    # What is past the last medium may get something else than what attends to nothing.
    past = MediaLayout.from_intervals(torch.tensor([[2, 0]]), torch.tensor([[2, 1]]), 2, 2)
    assert past != MediaLayout.from_media_mask(past.to_mask())


def test_repr():
    layouts = _layouts()
    sizes = "MediaLayout(2 x 5 tokens, 4 media on cpu, "
    assert repr(layouts["bits"]) == sizes + "up to 2 media a token, media_bits)"
    assert repr(layouts["one_hot"]) == sizes + "one medium a token)"
    assert repr(layouts["tiles"]) == sizes + "up to 2 media a token, media_seqlens, media_bits)"
    assert repr(layouts["packed"]) == sizes + "one medium a token, packed)"
    assert repr(layouts["packed_all"]) == sizes + "up to 2 media a token, packed)"


def test_plot():
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 1, 0]]])
    axes = MediaLayout.from_media_mask(mask).plot()
    assert axes.get_title() == "sample 0: 3 tokens, 1 attend to nothing"
    (image,) = axes.images
    assert image.get_array().astype(int).tolist() == mask[0].T.tolist()
    packed = MediaLayout.packed(_locations("i..i.", "....i"), [0, 3, 5, 10], 1)
    packed.plot(0, ax=axes)
    assert axes.get_title() == "sample 0: 5 tokens, 0 attend to nothing"
    assert axes.images[-1].get_array().astype(int).tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    matplotlib.pyplot.close(axes.figure)


BUILDERS = {
    "mask": lambda mask: MediaLayout.from_media_mask(mask),
    "long_mask": lambda mask: MediaLayout.from_media_mask(mask.long(), 5, num_media=[3, 5]),
    "one_hot": lambda mask: MediaLayout.from_media_mask(mask & (mask.cumsum(2) == 1), 1),
    "lengths": lambda mask: MediaLayout.from_media_mask(
        mask, media_seqlens=torch.arange(10, device=mask.device) % 3
    ),
    "tiles": lambda mask: MediaLayout.from_tile_mask(mask[..., None].expand(-1, -1, -1, 2), 7),
    "packed": lambda mask: MediaLayout.packed(mask[..., 0], [0, 4, 8, 16], [3, 1, 5]),
    "packed_all": lambda mask: MediaLayout.packed(
        mask[..., 0], torch.tensor([0, 4, 8, 16]), [3, 1, 2], "all_previous"
    ),
}


def _buildable_mask() -> torch.Tensor:
    mask = _random_mask(7, 2, 8, 5)
    mask[0, :, 3:] = False
    return mask


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_passes_through_torch_compile(build):
    mask = _buildable_mask()
    layout = build(mask)

    def build_and_use(mask):
        layout = build(mask)
        return layout, layout.to_mask()[..., : mask.shape[2]], layout.attends(), layout.last(2)

    torch._dynamo.reset()
    built, *used = torch.compile(build_and_use, fullgraph=True, backend="eager")(mask)
    assert built == layout and used.pop() == layout.last(2)
    for tensor, expected in zip(used, build_and_use(mask)[1:3], strict=True):
        # Without the values the media of packed rows can't be counted: there may be more columns.
        assert torch.equal(tensor[..., : expected.shape[-1]], expected)
        assert not tensor[..., expected.shape[-1] :].any()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_shapes_follow_from_shapes(build):
    """On the meta device no value can be waited for."""
    mask = _buildable_mask()
    layout, on_meta = build(mask), build(mask.to("meta"))
    for leaf, expected in zip(*map(pytree.tree_leaves, (on_meta, layout)), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.device.type == "meta"
    assert on_meta.media_total == layout.media_total and on_meta.max_media >= layout.max_media
    assert on_meta.max_media_per_token == layout.max_media_per_token
    for used in (on_meta.to_mask(), on_meta.attends(), on_meta.last(3).media_rows):
        assert used.device.type == "meta"
    twice = MediaLayout.cat([on_meta, on_meta])
    assert twice.media_rows.shape == (2 * layout.media_total, 2)


def test_counts_of_a_mask_on_a_device_need_their_sum():
    mask = torch.zeros(2, 4, 5, dtype=torch.bool, device="meta")
    counts = torch.tensor([3, 5], device="meta")
    with pytest.raises(ValueError, match="media_total: expected the sum of num_media.* on meta"):
        MediaLayout.from_media_mask(mask, num_media=counts)
    layout = MediaLayout.from_media_mask(mask, num_media=counts, media_total=8)
    assert (layout.media_total, layout.max_media) == (8, 5)
    assert layout.to_mask().shape == (2, 4, 5)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_is_no_tensor_of_inference_mode(build):
    with torch.inference_mode():
        layout = build(_buildable_mask())
    assert not any(leaf.is_inference() for leaf in pytree.tree_leaves(layout))
    assert layout == build(_buildable_mask())


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("seed", range(4))
def test_media_rows_of_layouts_in_order(seed, attend):
    """Exactly the first and the last row that attends, where media do not go back."""
    generator = random.Random(seed)
    samples = ["".join(generator.choice("...i") for _ in range(13)) for _ in range(3)]
    num_media = [generator.choice([0, 2, 5]) for _ in samples]
    layout = MediaLayout.from_media_locations(_locations(*samples), num_media, attend)
    _assert_media_rows(layout, layout.to_mask(), exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_media_rows_of_intervals_in_any_order(seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 6, (3, 10), generator=generator)
    end = torch.minimum(
        start + torch.randint(0, 4, start.shape, generator=generator), start * 0 + 6
    )
    layout = MediaLayout.from_intervals(start, end, 6, 3)
    _assert_media_rows(layout, layout.to_mask())
    ordered, order = torch.sort(start, dim=1, stable=True)
    end = torch.cummax(end.gather(1, order), 1).values
    in_order = MediaLayout.from_intervals(ordered, end, 6, 6)
    _assert_media_rows(in_order, in_order.to_mask(), exact=True)


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


MASK = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 1, 0]]])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "mask: expected a tensor, got list", {"mask": [[[1]]]}),
        (TypeError, "mask: expected bool or integers, got torch.float32", {"mask": MASK.float()}),
        (TypeError, "mask: expected bool or integers, got torch.complex", {"mask": MASK * 1j}),
        (ValueError, r"mask: expected shape \(B, L, N\), got \(2, 3\)", {"mask": MASK[0]}),
        (
            ValueError,
            r"mask: expected shape \(B, L, N\), got \(2, 2, 3, 1\)",
            {"mask": MASK[..., None]},
        ),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to 2 media, more than max_media_per_token 1",
            {"max_media_per_token": 1},
        ),
        (
            ValueError,
            "mask: token 0 of sample 0 attends to 1 media, more than max_media_per_token 0",
            {"max_media_per_token": 0},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got -1",
            {"max_media_per_token": -1},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got True",
            {"max_media_per_token": True},
        ),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to medium 1 of 1",
            {"num_media": [3, 1]},
        ),
        (ValueError, "num_media: expected at most 3, the mask's media, got 4", {"num_media": 4}),
        (ValueError, r"num_media: .* 2 of them .* got \[3\]", {"num_media": [3]}),
        (TypeError, "num_media: expected integers", {"num_media": torch.ones(2)}),
        (ValueError, "media_total: num_media adds up to 6, got 5", {"media_total": 5}),
        (TypeError, "media_seqlens: expected a tensor, got list", {"media_seqlens": [1] * 6}),
        (
            ValueError,
            r"media_seqlens: expected shape \(6,\) on cpu, got \(5,\) on cpu",
            {"media_seqlens": torch.ones(5, dtype=torch.int64)},
        ),
        (
            ValueError,
            "media_seqlens: medium 4 has -2 tokens",
            {"media_seqlens": torch.tensor([1, 1, 1, 1, -2, 1])},
        ),
    ],
)
def test_wrong_arguments_of_from_media_mask(error, message, changed):
    with pytest.raises(error, match=message):
        MediaLayout.from_media_mask(**{"mask": MASK} | changed)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "mask: expected a tensor, got int", {"mask": 3}),
        (
            TypeError,
            "mask: expected bool or integers, got torch.float64",
            {"mask": MASK[..., None].double()},
        ),
        (
            ValueError,
            r"mask: expected shape \(B, L, N, tiles\), got \(2, 2, 3\)",
            {"mask": MASK},
        ),
        (ValueError, "tokens_per_tile: expected an integer > 0, got 0", {"tokens_per_tile": 0}),
        (ValueError, "tokens_per_tile: expected an integer > 0, got -5", {"tokens_per_tile": -5}),
        (ValueError, "tokens_per_tile: expected an integer .* 1.5", {"tokens_per_tile": 1.5}),
        (
            ValueError,
            "mask: token 1 of sample 1 attends to 2 media, more than max_media_per_token 1",
            {"max_media_per_token": 1},
        ),
        (
            ValueError,
            "max_media_per_token: expected an integer >= 0, got 1.0",
            {"max_media_per_token": 1.0},
        ),
    ],
)
def test_wrong_arguments_of_from_tile_mask(error, message, changed):
    arguments = {"mask": MASK[..., None], "tokens_per_tile": 5} | changed
    with pytest.raises(error, match=message):
        MediaLayout.from_tile_mask(**arguments)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "media_locations: expected a tensor", {"media_locations": [[True]]}),
        (TypeError, "media_locations: expected torch.bool", {"media_locations": torch.ones(2, 4)}),
        (
            ValueError,
            r"media_locations: expected shape \(B, L\), got \(4,\)",
            {"media_locations": torch.zeros(4, dtype=torch.bool)},
        ),
        (ValueError, "attend: expected one of previous, next, all.*'all'", {"attend": "all"}),
        (ValueError, "attend: expected one for each of 2 documents", {"attend": ["next"] * 3}),
        (TypeError, "cu_seqlens: expected a tensor or integers >= 0, got 8", {"cu_seqlens": 8}),
        (
            TypeError,
            r"cu_seqlens: expected a tensor or integers >= 0, got \[0, 4.0, 8\]",
            {"cu_seqlens": [0, 4.0, 8]},
        ),
        (
            TypeError,
            "cu_seqlens: expected integers, got torch.float32",
            {"cu_seqlens": torch.tensor([0.0, 4.0, 8.0])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \(documents \+ 1,\), got \(0,\)",
            {"cu_seqlens": []},
        ),
        (
            ValueError,
            r"cu_seqlens: expected shape \(documents \+ 1,\), got \(1, 3\)",
            {"cu_seqlens": torch.tensor([[0, 4, 8]])},
        ),
        (
            ValueError,
            r"cu_seqlens: expected 0 to at most 8 tokens, never falling; got \[1, 4, 8\]",
            {"cu_seqlens": [1, 4, 8]},
        ),
        (ValueError, r"cu_seqlens: .* never falling; got \[0, 5, 4\]", {"cu_seqlens": [0, 5, 4]}),
        (ValueError, r"cu_seqlens: .* at most 8 .* \[0, 4, 9\]", {"cu_seqlens": [0, 4, 9]}),
        (
            ValueError,
            r"cu_seqlens: .* at most 8 .* \[0, 4, 2147483648\]",
            {"cu_seqlens": [0, 4, 2**31]},
        ),
        (
            ValueError,
            r"cu_seqlens: .* \[0, 4, 4294967304\]",
            {"cu_seqlens": torch.tensor([0, 4, 2**32 + 8])},
        ),
        (
            ValueError,
            "cu_seqlens: document 1, tokens 3 to 5, is in two rows of 4 tokens",
            {"cu_seqlens": [0, 3, 6]},
        ),
        (
            ValueError,
            "cu_seqlens: document 0, tokens 0 to 7, is in two rows of 4 tokens",
            {"cu_seqlens": [0, 8, 8]},
        ),
        (ValueError, r"num_media: .* 2 of them .* got \[1, 1, 1\]", {"num_media": [1, 1, 1]}),
        (ValueError, "num_media: expected an integer >= 0, got -1", {"num_media": -1}),
        (
            ValueError,
            r"num_media: expected shape \(2,\), got \(1,\)",
            {"num_media": torch.tensor([1])},
        ),
        (
            ValueError,
            "cu_seqlens: expected a CPU tensor or device cpu, got meta",
            {"cu_seqlens": torch.zeros(3, dtype=torch.int64, device="meta")},
        ),
        (
            ValueError,
            "num_media: expected a CPU tensor or device cpu, got meta",
            {"num_media": torch.zeros(2, dtype=torch.int64, device="meta"), "media_total": 2},
        ),
        (
            ValueError,
            "num_media: 2 media for a batch without rows",
            {"media_locations": torch.zeros(0, 4, dtype=torch.bool), "cu_seqlens": [0, 0, 0]},
        ),
        (ValueError, "media_total: num_media adds up to 2, got 3", {"media_total": 3}),
        (
            ValueError,
            r"media_seqlens: expected shape \(2,\) on cpu, got \(2,\) on meta",
            {"media_seqlens": torch.ones(2, dtype=torch.int64, device="meta")},
        ),
        (
            ValueError,
            "media_seqlens: medium 1 has -1 tokens",
            {"media_seqlens": torch.tensor([2, -1])},
        ),
    ],
)
def test_wrong_arguments_of_packed(error, message, changed):
    arguments = {
        "media_locations": _locations("i...", ".i.."),
        "cu_seqlens": [0, 4, 8],
        "num_media": 1,
    } | changed
    with pytest.raises(error, match=message):
        MediaLayout.packed(**arguments)


def test_validate_counts_what_the_bits_say():
    """An interval may be longer than what is in it."""
    mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 1, 0]]])
    layout = MediaLayout.from_media_mask(mask, 2)
    layout.validate()
    more = dataclasses.replace(layout, max_media_per_token=1)
    message = r"token 0 of sample 0 attends to media \[0, 4\): more than max_media_per_token 1"
    with pytest.raises(ValueError, match=message):
        more.validate()
