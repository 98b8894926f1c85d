"""What the kernels for several media move and multiply, as the guard counts it."""

import dataclasses
import functools

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast.bench import several_media_kernel_work as kernel_work
from flamingo_fast.kernels.launch import Launch, Target, recording
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing.guard import LaunchRecord, guard

pytestmark = pytest.mark.matrix

PASSES = {
    "_several_media_fwd_kernel": "forward",
    "_combine_splits_kernel": "forward",
    "_several_media_dq_kernel": "dq",
    "_several_media_dkv_kernel": "dkv",
}


def _all_previous(seqlen: int, media: int) -> MediaLayout:
    generator = torch.Generator().manual_seed(0)
    locations = torch.zeros(1, seqlen, dtype=torch.bool)
    locations[0, torch.randperm(seqlen, generator=generator)[:media]] = True
    return MediaLayout.from_media_locations(locations, media, "all_previous")


def _random_mask(seqlen: int, media: int, density: float, lengths=None) -> MediaLayout:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, seqlen, media, generator=generator) < density
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32)
    return MediaLayout.from_media_mask(mask, media_seqlens=lengths)


def _with_silent_rows() -> MediaLayout:
    mask = torch.rand(2, 100, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :40] = False
    lengths = torch.tensor([30, 0, 64, 64, 7, 1], dtype=torch.int32)
    return MediaLayout.from_media_mask(mask, media_seqlens=lengths)


def _ragged() -> MediaLayout:
    locations = torch.zeros(3, 90, dtype=torch.bool)
    locations[0, [3, 50]] = locations[2, [10, 11, 80]] = True
    return MediaLayout.from_media_locations(locations, [2, 0, 3], "all_previous")


_call = functools.partial(
    kernel_work.Attention, heads=1, kv_heads=1, head_dim=64, num_keys=64, itemsize=2
)
CALLS = {
    "all_previous": _call(_all_previous(300, 6)),
    "all_previous_gqa": _call(_all_previous(100, 6), heads=4),
    "all_previous_fp32": _call(_all_previous(100, 3), head_dim=16, itemsize=4),
    "ragged": _call(_ragged(), heads=4, kv_heads=2),
    "random": _call(_random_mask(200, 6, 0.5)),
    "everything": _call(_random_mask(200, 6, 1.1)),
    "sparse": _call(_random_mask(150, 70, 0.01), num_keys=16),
    "seqlens": _call(_random_mask(200, 5, 0.5, [64, 0, 33, 1, 50])),
    "dense": _call(_with_silent_rows(), heads=4, kv_heads=2, dense=True),
    "one_key": _call(_random_mask(150, 70, 0.5), num_keys=1),
    "5_keys": _call(_random_mask(200, 20, 0.5), num_keys=5),
    "33_keys": _call(_random_mask(200, 6, 0.5), num_keys=33),
    "133_keys": _call(_all_previous(200, 4), num_keys=133),
    "257_keys": _call(_random_mask(200, 2, 0.7), num_keys=257),
    "split": _call(_random_mask(64, 20, 0.5)),
    "split_medium": _call(_all_previous(16, 1), heads=4, num_keys=1100, head_dim=16),
    "decode": _call(_all_previous(9, 2).last(1), heads=4, num_keys=1100, head_dim=16),
    "decode_dense": _call(
        _random_mask(1, 2, 0.0, [1100, 100]), num_keys=1100, head_dim=16, dense=True
    ),
}
SPLIT = {name for name in CALLS if name.startswith(("split", "decode"))}


def _run(call: kernel_work.Attention, watched) -> list[list]:
    """What `watched`, a context, saw of the forward and of the backward."""
    layout = call.layout
    dtype = torch.float32 if call.itemsize == 4 else torch.bfloat16
    query = (layout.batch_size, layout.seqlen, call.heads, call.head_dim)
    keys = (layout.media_total, call.num_keys, call.kv_heads, call.head_dim)
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in (query, keys, keys)]
    unattended = "dense" if call.dense else "zero"
    with watched() as forward:
        out = ff.masked_cross_attention(*tensors, layout, unattended=unattended, impl="triton")
    with watched() as backward:
        torch.autograd.grad(out, tensors, torch.randn_like(out))
    return [forward, backward]


def _measured(call: kernel_work.Attention) -> dict[str, LaunchRecord]:
    forward, backward = _run(call, guard)
    return {"forward": forward.total()} | {
        PASSES[launch.kernel]: launch for launch in backward.launches
    }


def _launches(call: kernel_work.Attention, target: Target) -> dict[str, Launch]:
    """The first one of each pass."""
    launches: dict[str, Launch] = {}
    for recorded in _run(call, functools.partial(recording, target)):
        for launch in recorded:
            launches.setdefault(PASSES[launch.kernel.fn.__name__], launch)
    return launches


def _formulas(call: kernel_work.Attention, launches: dict[str, Launch]) -> dict:
    forward, dq, dkv = (launches[name] for name in ("forward", "dq", "dkv"))
    return {
        "forward": kernel_work.forward_work(call, forward.constexprs, forward.grid[1]),
        "dq": kernel_work.dq_work(call, dq.constexprs),
        "dkv": kernel_work.dkv_work(call, dkv.constexprs),
    }


INTERPRETER = Target("interpreter", num_sms=4)


@pytest.mark.parametrize("name", CALLS)
def test_bytes_and_products(name):
    call = CALLS[name]
    launches = _launches(call, INTERPRETER)
    assert (launches["forward"].grid[1] > 1) == (name in SPLIT)
    measured, formulas = _measured(call), _formulas(call, launches)
    for each, formula in formulas.items():
        assert measured[each].bytes_loaded == pytest.approx(formula.loaded, rel=0.02), each
        assert measured[each].bytes_stored == pytest.approx(formula.stored, rel=0.02), each
        assert measured[each].dot_flops == formula.matmul_flops, each


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_keys", [1, 5, 33, 64, 70, 133, 200, 257])
def test_never_much_more_than_a_dense_mask_kernel(num_keys, head_dim, arch):
    """One with the tiles for media of whole tiles; the bytes of its mask are not counted."""
    for layout in (
        _random_mask(256, 4, 1.1),
        _random_mask(256, 4, 0.5),
        _all_previous(256, 4),
        _random_mask(256, max(4000 // num_keys, 4), 0.5),
    ):
        call = _call(layout, num_keys=num_keys, head_dim=head_dim)
        launches = _launches(call, Target(arch, num_sms=108))
        whole = _launches(dataclasses.replace(call, num_keys=128), Target(arch, num_sms=108))
        for name, formula in _formulas(call, launches).items():
            dense = kernel_work.dense_mask_work(call, name, whole[name].constexprs)
            assert formula.bytes <= 1.3 * dense.bytes, (name, layout)


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_all_kinds_against_a_dense_mask_kernel(name):
    """Splits, heads that share keys, dense rows and padding too; in the interpreter's tiles."""
    call = CALLS[name]
    launches = _launches(call, INTERPRETER)
    whole = _launches(dataclasses.replace(call, num_keys=128), INTERPRETER)
    for each, formula in _formulas(call, launches).items():
        dense = kernel_work.dense_mask_work(call, each, whole[each].constexprs)
        assert formula.bytes <= 1.3 * dense.bytes, each


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_are_proportional_to_the_media_that_are_attended(head_dim):
    """Blocks of rows attend to the same media, as consecutive images of Mllama do."""
    target = Target("sm_90", num_sms=132)

    def work_of(attended: int, media: int) -> dict:
        begin = (torch.arange(1024) // 256 * attended)[None].int()
        layout = MediaLayout.from_intervals(begin, begin + attended, media, attended)
        call = _call(layout, heads=8, kv_heads=8, num_keys=128, head_dim=head_dim)
        return _formulas(call, _launches(call, target))

    two, four, eight = (work_of(attended, 32) for attended in (2, 4, 8))
    fewer = work_of(2, 8)
    for name in two:
        assert eight[name].matmul_flops == 2 * four[name].matmul_flops
        assert four[name].matmul_flops == 2 * two[name].matmul_flops
        assert eight[name].loaded - four[name].loaded == pytest.approx(
            2 * (four[name].loaded - two[name].loaded), rel=0.01
        )
        # Media that none attends to are not read, and have gradients of zeros.
        assert fewer[name].loaded == two[name].loaded
        assert fewer[name].matmul_flops == two[name].matmul_flops
