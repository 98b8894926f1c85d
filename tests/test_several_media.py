"""masked_cross_attention where tokens attend to several media, or to media of many tokens."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    BF16,
    FP16,
    HEAD_DIMS,
    MEMORY_LAYOUTS,
    AttentionCase,
    assert_bits_equal,
    cases,
    check,
    fast_impls,
    impls,
    run,
    run_on,
    with_nan,
)

from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import cpu_several_media
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

FORWARD = ["_several_media_fwd_kernel"]
SPLIT_FORWARD = [*FORWARD, "_combine_splits_kernel"]
BACKWARD = ["_several_media_dq_kernel", "_several_media_dkv_kernel"]

ALL_PREVIOUS = {
    "two_samples": AttentionCase(images=((3, 9), (0, 5)), attend="all_previous"),
    "ragged": AttentionCase(
        images=((3, 9, 20), (), (5,)), num_media=(2, 1, 0), attend="all_previous", dtype=BF16
    ),
    "media_seqlens": AttentionCase(
        images=((3, 4, 9), (7,)), attend="all_previous", media_seqlens=(3, 0, 9, 1), dtype=FP16
    ),
    "no_valid_token": AttentionCase(
        images=((3, 9),), attend="all_previous", media_seqlens=(0, 0), unattended="uniform"
    ),
    "uniform": AttentionCase(
        images=((3, 9), (7,)),
        attend="all_previous",
        media_seqlens=(3, 0, 9),
        unattended="uniform",
        heads=4,
        kv_heads=2,
    ),
    "decode": AttentionCase(images=((3, 9), ()), num_media=2, attend="all_previous", last=1),
    "decode_gqa": AttentionCase(
        images=((3, 9), (5,)), attend="all_previous", last=1, heads=8, kv_heads=2, dtype=BF16
    ),
    "mqa": AttentionCase(
        images=((3, 9), (5,)), attend="all_previous", heads=8, kv_heads=1, dtype=FP16
    ),
    "gqa_of_3": AttentionCase(images=((3, 9), (5,)), attend="all_previous", heads=6, kv_heads=2),
}

DENSE = {
    "dense": AttentionCase(images=((7, 15), ()), num_media=2, unattended="dense", dense_kv=True),
    "ragged": AttentionCase(
        images=((7,), (), (3, 4)), num_media=(2, 0, 1), unattended="dense", dtype=BF16
    ),
    "past_last_uniform": AttentionCase(
        images=((2, 9, 14), (3, 4)), num_media=(2, 1), unattended="dense", past_last="uniform"
    ),
    "past_last_zero": AttentionCase(
        images=((2, 9, 14),), num_media=2, unattended="dense", media_seqlens=(4, 2)
    ),
    "media_seqlens": AttentionCase(
        images=((3, 9), (5,)), media_seqlens=(0, 2, 0), unattended="dense"
    ),
    "all_previous": AttentionCase(
        images=((7, 15), (2,)), attend="all_previous", unattended="dense", heads=4, kv_heads=1
    ),
    "all_previous_media_seqlens": AttentionCase(
        images=((7, 8), (2,)),
        attend="all_previous",
        unattended="dense",
        media_seqlens=(3, 0, 4),
        dtype=BF16,
    ),
    "decode": AttentionCase(
        images=((), (5,)), num_media=2, unattended="dense", last=1, media_seqlens=(5, 1, 0, 4)
    ),
}

EMPTY = {
    "no_media": AttentionCase(images=((2,), ()), num_media=0, unattended="dense"),
    "no_keys": AttentionCase(images=((2, 9),), num_keys=0, attend="all_previous"),
    "no_tokens": AttentionCase(seqlen=0, images=((), ()), num_media=(2, 1), unattended="dense"),
    "no_query": AttentionCase(images=((2, 9),), last=0, attend="all_previous"),
    "no_samples": AttentionCase(images=(), num_media=2, attend="all_previous"),
}


def _mask(*samples: str) -> torch.Tensor:
    """Of "101 010" the first token attends to media 0 and 2, the second one to medium 1."""
    return torch.tensor(
        [[[bit == "1" for bit in token] for token in sample.split()] for sample in samples]
    )


def _random_mask(shape: tuple[int, int, int], density: float) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return torch.rand(shape, generator=generator) < density


def _holes(**options) -> MediaLayout:
    mask = _mask("101 101 010 111 000 101", "001 110 000 000 100 011")
    return MediaLayout.from_media_mask(mask, **options)


def _ragged_mask_of_70_media() -> MediaLayout:
    mask = _random_mask((2, 6, 70), 0.2)
    mask[1, :, 3:] = False
    return MediaLayout.from_media_mask(mask, num_media=[70, 3])


def _groups() -> MediaLayout:
    """The first two media, the last three, all, in no order; and a token without any."""
    start = torch.tensor([[0, 2, 0, 2, 0, 3], [1, 1, 0, 4, 2, 1]])
    end = torch.tensor([[2, 5, 5, 5, 2, 3], [4, 4, 4, 4, 4, 2]])
    return MediaLayout.from_intervals(start, end, [5, 4], 5)


def _tiles(**options) -> MediaLayout:
    """Two tiles of two and of one image, the rest padding; text before the first image."""
    mask = torch.zeros(2, 5, 2, 4, dtype=torch.bool)
    mask[0, 1:, 0, :2] = mask[0, 3:, 1, :3] = mask[1, 2:, 1, :1] = True
    return MediaLayout.from_tile_mask(mask, 3, **options)


def _two_documents_a_row() -> MediaLayout:
    locations = AttentionCase(12, images=((0, 4, 8), (5, 6))).media_locations()
    return MediaLayout.packed(locations, [0, 7, 12, 15, 24], [2, 1, 0, 2], "all_previous")


PATTERNS: dict[str, tuple[AttentionCase, Callable[[], MediaLayout]]] = {
    "holes": (AttentionCase(6, num_media=3, batch=2, heads=4, kv_heads=2), _holes),
    "holes_media_seqlens": (
        AttentionCase(6, num_media=3, batch=2, dtype=BF16),
        lambda: _holes(media_seqlens=torch.tensor([4, 0, 9, 1, 5, 2])),
    ),
    "holes_dense": (
        AttentionCase(6, num_media=3, batch=2, unattended="dense", dtype=FP16),
        lambda: _holes(media_seqlens=torch.tensor([4, 0, 9, 1, 5, 2])),
    ),
    "70_media": (
        AttentionCase(6, num_media=(70, 3), batch=2, num_keys=2, dtype=BF16),
        _ragged_mask_of_70_media,
    ),
    "130_media_of_1_key": (
        AttentionCase(4, num_media=130, num_keys=1, heads=1),
        lambda: MediaLayout.from_media_mask(_random_mask((1, 4, 130), 0.1)),
    ),
    "groups": (AttentionCase(6, num_media=(5, 4), batch=2, dtype=BF16), _groups),
    "tiles": (
        AttentionCase(5, num_media=2, batch=2, num_keys=12, heads=4, kv_heads=1),
        _tiles,
    ),
    "tiles_dense": (
        AttentionCase(5, num_media=2, batch=2, num_keys=12, unattended="dense", dtype=BF16),
        _tiles,
    ),
    "one_image_of_tiles_a_token": (
        AttentionCase(3, num_media=2, batch=2, num_keys=12, unattended="dense", dense_kv=True),
        lambda: MediaLayout.from_tile_mask(
            _mask("11110000 11110000 00001000", "00000000 00001110 00001110").unflatten(2, (2, 4)),
            3,
            max_media_per_token=1,
        ),
    ),
    "packed": (
        AttentionCase(12, num_media=(3, 2), batch=2, dtype=BF16),
        _two_documents_a_row,
    ),
    "decode_of_holes": (
        AttentionCase(6, num_media=3, batch=2, last=2, heads=4, kv_heads=2),
        lambda: _holes().last(2),
    ),
}

# Around the blocks of keys, which have at most 32 in fp32 and 64 in 16 bits.
KEYS = [(1, torch.float32), (1, BF16), (16, FP16), (31, torch.float32), (64, BF16)]
KEYS += [(70, torch.float32), (133, torch.float32), (200, BF16), (300, FP16)]


def _launched(guarded) -> list[str]:
    return [launch.kernel for launch in guarded.launches]


@impls
@cases(ALL_PREVIOUS)
def test_all_previous(case, impl, guarded):
    check(case, impl)
    assert _launched(guarded) == (FORWARD + BACKWARD if impl == "triton" else [])


@impls
@cases(DENSE)
def test_dense(case, impl, guarded):
    check(case, impl)
    assert _launched(guarded) == (FORWARD + BACKWARD if impl == "triton" else [])


@impls
@pytest.mark.parametrize(("case", "make_layout"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns(case, make_layout, impl, guarded):
    check(case, impl, make_layout())
    assert _launched(guarded) == (FORWARD + BACKWARD if impl == "triton" else [])


@impls
@pytest.mark.parametrize(("head_dim", "dtype"), HEAD_DIMS)
def test_head_dims(head_dim, dtype, impl, guarded):
    case = AttentionCase(
        12, images=((5, 9),), head_dim=head_dim, dtype=dtype, attend="all_previous"
    )
    check(case, impl)


@impls
@pytest.mark.parametrize(("num_keys", "dtype"), KEYS)
def test_keys_of_a_medium(num_keys, dtype, impl, guarded):
    case = AttentionCase(12, images=((5, 9),), num_keys=num_keys, dtype=dtype, heads=1)
    check(dataclasses.replace(case, attend="all_previous"), impl)


@impls
def test_decoding_over_the_tiles_of_an_image_of_mllama(impl, guarded):
    """4 x 1601 keys, of which the last tile is padding; the second token attends to nothing."""
    mask = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 0, 0]]])[:, None]
    case = AttentionCase(1, num_media=1, batch=2, num_keys=6404, kv_heads=1, dtype=BF16)
    case = dataclasses.replace(case, unattended="dense")
    check(case, impl, MediaLayout.from_tile_mask(mask, 1601))
    if impl == "triton":
        assert _launched(guarded)[:2] == ["_several_media_fwd_kernel", "_combine_splits_kernel"]


# (runs of rows by the images they attend to, of which tiles are valid), and flash backwards: one
# for each range of keys of a run. Rows that attend to nothing attend to everything.
LONG_RUNS = {
    "one_image": ([(3, ""), (140, "0")], "1111", 1),
    "padding": ([(3, ""), (140, "0")], "1110", 1),
    "consecutive_images": ([(3, ""), (140, "0"), (7, "01"), (150, "1")], "1111 1111", 2),
    "not_neighbours": ([(140, "02"), (130, "1"), (2, "")], "1111 1111 1111", 3),
    "everything": ([(140, "")], "1110 1111", 1),
    "cut": ([(400, "0")], "1111", 2),
    "cut_often": ([(1100, "0")], "1111", 4),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("runs", "tiles", "calls"), LONG_RUNS.values(), ids=LONG_RUNS.keys())
def test_long_runs_of_rows_that_attend_to_the_same_keys(runs, tiles, calls, dtype, monkeypatch):
    images = tiles.split()
    mask = torch.zeros(1, sum(rows for rows, _ in runs), len(images), 4, dtype=torch.bool)
    token = 0
    for rows, attended in runs:
        for image in map(int, attended):
            mask[0, token : token + rows, image] = torch.tensor([c == "1" for c in images[image]])
        token += rows
    layout = MediaLayout.from_tile_mask(mask, 275)
    case = AttentionCase(
        token, num_media=len(images), heads=8, kv_heads=1, num_keys=1100, dtype=dtype
    )
    flash, called = cpu_several_media._flash_backward, []
    monkeypatch.setattr(cpu_several_media, "_LONG_KEYS", 825)
    monkeypatch.setattr(cpu_several_media, "_LONGEST_ROWS", 1200)
    monkeypatch.setattr(
        cpu_several_media,
        "_flash_backward",
        lambda *arguments, **options: called.append(1) or flash(*arguments, **options),
    )
    check(dataclasses.replace(case, unattended="dense"), "torch", layout)
    assert len(called) == calls


@impls
@pytest.mark.parametrize("unattended", ["zero", "dense"])
@pytest.mark.parametrize("num_keys", [70, 133])
def test_valid_tokens_of_media_of_several_blocks(num_keys, unattended, impl, guarded):
    case = AttentionCase(
        9,
        images=((2, 3, 5), (1,)),
        num_keys=num_keys,
        heads=2,
        kv_heads=1,
        attend="all_previous",
        media_seqlens=(33, 0, 999, 64),
        unattended=unattended,
    )
    check(case, impl)


@impls
@pytest.mark.parametrize("shuffled", [False, True])
def test_one_medium_a_token_of_more_tokens_than_the_one_medium_kernels_take(
    shuffled, impl, guarded
):
    case = AttentionCase(
        12, images=((3, 9), (0,)), num_keys=133, heads=2, kv_heads=1, shuffled=shuffled
    )
    check(case, impl)
    assert _launched(guarded) == (FORWARD + BACKWARD if impl == "triton" else [])


def test_one_hot_masks_that_are_said_to_be_take_the_one_medium_kernels(guarded):
    mask = _mask("100 100 010 000", "001 000 010 010")
    check(AttentionCase(4, num_media=3, batch=2), "triton", MediaLayout.from_media_mask(mask, 1))
    assert _launched(guarded) == ["_one_medium_fwd_kernel", "_one_medium_bwd_kernel"]


@impls
@pytest.mark.parametrize("layouts", MEMORY_LAYOUTS, ids=str)
def test_memory_layouts(layouts, impl, guarded):
    case = {"seqlen": 12, "images": ((3, 9), (0, 5)), "num_keys": 7, "dtype": BF16} | layouts
    check(AttentionCase(**case, attend="all_previous"), impl)


SPLIT = {
    "decode": AttentionCase(
        8, images=((0, 1, 2, 3),), num_keys=300, heads=4, kv_heads=2, last=2, attend="all_previous"
    ),
    "media_of_several_splits": AttentionCase(
        6,
        images=((1, 4), (3,)),
        num_keys=1030,
        attend="all_previous",
        heads=1,
        media_seqlens=(9, 1030, 1026),
        dtype=BF16,
    ),
    "dense": AttentionCase(
        4,
        images=((2, 3), ()),
        num_keys=1030,
        attend="all_previous",
        heads=1,
        media_seqlens=(7, 1025, 0, 3),
        num_media=2,
        unattended="dense",
    ),
    "many_media": AttentionCase(
        5, images=((1, 2, 4),), num_media=210, heads=1, unattended="dense", dtype=FP16
    ),
}


@impls
@cases(SPLIT)
def test_split_keys(case, impl, guarded):
    check(case, impl)
    assert _launched(guarded) == (SPLIT_FORWARD + BACKWARD if impl == "triton" else [])


SPLIT_MASKS: dict[str, tuple[AttentionCase, Callable[[], MediaLayout]]] = {
    "holes": (
        AttentionCase(4, num_media=9, num_keys=260, heads=2, kv_heads=1, dtype=BF16),
        lambda: MediaLayout.from_media_mask(
            _mask("100000001 000010000 000000000 111111111"),
            media_seqlens=torch.tensor([260, 0, 3, 259, 130, 1, 260, 0, 7]),
        ),
    ),
    "70_media_that_fill_tiles": (
        AttentionCase(3, num_media=70, num_keys=16, heads=1, unattended="dense", dtype=FP16),
        lambda: MediaLayout.from_media_mask(_random_mask((1, 3, 70), 0.05)),
    ),
}


@impls
@pytest.mark.parametrize(("case", "make_layout"), SPLIT_MASKS.values(), ids=SPLIT_MASKS.keys())
def test_split_keys_of_masks(case, make_layout, impl, guarded):
    check(case, impl, make_layout())
    assert _launched(guarded) == (SPLIT_FORWARD + BACKWARD if impl == "triton" else [])


@impls
@cases(EMPTY)
def test_empty(case, impl, guarded):
    check(case, impl)
    assert not guarded.launches


@impls
@pytest.mark.parametrize("frozen", ["k v", "q", "v", "q k"])
def test_frozen_inputs(frozen, impl, guarded):
    names = tuple(frozen.split())
    case = AttentionCase(12, images=((3, 9),), attend="all_previous", heads=1, frozen=names)
    measured = {comparison.name for comparison in check(case, impl)}
    assert measured == {"out", "dq", "dk", "dv"} - {f"d{name}" for name in names}


@impls
@pytest.mark.parametrize(
    ("softmax_scale", "dtype"), [(0.0, torch.float32), (-0.3, BF16), (3.0, FP16)]
)
def test_softmax_scale(softmax_scale, dtype, impl, guarded):
    case = AttentionCase(images=((3, 9), (5,)), attend="all_previous", dtype=dtype)
    check(dataclasses.replace(case, softmax_scale=softmax_scale), impl)


@impls
@pytest.mark.parametrize("num_keys", [5, 16, 300])
def test_large_scores(num_keys, impl, guarded):
    """A softmax that picks one key; its gradients cancel to nothing, so only that they are finite.

    The scores of some keys are below the smallest exponent.
    """
    case = AttentionCase(
        12, images=((1, 2, 4, 9),), attend="all_previous", num_keys=num_keys, softmax_scale=1e4
    )
    oracle = case.call_reference()(*(each.double() for each in case.inputs().values()))
    results = run(case.call(impl), case)
    torch.testing.assert_close(results["out"], oracle.float(), rtol=1e-2, atol=1e-2)
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize(
    "case",
    [
        ALL_PREVIOUS["ragged"],
        DENSE["media_seqlens"],
        SPLIT["media_of_several_splits"],
        AttentionCase(12, images=((3, 9),), head_dim=40, num_keys=16, attend="all_previous"),
    ],
    ids=str,
)
def test_masked_lanes_that_hold_huge_values(case):
    with guard(poison="huge") as guarded:
        check(case, "triton")
    assert guarded.launches


@pytest.mark.parametrize("seed", range(4))
@fast_impls
def test_random_masks(seed, impl, guarded):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    mask = torch.rand(2, 11, 9, generator=generator) < torch.rand(2, 1, 9, generator=generator)
    mask[1, :, 4:] = False
    lengths = torch.randint(0, 7, (13,), generator=generator)
    layout = MediaLayout.from_media_mask(mask, num_media=[9, 4], media_seqlens=lengths)
    case = AttentionCase(11, num_media=(9, 4), batch=2, heads=1, seed=seed)
    check(dataclasses.replace(case, unattended=("zero", "dense")[seed % 2]), impl, layout)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl):
    case = AttentionCase(6, num_media=3, batch=2, heads=2, kv_heads=1, head_dim=2, num_keys=3)
    case = dataclasses.replace(case, unattended="dense", dtype=torch.float64)
    layout = _holes(media_seqlens=torch.tensor([2, 0, 3, 1, 3, 2]))
    assert torch.autograd.gradcheck(case.call(impl, layout), tuple(case.inputs().values()))


def _assert_eager_is_the_reference(case: AttentionCase, layout: MediaLayout | None) -> None:
    case = dataclasses.replace(case, dtype=torch.float64)
    expected = run(case.call_reference(layout), case)
    for name, tensor in run(case.call_eager(layout), case).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "case", [*ALL_PREVIOUS.values(), *DENSE.values(), *EMPTY.values(), *SPLIT.values()], ids=str
)
def test_eager_means_what_the_reference_means(case):
    """Else its errors would widen what the three-way rule lets pass."""
    _assert_eager_is_the_reference(case, None)


@pytest.mark.parametrize(
    ("case", "make_layout"),
    [*PATTERNS.values(), *SPLIT_MASKS.values()],
    ids=[*PATTERNS, *SPLIT_MASKS],
)
def test_eager_means_what_the_reference_means_by_masks(case, make_layout):
    _assert_eager_is_the_reference(case, make_layout())


@fast_impls
@pytest.mark.parametrize("num_keys", [5, 64])
def test_nan_of_a_sample_stays_there(num_keys, impl, guarded):
    case = AttentionCase(12, images=((3, 9), (0, 5)), heads=1, num_keys=num_keys)
    case = dataclasses.replace(case, attend="all_previous", unattended="dense")
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    dirty = {"q": with_nan(inputs["q"], 1, 7), "k": with_nan(inputs["k"], 2, 4)}
    dirty["v"] = with_nan(inputs["v"], 3, 0, 0, 1)
    results = run_on(case, impl, dirty)
    for name, end in {"out": 1, "dq": 1, "dk": 2, "dv": 2}.items():
        assert torch.equal(results[name][:end], clean[name][:end])
        assert results[name][end:].isnan().any()


@fast_impls
@pytest.mark.parametrize("num_keys", [6, 64])
@pytest.mark.parametrize("unattended", ["zero", "uniform"])
def test_nan_of_padded_keys_goes_nowhere(unattended, num_keys, impl, guarded):
    case = AttentionCase(
        12,
        images=((3, 9), (2, 5)),
        heads=1,
        num_keys=num_keys,
        attend="all_previous",
        media_seqlens=(4, num_keys, 0, 1),
        unattended=unattended,
    )
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    padded = torch.arange(num_keys) >= torch.tensor(case.media_seqlens)[:, None]
    dirty = {name: with_nan(inputs[name], padded) for name in ("k", "v")}
    results = run_on(case, impl, inputs | dirty)
    assert_bits_equal(results, clean)
    assert not results["dk"][padded].any() and not results["dv"][padded].any()


@fast_impls
@pytest.mark.parametrize("num_keys", [5, 64, 300])
def test_nan_of_rows_before_the_first_medium_goes_nowhere(num_keys, impl, guarded):
    case = AttentionCase(8, images=((3, 4, 5, 6), (5,)), num_media=4, heads=1, num_keys=num_keys)
    case = dataclasses.replace(case, attend="all_previous")
    inputs = case.inputs()
    clean = run_on(case, impl, inputs)
    silent = ~case.layout().attends()
    assert silent.sum() == 3 + 5
    q, dout = with_nan(inputs["q"], silent), with_nan(case.dout(), silent)
    assert_bits_equal(run_on(case, impl, inputs | {"q": q}, dout), clean)


@fast_impls
@pytest.mark.parametrize("num_keys", [5, 64])
def test_nan_that_nothing_attends_to_stays_in_its_own_gradient(num_keys, impl, guarded):
    """A medium that masks leave out, as padded images of IDEFICS, and rows between others."""
    layout = MediaLayout.from_media_mask(
        _mask("000 101 101 000 101 100", "001 000 001 001 000 001")
    )
    case = AttentionCase(6, num_media=3, batch=2, heads=2, kv_heads=1, num_keys=num_keys)
    inputs = case.inputs()
    clean = run_on(case, impl, inputs, layout=layout)
    medium = run_on(
        case, impl, inputs | {name: with_nan(inputs[name], 1) for name in "kv"}, layout=layout
    )
    silent = ~layout.attends()
    rows = run_on(case, impl, inputs | {"q": with_nan(inputs["q"], silent)}, layout=layout)
    for results in (medium, rows):
        assert torch.equal(results["out"], clean["out"]) and torch.equal(results["dq"], clean["dq"])
    for name in ("dk", "dv"):
        assert torch.equal(medium[name][[0, 2, 3, 4, 5]], clean[name][[0, 2, 3, 4, 5]])
