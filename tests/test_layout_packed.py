"""MediaLayout of packed documents."""

import dataclasses
import itertools
import random

import pytest
import torch
from layout_cases import assert_attends_as, assert_media_rows, locations_of

from flamingo_fast.layout import ATTEND, MediaLayout


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
        locations = locations_of(*("".join(row).ljust(width, "-") for row in self.rows))
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
                    locations_of(document).bool(), next(counts), next(attends)
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
    assert_attends_as(layout, expected)
    assert_media_rows(layout, expected, exact=True)
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
    assert_attends_as(layout, expected)
    assert_media_rows(layout, expected, exact=True)


@pytest.mark.parametrize("of_all", [ATTEND[:2], ATTEND])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED.keys())
def test_each_packed_document_attends_as_it_is_told(case, of_all):
    attend = [of_all[index % len(of_all)] for index in range(len(case.documents))]
    layout = MediaLayout.packed(*case.arguments(), attend)
    assert_attends_as(layout, case.expected(attend)[0])
    has_all = "all_previous" in attend
    assert layout.max_media_per_token == (max(*case.counts, 2) if has_all else 1)


def test_forms_of_the_arguments_of_packed():
    locations = locations_of("i..i.i", ".i....")
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
    assert_attends_as(last, whole.to_mask()[:, 12 - num_tokens :])


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
    assert_attends_as(layout, layout.to_mask())
