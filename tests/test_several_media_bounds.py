"""masked_cross_attention stays in bounds whatever a layout of several media a token holds."""

import dataclasses
import functools

import pytest
import torch
from attention_cases import assert_bits_equal
from attention_contract import BF16, inputs_of, run_layout
from several_media_cases import (
    COMBINE,
    DKV,
    DQ,
    FORWARD,
    Setting,
    all_previous_layout,
    holes_layout,
    split_layout,
)

import flamingo_fast as ff
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

LARGEST, LOWEST = 2**31 - 1, -(2**31)


def _with_garbage(tensor: torch.Tensor, garbage: int, seed: int = 0) -> torch.Tensor:
    """A third of the elements are garbage."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(tensor.shape, generator=generator) < 0.3, garbage, tensor)


def _with_bounds(layout: MediaLayout, **bounds) -> MediaLayout:
    """As on a GPU, where nobody validates them."""
    return MediaLayout._with_schedule(
        bounds.get("media_start", layout.media_start),
        bounds.get("media_end", layout.media_end),
        layout.cu_media,
        layout.media_seqlens,
        layout.media_total,
        layout.max_media,
        layout.max_media_per_token,
        in_order=False,
        media_bits=layout.media_bits,
    )


@functools.cache
def _run_of_holes(num_keys: int, unattended: str) -> dict[str, torch.Tensor]:
    return Setting(holes_layout, num_keys, unattended).run("triton")


@pytest.mark.parametrize(
    ("num_keys", "unattended", "garbage"),
    [(8, "zero", LARGEST), (8, "dense", LOWEST), (64, "dense", -1), (64, "zero", LOWEST)],
)
@pytest.mark.parametrize("bound", ["media_start", "media_end"])
def test_intervals_of_garbage(bound, garbage, unattended, num_keys):
    """Their rows get something, and others what is right."""
    setting = Setting(holes_layout, num_keys, unattended)
    sound = holes_layout()
    values = _with_garbage(getattr(sound, bound), garbage)
    with guard():
        found = setting.run("triton", _with_bounds(sound, **{bound: values}))
    assert all(tensor.isfinite().all() for tensor in found.values())
    untouched = values == getattr(sound, bound)
    assert untouched.any() and not untouched.all()
    expected = _run_of_holes(num_keys, unattended)
    assert torch.equal(found["out"][untouched], expected["out"][untouched])


def test_an_interval_that_ends_far_before_it_starts_is_empty(guarded):
    """Also in the second word of its media."""
    mask = torch.zeros(1, 3, 70, dtype=torch.bool)
    mask[0, [0, 1, 2], [3, 68, 2]] = True
    layout = MediaLayout.from_media_mask(mask)
    ends = torch.tensor([[4, 69, LOWEST]], dtype=torch.int32)
    out = run_layout(_with_bounds(layout, media_end=ends), "triton", frozen=("k", "v"))["out"]
    assert not out[0, 2].any()
    expected = run_layout(layout, "triton", frozen=("k", "v"))["out"]
    assert torch.equal(out[:, :2], expected[:, :2])


@pytest.mark.parametrize(
    ("num_keys", "unattended", "garbage"),
    [
        (8, "zero", (LARGEST, LOWEST)),
        (8, "dense", (LOWEST, LARGEST)),
        (64, "zero", (LARGEST, LARGEST)),
        (64, "zero", (LOWEST, LOWEST)),
        (64, "dense", (17, -1)),
    ],
)
def test_rows_of_media_of_garbage(garbage, unattended, num_keys):
    """They choose the rows that dK and dV are summed over, and nothing else."""
    sound, setting = holes_layout(), Setting(holes_layout, num_keys, unattended)
    rows = [_with_garbage(sound.media_rows[:, bound], garbage[bound], bound) for bound in (0, 1)]
    with guard():
        found = setting.run("triton", dataclasses.replace(sound, media_rows=torch.stack(rows, 1)))
    assert all(tensor.isfinite().all() for tensor in found.values())
    expected = _run_of_holes(num_keys, unattended)
    assert torch.equal(found["out"], expected["out"])
    assert torch.equal(found["dq"], expected["dq"])


@pytest.mark.parametrize(
    ("num_keys", "unattended", "cu_media"),
    [
        (8, "zero", (LARGEST, 5, 10)),
        (64, "dense", (0, LARGEST, 10)),
        (8, "dense", (0, LOWEST, 10)),
        (64, "zero", (3, 7, LOWEST)),
        (64, "zero", (9, 4, 4)),
    ],
)
def test_counts_of_garbage(cu_media, unattended, num_keys):
    hostile = dataclasses.replace(
        holes_layout(), cu_media=torch.tensor(cu_media, dtype=torch.int32)
    )
    with guard() as guarded:
        found = Setting(holes_layout, num_keys, unattended).run("triton", hostile)
    assert [launch.kernel for launch in guarded.launches] == [FORWARD, DQ, DKV]
    assert found["out"].isfinite().all() and found["dq"].isfinite().all()


def test_a_medium_before_the_first_of_its_sample(guarded):
    """Its word of bits would be before the first one of all."""
    layout = MediaLayout.from_media_mask(torch.eye(140, dtype=torch.bool)[None, :1])
    hostile = dataclasses.replace(layout, cu_media=torch.tensor([139, 140], dtype=torch.int32))
    found = run_layout(hostile, "triton", num_keys=64, frozen=("q",))
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("num_keys", [8, 64])
def test_bits_beyond_the_media(num_keys, guarded):
    """They don't exist, and tokens outside of the interval are not attended to."""
    layout = holes_layout()
    beyond = layout.media_bits | ~((1 << layout.media_end.long()) - 1)[..., None]
    setting = Setting(holes_layout, num_keys)
    found = setting.run("triton", dataclasses.replace(layout, media_bits=beyond))
    assert_bits_equal(found, _run_of_holes(num_keys, "zero"))


def test_lengths_of_garbage():
    lengths = torch.tensor([LARGEST, LOWEST, -1, 9, 300, 0, LARGEST, 3, LOWEST, 8])
    setting = Setting(all_previous_layout)
    hostile = dataclasses.replace(all_previous_layout(), media_seqlens=lengths[:5].int())
    sound = all_previous_layout(media_seqlens=lengths[:5].clamp(0, 8))
    with guard():
        assert_bits_equal(setting.run("triton", hostile), setting.run("triton", sound))


def test_splits_of_garbage():
    layout = split_layout()
    lengths = torch.tensor([LARGEST, -1, LOWEST, 290], dtype=torch.int32)
    hostile = dataclasses.replace(
        layout,
        media_start=_with_garbage(layout.media_start, LOWEST),
        media_end=_with_garbage(layout.media_end, LARGEST, seed=1),
        media_seqlens=lengths,
    )
    with guard() as guarded:
        found = Setting(split_layout, 300, "dense").run("triton", hostile)
    assert [launch.kernel for launch in guarded.launches] == [FORWARD, COMBINE, DQ, DKV]
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("num_keys", [8, 64])
def test_media_that_counts_on_a_device_leave_out(num_keys, guarded):
    """They are nobody's: their gradients are zeros."""
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    counts = torch.tensor([3, 2], device="meta")
    on_meta = MediaLayout.from_media_mask(mask.to("meta"), num_media=counts, media_total=8)
    mask[1, :, 2] = False
    sound = MediaLayout.from_media_mask(mask, num_media=[3, 2])
    layout = MediaLayout._with_schedule(
        sound.media_start,
        sound.media_end,
        sound.cu_media,
        None,
        media_total=8,
        max_media=on_meta.max_media,
        max_media_per_token=3,
        in_order=False,
        media_bits=sound.media_bits,
    )
    found = run_layout(layout, "triton", num_keys=num_keys)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["dk"][5:].any() and not found["dv"][5:].any()
    assert found["dk"][:5].any(3).any(2).all()


def test_offsets_beyond_32_bits():
    """Batch, token, head, medium and key of strides that only 64 bits count."""
    far = 2**31 + 64
    memory = torch.empty(far + 2**16, dtype=BF16)
    layout = all_previous_layout(((0, 3), (1, 2)), (2, 2), seqlen=4)
    near = {name: tensor.detach() for name, tensor in inputs_of(layout).items()}
    attend = functools.partial(ff.masked_cross_attention, layout=layout, impl="triton")
    views = {
        "q": [(far, 2**9, 2**6, 1), (2**9, far // 3 // 8 * 8, 2**6, 1)]
        + [(2**9, 2**11, far // 3 // 8 * 8, 1)],
        "k": [(far // 3 // 8 * 8, 2**10, 2**6, 1), (2**6, far // 7 // 8 * 8, 2**9, 1)],
    }
    with guard():
        expected = attend(**near)
        for name, strides in views.items():
            for stride in strides:
                moved = memory.as_strided(near[name].shape, stride).copy_(near[name])
                assert torch.equal(attend(**near | {name: moved}), expected)
