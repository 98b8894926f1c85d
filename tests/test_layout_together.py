"""Layouts of all kinds: after one another, moved, compared, compiled, printed and drawn."""

import copy
import pickle

import matplotlib
import pytest
import torch
from layout_cases import (
    assert_attends_as,
    assert_media_rows,
    assert_schedule,
    locations_of,
    random_mask,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from flamingo_fast.layout import MediaLayout

matplotlib.use("Agg")


def _layouts() -> dict[str, MediaLayout]:
    """As many tokens and media each."""
    locations = locations_of("..i.i", "i....")
    mask = random_mask(5, 2, 5, 2)
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
    assert_media_rows(layout, mask)
    assert layout.max_media_per_token == max(part.max_media_per_token for part in parts)
    if layout.max_media_per_token == 1:
        assert layout.media_bits is None
        assert_schedule(layout)
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
    few, many = random_mask(1, 1, 4, 3), random_mask(2, 2, 4, 70)
    parts = [MediaLayout.from_media_mask(mask) for mask in (few, many)]
    for first, second in (parts, parts[::-1]):
        layout = MediaLayout.cat([first, second])
        masks = [
            torch.nn.functional.pad(p.to_mask(), (0, 70 - p.max_media)) for p in (first, second)
        ]
        assert_attends_as(layout, torch.cat(masks))


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
    mask = random_mask(0, 2, 11, num_media)
    last = MediaLayout.from_media_mask(mask).last(num_tokens)
    assert_attends_as(last, mask[:, 11 - num_tokens :])


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
    mask = random_mask(4, 2, 5, 3)
    mask[0, 0] = torch.tensor([True, False, True])
    layout = MediaLayout.from_media_mask(mask)
    assert layout == MediaLayout.from_media_mask(mask.long(), 3, num_media=3, media_total=6)
    # The same interval without its hole.
    filled = mask.clone()
    filled[0, 0, 1] = True
    assert layout != MediaLayout.from_media_mask(filled)
    assert layout != MediaLayout.from_media_mask(mask, media_seqlens=torch.full((6,), 9))
    assert layout != layout.last(4)
    locations = locations_of("i.i..", "..i.i")
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
    packed = MediaLayout.packed(locations_of("i..i.", "....i"), [0, 3, 5, 10], 1)
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
    mask = random_mask(7, 2, 8, 5)
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
