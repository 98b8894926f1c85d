"""masked_cross_attention stays in bounds whatever a layout of one medium a token holds."""

import dataclasses

import pytest
import torch
import torch._inductor.config
from attention_cases import assert_bits_equal
from attention_contract import BF16, inputs_of, previous_layout, run_layout

import flamingo_fast as ff
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

LARGEST, LOWEST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("work_items", (LARGEST, 0, 20, -1)),
        ("work_items", (LOWEST, 3, 20, 0)),
        ("work_items", (2, 0, 9, 1)),
        ("work_items", (0, LOWEST, 30, -1)),
        ("work_items", (1, -5, LARGEST, 0)),
        ("work_items", (1, 290, 700, -1)),
        ("work_items", (1, LARGEST, LARGEST, 0)),
        ("work_items", (1, 2**30, 300, 0)),
        ("work_items", (-1, 2**30 + 7, 2**30 + 9, 0)),
        ("work_items", (-1, -9, LARGEST, 0)),
        ("work_items", (0, 0, LOWEST + 5000, -1)),
        ("work_items", (-1, 0, LOWEST + 5000, -1)),
        ("work_items", (0, 5, 9, LARGEST)),
        ("work_items", (0, 5, 9, LOWEST)),
        ("work_items", (0, 5, 9, 4)),
        ("split_media", (LARGEST, 0, 2)),
        ("split_media", (LOWEST, 0, 2)),
        ("split_media", (2, 0, 2)),
        ("split_media", (0, LOWEST, LARGEST)),
        ("split_media", (0, LARGEST, LOWEST)),
        ("split_media", (1, 3, 5)),
    ],
    ids=str,
)
def test_kernels_stay_in_bounds_whatever_a_layout_holds(field, row):
    """One row alone: two that claim the same tokens would be a race, reported first."""
    layout = previous_layout(images=((3, 171),), seqlen=340)
    hostile = dataclasses.replace(layout, **{field: torch.tensor([row], dtype=torch.int32)})
    with guard() as guarded:
        run_layout(hostile, "triton")
    assert [launch.kernel for launch in guarded.launches] == [
        "_one_medium_fwd_kernel",
        "_one_medium_bwd_kernel",
        "_sum_split_media_kernel",
    ]


@pytest.mark.parametrize(("row", "clamped"), [(LARGEST, 23), (24, 23), (LOWEST, 0), (-1, 0)])
def test_kernels_stay_in_bounds_whatever_the_order_of_rows(row, clamped):
    """In the place of the row that it is clamped to, so that no row is in two items."""
    layout = previous_layout(images=((0, 5), (0, 11)))
    layout = ff.MediaLayout.from_intervals(layout.media_start, layout.media_end, 2, 1)
    hostile = torch.where(layout.row_index == clamped, row, layout.row_index).int()
    assert (hostile == row).sum() == 1
    with guard() as guarded:
        found = run_layout(dataclasses.replace(layout, row_index=hostile), "triton")
    assert len(guarded.launches) == 2
    assert_bits_equal(found, run_layout(layout, "triton"))


def test_kernels_stay_in_bounds_whatever_lengths_media_have():
    lengths = torch.tensor([LARGEST, LOWEST, -1, 9], dtype=torch.int32)
    hostile = dataclasses.replace(previous_layout(), media_seqlens=lengths)
    sound = previous_layout(2, torch.tensor([8, 0, 0, 8]))
    with guard():
        assert_bits_equal(run_layout(hostile, "triton"), run_layout(sound, "triton"))


def test_an_item_across_samples_ends_with_its_own():
    layout = previous_layout(images=((0, 5), (0, 5)))
    items = torch.tensor([[0, 4, 20, -1], [-1, 20, LARGEST, 5]], dtype=torch.int32)
    layout = dataclasses.replace(layout, work_items=items)
    with guard():
        out = ff.masked_cross_attention(**inputs_of(layout), layout=layout, impl="triton")
    written = out.detach().isfinite().all(-1).all(-1).flatten()
    assert written.tolist() == [4 <= row < 12 or row >= 20 for row in range(24)]


@pytest.mark.parametrize("values", [(-3, 6), (LOWEST, LARGEST), (0, 400)], ids=str)
def test_schedules_of_garbage_are_built_and_stay_in_bounds(values):
    """As of intervals on a GPU, which nobody validates; a row that they make no sense of is 0."""
    generator = torch.Generator().manual_seed(0)
    layout = previous_layout(images=((0, 90), (5, 40)), seqlen=100)
    start, end = layout.media_start.clone(), layout.media_end.clone()
    hostile = torch.rand(start.shape, generator=generator) < 0.3
    for bound in (start, end):
        garbage = torch.randint(*values, bound.shape, dtype=torch.int32, generator=generator)
        bound[hostile] = garbage[hostile]
    layout = ff.MediaLayout._with_schedule(
        start, end, layout.cu_media, None, 4, 2, 1, in_order=False
    )
    with guard() as guarded:
        found = run_layout(layout, "triton")
    assert len(guarded.launches) == 2
    assert all(tensor.isfinite().all() for tensor in found.values())
    flat = layout.cu_media[:-1, None] + start
    exists = (end > start) & (flat >= 0) & (flat < 4)
    assert exists.any() and not exists.all()
    assert (found["out"].abs().sum((2, 3)) > 0).equal(exists)


def test_rows_of_media_beyond_media_total_get_nothing(guarded):
    """Counts on a GPU that add up to more than they are said to."""
    layout = previous_layout(images=((0, 5), (2, 8)), seqlen=12)
    cu_media = torch.tensor([0, 2, 4]).clamp(max=3).int()
    limit = (cu_media[1:] - cu_media[:-1])[:, None]
    start, end = (torch.minimum(b, limit) for b in (layout.media_start, layout.media_end))
    layout = ff.MediaLayout._with_schedule(start, end, cu_media, None, 3, 3, 1, in_order=True)
    q, k, v = torch.randn(2, 12, 1, 8), *torch.randn(2, 3, 4, 1, 8)
    out = ff.masked_cross_attention(q, k, v, layout, impl="triton")
    assert out.isfinite().all() and (out[1, 8:] == 0).all() and (out[1, 2:8] != 0).all()


def test_offsets_beyond_32_bits():
    """Batch, token, head, medium and key of strides that only 64 bits count."""
    far = 2**31 + 64
    memory = torch.empty(far + 2**16, dtype=BF16)
    layout = previous_layout(images=((0, 3), (1, 2)), seqlen=4)
    near = {name: tensor.detach() for name, tensor in inputs_of(layout).items()}
    views = {
        "batch": (far, 2**9, 2**6, 1),
        "token": (2**9, far // 3 // 8 * 8, 2**6, 1),
        "head": (2**9, 2**11, far // 3 // 8 * 8, 1),
    }
    for strides in views.values():
        q = memory.as_strided(near["q"].shape, strides).copy_(near["q"])
        with guard():
            out = ff.masked_cross_attention(q, near["k"], near["v"], layout, impl="triton")
            expected = ff.masked_cross_attention(**near, layout=layout, impl="triton")
        assert torch.equal(out, expected)
    for strides in ((far // 3 // 8 * 8, 2**10, 2**6, 1), (2**6, far // 7 // 8 * 8, 2**9, 1)):
        k = memory.as_strided(near["k"].shape, strides).copy_(near["k"])
        with guard():
            out = ff.masked_cross_attention(near["q"], k, near["v"], layout, impl="triton")
        assert torch.equal(out, expected)
