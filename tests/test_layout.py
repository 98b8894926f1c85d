"""MediaLayout: what it says of each token, how it is made and handed on, and its schedule."""

import copy
import dataclasses
import itertools
import pickle
import random
import sys

import matplotlib
import pytest
import torch
from layout_cases import LOCATIONS, START, assert_schedule, locations_of
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from flamingo_fast.layout import ATTEND, MediaLayout
from flamingo_fast.schedule import chunk_rows, num_slots

matplotlib.use("Agg")


def _media_by_hand(locations: list[bool], num_media: int, attend: str) -> list[range]:
    """The media of each token, one token after the other."""
    media, seen = [], 0
    for is_image in locations:
        seen += is_image
        if attend == "all_previous":
            media.append(range(min(seen, num_media)))
            continue
        medium = seen if attend == "next" and not is_image else seen - 1
        media.append(range(medium, medium + 1) if 0 <= medium < num_media else range(0))
    return media


def _random_layout(seed: int, attend: str) -> tuple[torch.Tensor, list[int], MediaLayout]:
    generator = random.Random(seed)
    batch, seqlen = generator.randint(1, 4), generator.choice([1, 7, 40, 300])
    density = generator.choice([0.01, 0.1, 0.6])
    locations = torch.tensor(
        [[generator.random() < density for _ in range(seqlen)] for _ in range(batch)]
    )
    # Right, too few and too many media, and none.
    num_media = [
        max(0, int(count) + generator.choice([0, 0, -1, 2, -9])) for count in locations.sum(1)
    ]
    layout = MediaLayout.from_media_locations(locations, num_media, attend)
    return locations, num_media, layout


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("attend", ATTEND)
def test_against_a_loop_over_tokens(attend, seed):
    locations, num_media, layout = _random_layout(seed, attend)
    mask = layout.to_mask()
    assert mask.shape == (*locations.shape, max(num_media))
    for sample, count in enumerate(num_media):
        media = _media_by_hand(locations[sample].tolist(), count, attend)
        assert [row.nonzero().flatten().tolist() for row in mask[sample]] == list(map(list, media))
        attends = layout.attends()[sample].tolist()
        assert attends == [len(attended) > 0 for attended in media]
        if attend == "previous":
            too_many = locations[sample].cumsum(0) > count
            assert torch.equal(layout.past_last()[sample], too_many & (count > 0))
    assert layout.cu_media.tolist() == list(itertools.accumulate(num_media, initial=0))
    assert layout.media_total == sum(num_media)
    assert layout.max_media_per_token == (max(*num_media, 2) if attend == "all_previous" else 1)
    layout.validate()


@pytest.mark.parametrize("seed", range(6))
def test_each_sample_attends_as_it_is_told(seed):
    """As in a batch of its own; and tokens that come after the last medium are not past it."""
    locations, num_media, _ = _random_layout(seed, "previous")
    attend = [ATTEND[(seed + sample) % 3] for sample in range(len(num_media))]
    layout = MediaLayout.from_media_locations(locations, num_media, attend)
    after = MediaLayout.after_media(locations, num_media, 2, tuple(attend))
    assert not layout.past_last().any() or "next" not in attend
    for sample, (own, count) in enumerate(zip(attend, num_media, strict=True)):
        alone = MediaLayout.from_media_locations(locations[sample : sample + 1], count, own)
        assert torch.equal(layout.to_mask()[sample, :, :count], alone.to_mask()[0])
        alone_after = MediaLayout.after_media(locations[sample : sample + 1], count, 2, own)
        assert torch.equal(after.to_mask()[sample, :, :count], alone_after.to_mask()[0])
        assert alone.tells_past_last == (own != "next")


def test_samples_that_all_attend_alike_are_a_batch_that_does():
    locations = locations_of("..i.i", "i....")
    for attend in ATTEND:
        layout = MediaLayout.from_media_locations(locations, [2, 1], [attend] * 2)
        assert layout == MediaLayout.from_media_locations(locations, [2, 1], attend)
    mixed = MediaLayout.from_media_locations(locations, [2, 1], ["previous", "next"])
    assert mixed.max_media_per_token == 1 and mixed.row_index is None
    assert MediaLayout.cat([mixed, mixed]).past_last().any().item() is False


def test_small_layouts_by_hand():
    locations = locations_of("..i.ii.")
    previous = MediaLayout.from_media_locations(locations, 3)
    assert previous.media_start.tolist() == [[0, 0, 0, 0, 1, 2, 2]]
    assert previous.media_end.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    following = MediaLayout.from_media_locations(locations, 3, "next")
    assert following.media_start.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    assert following.media_end.tolist() == [[1, 1, 1, 2, 2, 3, 3]]
    fewer = MediaLayout.from_media_locations(locations, 2)
    assert fewer.past_last().tolist() == [[False] * 5 + [True] * 2]
    assert not MediaLayout.from_media_locations(locations, 2, "all_previous").past_last().any()
    assert not MediaLayout.from_media_locations(locations, 0).past_last().any()
    for layout in (previous, following, fewer):
        assert layout.media_start.dtype == layout.media_end.dtype == torch.int32


@pytest.mark.parametrize("attend", ATTEND)
def test_media_without_valid_tokens_count_as_nothing(attend):
    locations = locations_of(".i.i.", "i..i.")
    seqlens = torch.tensor([0, 3, 2, 0])
    whole = MediaLayout.from_media_locations(locations, 2, attend)
    layout = MediaLayout.from_media_locations(locations, 2, attend, media_seqlens=seqlens)
    expected = whole.to_mask() & (seqlens > 0).view(2, 1, 2)
    assert torch.equal(layout.to_mask(), expected)
    assert torch.equal(layout.attends(), expected.any(-1))
    assert torch.equal(layout.past_last(), whole.past_last())


@pytest.mark.parametrize("seed", range(6))
def test_attends_where_the_mask_has_a_medium(seed):
    attend = ATTEND[seed % 3]
    locations, num_media, _ = _random_layout(seed, attend)
    generator = torch.Generator().manual_seed(seed)
    seqlens = torch.randint(0, 3, (sum(num_media),), generator=generator)
    layout = MediaLayout.from_media_locations(locations, num_media, attend, media_seqlens=seqlens)
    assert torch.equal(layout.attends(), layout.to_mask().any(-1))


def test_forms_of_num_media():
    locations = locations_of(".i.i", "i...")
    expected = MediaLayout.from_media_locations(locations, [2, 2])
    for num_media in (2, (2, 2), torch.tensor([2, 2]), torch.tensor([2, 2], dtype=torch.int32)):
        assert MediaLayout.from_media_locations(locations, num_media) == expected
    assert MediaLayout.from_media_locations(locations, 2, media_total=4) == expected
    ragged = MediaLayout.from_media_locations(locations, torch.tensor([2, 1]))
    assert ragged == MediaLayout.from_media_locations(locations, [2, 1], media_total=3)
    assert ragged.max_media == 2 and ragged.media_total == 3


def test_counts_on_a_device_need_their_sum():
    """Where they can't be read without waiting, sizes follow from media_total alone."""
    locations = locations_of(".i.i", "i...").to("meta")
    counts = torch.tensor([2, 1], device="meta")
    with pytest.raises(ValueError, match="media_total: expected the sum of num_media.* on meta"):
        MediaLayout.from_media_locations(locations, counts)
    layout = MediaLayout.from_media_locations(locations, counts, media_total=3)
    assert layout.media_total == layout.max_media == 3
    on_cpu = MediaLayout.from_media_locations(locations_of(".i.i", "i..."), [2, 1])
    for leaf, expected in zip(*map(pytree.tree_leaves, (layout, on_cpu)), strict=True):
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
        assert leaf.device.type == "meta"


def test_from_intervals_is_what_from_media_locations_makes():
    made = MediaLayout.from_media_locations(locations_of(".i.i.", "i...."), [2, 1])
    given = MediaLayout.from_intervals(made.media_start.long(), made.media_end.long(), [2, 1], 1)
    assert given == made
    start, end = torch.tensor([[0, 1, 0]]), torch.tensor([[2, 3, 0]])
    groups = MediaLayout.from_intervals(start, end, 3, 2)
    assert groups.to_mask()[0].int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 7])
@pytest.mark.parametrize("attend", ATTEND)
def test_last(attend, num_tokens):
    locations = locations_of("..i.ii.", "i......", ".......")
    seqlens = torch.tensor([1, 0, 2, 5, 1])
    layout = MediaLayout.from_media_locations(locations, [3, 1, 1], attend, media_seqlens=seqlens)
    last = layout.last(num_tokens)
    first = 7 - num_tokens
    assert (last.batch_size, last.seqlen) == (3, num_tokens)
    assert torch.equal(last.to_mask(), layout.to_mask()[:, first:])
    assert torch.equal(last.past_last(), layout.past_last()[:, first:])
    assert torch.equal(last.media_seqlens, seqlens)
    if attend != "all_previous":
        assert_schedule(last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_narrow_integers(dtype):
    wide = torch.tensor([0, 3, 5]), torch.tensor([1, 0])
    layouts = [
        MediaLayout.packed(locations_of("..i.i"), cu_seqlens, 1, media_seqlens=seqlens)
        for cu_seqlens, seqlens in (wide, [each.to(dtype) for each in wide])
    ]
    assert layouts[0] == layouts[1]


def test_cat_along_the_batch():
    one = MediaLayout.from_media_locations(locations_of("..i.i"), 2)
    two = MediaLayout.from_media_locations(locations_of("i....", "....."), [1, 3])
    both = MediaLayout.cat([one, two, one])
    assert both == MediaLayout.from_media_locations(
        locations_of("..i.i", "i....", ".....", "..i.i"), [2, 1, 3, 2]
    )
    assert MediaLayout.cat([two]) == two
    padded = MediaLayout.from_media_locations(
        locations_of("..i.i"), 2, media_seqlens=torch.tensor([1, 0])
    )
    mixed = MediaLayout.cat([one, padded])
    assert torch.equal(mixed.to_mask(), torch.cat([one.to_mask(), padded.to_mask()]))
    # Every token of a medium of which nothing was said is valid.
    assert (mixed.media_seqlens[:2] > 2**30).all() and mixed.media_seqlens[2:].tolist() == [1, 0]


def test_cat_along_the_text():
    whole = MediaLayout.from_media_locations(locations_of("..i.i.", "i....."), 2)
    first, rest = (
        MediaLayout.from_intervals(whole.media_start[:, part], whole.media_end[:, part], 2, 1)
        for part in (slice(0, 3), slice(3, None))
    )
    assert MediaLayout.cat([first, rest], dim=1) == whole
    decoded = MediaLayout.cat([whole, whole.last(1), whole.last(1)], dim=1)
    assert torch.equal(decoded.to_mask()[:, 6:], whole.to_mask()[:, [-1, -1]])
    assert_schedule(decoded)


def _other_media(layout: MediaLayout) -> list[MediaLayout]:
    """As many media, but with lengths of their own."""
    media_seqlens = torch.full((layout.media_total,), 3)
    start, end = layout.media_start, layout.media_end
    return [MediaLayout.from_intervals(start, end, 2, 1, media_seqlens=media_seqlens)]


@pytest.mark.parametrize(
    ("layouts", "dim", "message"),
    [
        (lambda one, _: [], 0, "layouts: expected at least one"),
        (lambda one, _: [one], 2, r"dim: expected 0 \(batch\) or 1 \(text\), got 2"),
        (lambda one, _: [one], -1, "dim: expected 0 .* got -1"),
        (lambda one, _: [one, one.last(3)], 0, r"layouts\[1\]: 1 x 3 tokens.* 1 x 5 tokens.*dim 0"),
        (lambda one, two: [one, two], 1, r"layouts\[1\]: 2 x 5 tokens, 4 media.* dim 1"),
        (
            lambda one, _: [one, one.last(2), *_other_media(one)],
            1,
            r"layouts\[2\]: its media are not",
        ),
        (lambda one, _: [one, one.to("meta")], 0, r"layouts\[1\]: .* on meta does not fit"),
    ],
)
def test_cat_refuses(layouts, dim, message):
    one = MediaLayout.from_media_locations(locations_of("..i.i"), 2)
    two = MediaLayout.from_media_locations(locations_of("i....", "....."), [1, 3])
    with pytest.raises(ValueError, match=message):
        MediaLayout.cat(layouts(one, two), dim)


def test_cat_of_a_layout_alone():
    layout = MediaLayout.from_media_locations(locations_of("..i.i"), 2)
    with pytest.raises(TypeError, match="layouts: expected several of them, got one MediaLayout"):
        MediaLayout.cat(layout)


def test_to_moves_every_tensor():
    layout = MediaLayout.from_media_locations(
        locations_of("..i.i"), 2, media_seqlens=torch.tensor([1, 0])
    )
    assert layout.to("cpu") == layout
    assert layout.to(None) is layout
    moved = layout.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert {leaf.device.type for leaf in pytree.tree_leaves(moved)} == {"meta"}
    assert (moved.media_total, moved.max_media, moved.max_media_per_token) == (2, 2, 1)


def test_equality():
    locations = locations_of("..i.i", "i....")
    layout = MediaLayout.from_media_locations(locations, 2)
    assert layout == MediaLayout.from_media_locations(locations.clone(), [2, 2])
    others = [
        MediaLayout.from_media_locations(locations_of("..i.i", ".i..."), 2),
        MediaLayout.from_media_locations(locations, [2, 1]),
        MediaLayout.from_media_locations(locations, 2, "next"),
        MediaLayout.from_media_locations(locations, 2, media_seqlens=torch.tensor([9, 9, 9, 9])),
        layout.last(4),
        layout.to("meta"),
        "a layout",
        None,
    ]
    for other in others:
        assert layout != other
    # Tokens after the last image token attend to nothing, and with "next" they are not past it.
    after = MediaLayout.from_media_locations(locations, 1, "next")
    assert after != MediaLayout.from_intervals(after.media_start, after.media_end, 1, 1)
    with pytest.raises(TypeError, match="unhashable type"):
        hash(layout)


def test_repr():
    locations = locations_of("..i.i", "i....")
    layout = MediaLayout.from_media_locations(locations, [2, 1])
    assert repr(layout) == "MediaLayout(2 x 5 tokens, 3 media on cpu, one medium a token)"
    layout = MediaLayout.from_media_locations(
        locations, [2, 1], "all_previous", media_seqlens=torch.tensor([1, 2, 3])
    )
    assert repr(layout) == (
        "MediaLayout(2 x 5 tokens, 3 media on cpu, up to 2 media a token, media_seqlens)"
    )


def test_plot():
    layout = MediaLayout.from_media_locations(locations_of("..i.i", "....."), [2, 0])
    axes = layout.plot()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("text token", "medium")
    assert axes.get_title() == "sample 0: 5 tokens, 2 attend to nothing"
    (image,) = axes.images
    assert image.get_array().astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    # The centre of a cell is its token and its medium; medium 0 is on top.
    assert tuple(image.get_extent()) == (-0.5, 4.5, 1.5, -0.5)
    assert layout.plot(1, ax=axes) is axes
    assert axes.get_title() == "sample 1: 5 tokens, 5 attend to nothing"
    axes.figure.canvas.draw()
    matplotlib.pyplot.close(axes.figure)
    with pytest.raises(IndexError, match="sample: expected 0 to 1, got 2"):
        layout.plot(2)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'flamingo_fast\[bench\]'"):
        MediaLayout.from_media_locations(locations_of("..i.i"), 2).plot()


@pytest.mark.parametrize("media_seqlens", [None, torch.tensor([1, 0, 3])])
def test_is_a_pytree_of_its_tensors(media_seqlens):
    layout = MediaLayout.from_media_locations(
        locations_of("..i.i", "i...."), [2, 1], media_seqlens=media_seqlens
    )
    leaves, spec = pytree.tree_flatten(layout)
    assert pytree.tree_unflatten(leaves, spec) == layout
    tensors = [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    assert {id(leaf) for leaf in leaves if leaf is not None} == set(map(id, tensors))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    nested = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor + 0, {"a": [layout, 1]})
    assert nested["a"][0] == layout and nested["a"][0] is not layout


def test_copies():
    layout = MediaLayout.from_media_locations(
        locations_of("..i.i"), 2, "all_previous", media_seqlens=torch.tensor([1, 0])
    )
    for copied in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert copied == layout
        assert copied.media_start.data_ptr() != layout.media_start.data_ptr()
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.media_total = 3


@pytest.mark.parametrize("attend", ATTEND)
def test_passes_through_torch_compile(attend):
    def build(locations):
        return MediaLayout.from_media_locations(locations, 3, attend).last(4)

    def use(layout):
        return layout.to_mask(), layout.attends(), layout.past_last()

    locations = locations_of("..i.ii.i", "........")
    layout = build(locations)
    built = torch.compile(build, fullgraph=True, backend="eager")(locations)
    assert built == layout
    used = torch.compile(use, fullgraph=True, backend="eager")(layout)
    for tensor, expected in zip(used, use(layout), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("attend", ["previous", "next"])
@pytest.mark.parametrize("seed", range(12))
def test_schedule_of_random_layouts(seed, attend):
    assert_schedule(_random_layout(seed, attend)[2])


@pytest.mark.parametrize("seed", range(8))
def test_schedule_of_random_intervals(seed):
    """In any order, rows without a medium among them."""
    generator = torch.Generator().manual_seed(seed)
    batch, seqlen, num_media = 3, 200, 6
    keys = torch.randint(0, 2 * num_media + 1, (batch, seqlen), generator=generator)
    start = keys // 2
    end = start + keys % 2
    assert_schedule(MediaLayout.from_intervals(start, end, num_media, 1))


def _at(seqlen: int, *positions: int) -> torch.Tensor:
    locations = torch.zeros(1, seqlen, dtype=torch.bool)
    locations[0, list(positions)] = True
    return locations


@pytest.mark.parametrize(
    ("locations", "num_media"),
    [
        pytest.param(_at(805, *range(0, 805, 161)), 5, id="every_medium_just_split"),
        pytest.param(_at(805, *range(0, 805, 161)).repeat(3, 1), 5, id="of_every_sample_too"),
        pytest.param(_at(320, 0, 160), 2, id="two_of_the_longest_unsplit"),
        pytest.param(_at(321, 0, 160), 2, id="one_row_more"),
        pytest.param(_at(257, 0), 1, id="a_row_more_than_two_chunks"),
        pytest.param(_at(2048, 0), 1, id="one_medium_of_2048_rows"),
        pytest.param(_at(2049, 1), 1, id="one_medium_of_2048_rows_of_a_longer_chunk"),
        pytest.param(_at(1000), 3, id="rows_without_a_medium_alone"),
        pytest.param(_at(300, 0, 1, 2), 1, id="most_rows_past_the_last"),
        pytest.param(_at(40, *range(40)), 40, id="a_medium_at_every_token"),
        pytest.param(_at(7, 3).repeat(5, 1), [0, 0, 1, 0, 2], id="samples_without_media"),
        pytest.param(_at(300, 3).repeat(3, 1), [0, 0, 0], id="no_media_at_all"),
        pytest.param(_at(300, 3).repeat(2, 1), [1, 0], id="no_media_in_the_last_sample"),
    ],
)
def test_schedule_at_its_limits(locations, num_media):
    assert_schedule(MediaLayout.from_media_locations(locations, num_media))


def test_slots_of_media_of_a_chunk_and_a_half():
    layout = MediaLayout.from_media_locations(_at(768, 0, 192, 384, 576), 4)
    assert int(layout.work_items[:, 3].max()) + 1 == 8 <= num_slots(1, 768)


@pytest.mark.parametrize(
    ("seqlen", "rows"), [(1, 128), (2048, 128), (2049, 256), (8192, 512), (32768, 2048)]
)
def test_chunk_rows(seqlen, rows):
    assert chunk_rows(seqlen) == rows


@pytest.mark.parametrize(
    ("batch", "seqlen", "num_media"), set(itertools.product([0, 2], repeat=3)) - {(2, 2, 2)}
)
@pytest.mark.parametrize("attend", ATTEND)
def test_empty(attend, batch, seqlen, num_media):
    layout = MediaLayout.from_media_locations(
        torch.ones(batch, seqlen, dtype=torch.bool), num_media, attend
    )
    assert layout.to_mask().shape == (batch, seqlen, num_media)
    assert layout.attends().shape == layout.past_last().shape == (batch, seqlen)
    assert not layout.attends().any()
    assert MediaLayout.cat([layout.last(0), layout], dim=1) == layout
    assert MediaLayout.cat([layout, layout]).batch_size == 2 * batch
    assert f"{batch} x {seqlen} tokens" in repr(layout)
    layout.validate()
    if layout.max_media_per_token <= 1:
        assert_schedule(layout)


@pytest.mark.parametrize(
    ("interval", "before", "message"),
    [
        ((2, 1), (0, 0), r"\[2, 1\): expected 0 <= start <= end <= 3 media of the sample"),
        ((-1, 0), (0, 0), r"\[-1, 0\): expected 0 <= start <= end <= 3 media"),
        ((3, 4), (0, 0), r"\[3, 4\): expected 0 <= start <= end <= 3 media"),
        ((0, 2), (0, 0), r"\[0, 2\): more than max_media_per_token 1 media"),
    ],
)
def test_validate_names_the_token(interval, before, message):
    start, end = START.clone(), START.clone()
    start[1], end[1] = before
    start[1, 2:], end[1, 2:] = interval
    with pytest.raises(ValueError, match="token 2 of sample 1 attends to media " + message):
        MediaLayout.from_intervals(start, end, [1, 3], 1)


@pytest.mark.parametrize(
    ("cu_media", "message"),
    [
        ([0, 3, 3], r"cu_media: expected 0 to media_total 4, never falling; got \[0, 3, 3\]"),
        ([1, 3, 4], r"cu_media: .* got \[1, 3, 4\]"),
        ([0, 5, 4], r"cu_media: .* got \[0, 5, 4\]"),
        ([0, 1, 4], "num_media: at most 2 expected, got 3"),
    ],
)
def test_validate_checks_the_counts(cu_media, message):
    layout = MediaLayout.from_media_locations(LOCATIONS, 2)
    layout.validate()
    changed = dataclasses.replace(layout, cu_media=torch.tensor(cu_media, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        changed.validate()


@pytest.mark.parametrize("num_tokens", [-1, 5])
def test_last_refuses_what_it_does_not_have(num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens: expected 0 to 4, .*; got {num_tokens}"):
        MediaLayout.from_media_locations(LOCATIONS, 2).last(num_tokens)


def test_uniform_rows_are_kept_for_the_next_layer_and_never_inside_a_mode():
    locations = torch.zeros(1, 4, dtype=torch.bool)
    locations[0, [0, 2]] = True
    layout = MediaLayout.from_media_locations(locations, 1)
    with FlopCounterMode(display=False):
        inside = layout.uniform_rows(False, True)
    rows = layout.uniform_rows(False, True)
    assert rows is not inside and rows.tolist() == [[False, False, True, True]]
    assert layout.uniform_rows(False, True) is rows
    assert layout.uniform_rows(True, False) is None


def test_uniform_rows_follow_changes_of_the_layout_and_are_not_pickled():
    one, other = torch.zeros(2, 1, 4, dtype=torch.bool)
    one[0, [0, 2]], other[0, [0, 3]] = True, True
    layout, changed = (MediaLayout.from_media_locations(x, 1) for x in (one, other))
    fresh = len(pickle.dumps(layout))
    assert layout.uniform_rows(False, True).tolist() == [[False, False, True, True]]
    assert len(pickle.dumps(layout)) == fresh
    for target, source in zip(pytree.tree_leaves(layout), pytree.tree_leaves(changed), strict=True):
        target.copy_(source)
    assert layout.uniform_rows(False, True).tolist() == [[False, False, False, True]]
