"""What the kernels of latent_attention move and multiply, as the guard counts it."""

import functools

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast.bench import latent, latent_kernel_work
from flamingo_fast.bench.latent_kernel_work import Attention
from flamingo_fast.kernels.launch import Launch, Target, recording
from flamingo_fast.testing.guard import LaunchRecord, guard

pytestmark = pytest.mark.matrix

NAMES = ("q", "k_media", "v_media", "k_latents", "v_latents")
PASSES = {
    "_latent_fwd_kernel": "forward",
    "_combine_splits_kernel": "forward",
    "_latent_bwd_kernel": "backward",
    "_sum_splits_kernel": "backward",
    "_latent_dkv_kernel": "dkv",
}
INTERPRETER = Target("interpreter", num_sms=4)

_call = functools.partial(Attention, batch=1, latents=64, heads=1, kv_heads=1, itemsize=2)
MHA = {
    "100": _call(num_keys=100, head_dim=64),
    "256": _call(num_keys=256, head_dim=64),
    "256x128": _call(num_keys=256, head_dim=128),
}
SPLIT = {
    "1100": _call(num_keys=1100, head_dim=16),
    "2048": _call(num_keys=2048, head_dim=16),
}
GQA = {
    "gqa": _call(num_keys=256, head_dim=64, heads=4),
    "gqa_96": _call(num_keys=256, head_dim=96, heads=4),
    "gqa_split": _call(num_keys=1100, head_dim=16, heads=4),
}
OTHERS = {
    "odd": _call(batch=2, latents=5, num_keys=37, heads=6, kv_heads=2, head_dim=40),
    "fp32": _call(num_keys=100, head_dim=16, itemsize=4),
    "fp32_gqa": _call(num_keys=40, heads=4, head_dim=16, itemsize=4),
    "lengths": _call(batch=3, num_keys=100, head_dim=32, lengths=(0, 37, 200)),
    "lengths_gqa": _call(batch=3, num_keys=100, heads=4, head_dim=32, lengths=(0, 37, 200)),
    "lengths_split": _call(batch=2, num_keys=1200, head_dim=16, lengths=(500, 1100)),
    "no_features": _call(num_keys=0, head_dim=32),
}
CALLS = MHA | SPLIT | GQA | OTHERS
FROZEN = {
    "q": ("q",),
    "media": NAMES[1:3],
    "latents": NAMES[3:],
    "all_keys": NAMES[1:],
    "q_and_media": NAMES[:3],
}


def _run(call: Attention, watched, frozen=()) -> list[list]:
    """What `watched`, a context, saw of the forward and of the backward."""
    dtype = torch.float32 if call.itemsize == 4 else torch.bfloat16
    shapes = [(call.batch, call.latents, call.heads, call.head_dim)]
    for count in (call.num_keys, call.latents):
        shapes += [(call.batch, count, call.kv_heads, call.head_dim)] * 2
    tensors = [
        torch.randn(shape, dtype=dtype).requires_grad_(name not in frozen)
        for name, shape in zip(NAMES, shapes, strict=True)
    ]
    lengths = None if call.lengths is None else torch.tensor(call.lengths)
    with watched() as forward:
        out = ff.latent_attention(*tensors, media_seqlens=lengths, impl="triton")
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with watched() as backward:
        torch.autograd.grad(out, wanted, torch.randn_like(out))
    return [forward, backward]


def _measured(call: Attention, frozen=()) -> dict[str, LaunchRecord]:
    forward, backward = _run(call, guard, frozen)
    measured = {"forward": forward.total()}
    for name in ("backward", "dkv"):
        kernels = {kernel for kernel, of_pass in PASSES.items() if of_pass == name}
        launches = [launch for launch in backward.launches if launch.kernel in kernels]
        if launches:
            backward.launches, others = launches, backward.launches
            measured[name] = backward.total()
            backward.launches = others
    return measured


def _launches(call: Attention, frozen=(), target: Target = INTERPRETER) -> dict[str, Launch]:
    """The first one of each pass."""
    launches: dict[str, Launch] = {}
    for recorded in _run(call, functools.partial(recording, target), frozen):
        for launch in recorded:
            launches.setdefault(PASSES[launch.kernel.fn.__name__], launch)
    return launches


def _formulas(call: Attention, launches: dict[str, Launch]) -> dict:
    forward, backward = launches["forward"], launches["backward"]
    formulas = {
        "forward": latent_kernel_work.forward_work(call, forward.constexprs, forward.grid[1]),
        "backward": latent_kernel_work.backward_work(call, backward.constexprs, backward.grid[1]),
    }
    if "dkv" in launches:
        formulas["dkv"] = latent_kernel_work.dkv_work(call, launches["dkv"].constexprs)
    return formulas


def _check(call: Attention, frozen=()) -> dict[str, LaunchRecord]:
    launches, measured = _launches(call, frozen), _measured(call, frozen)
    assert measured.keys() == launches.keys()
    for name, formula in _formulas(call, launches).items():
        assert measured[name].bytes_loaded == pytest.approx(formula.loaded, rel=0.02), name
        assert measured[name].bytes_stored == pytest.approx(formula.stored, rel=0.02), name
        assert measured[name].dot_flops == formula.matmul_flops, name
    return measured


@pytest.mark.parametrize("name", OTHERS)
def test_bytes_and_products(name):
    _check(OTHERS[name])


def _compulsory(call: Attention) -> dict[str, int]:
    """Useful work and, of a backward, the output: an input of the registered op."""
    sizes = (call.batch, call.latents, call.num_keys, call.heads, call.kv_heads, call.head_dim)
    forward, backward = (
        latent.attention_work((*sizes, call.num_keys), call.itemsize, mode).bytes
        for mode in ("fwd_lse", "bwd")
    )
    out = call.batch * call.latents * call.heads * call.row_bytes
    return {"forward": forward, "backward": backward + out}


@pytest.mark.parametrize("name", MHA | SPLIT)
def test_every_byte_is_moved_once(name):
    """But for the sums of splits, and their queries, which each split reads."""
    call = (MHA | SPLIT)[name]
    launches, measured = _launches(call), _check(call)
    for each, compulsory in _compulsory(call).items():
        splits = launches[each].grid[1]
        assert (splits > 1) == (name in SPLIT)
        sums = 8 * call.latents * call.head_dim * splits * call.heads if splits > 1 else 0
        work = measured[each]
        assert work.bytes_loaded + work.bytes_stored <= 1.10 * compulsory + sums, each


@pytest.mark.parametrize("name", GQA)
def test_bytes_where_heads_share_keys(name):
    """Distinct sectors: what other programs of a medium read just before is in the L2 cache."""
    call = GQA[name]
    measured, launches = _check(call), _launches(call)
    for each, compulsory in _compulsory(call).items():
        sums = 8 * call.latents * call.head_dim * launches[each].grid[1] * call.heads
        passes = ("forward",) if each == "forward" else ("backward", "dkv")
        moved = sum(measured[p].sectors_loaded + measured[p].sectors_stored for p in passes)
        assert moved <= 1.6 * compulsory + (sums if launches[each].grid[1] > 1 else 0), each


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(
    "call",
    [
        _call(num_keys=100, head_dim=16),
        _call(num_keys=100, head_dim=16, heads=4),
        _call(num_keys=1100, head_dim=16, latents=16),
    ],
    ids=["one_pass", "two_passes", "split"],
)
def test_what_is_frozen_is_neither_computed_nor_stored(call, frozen):
    launches = _launches(call, FROZEN[frozen])
    _check(call, FROZEN[frozen])
    for launch in launches.values():
        constexprs = launch.constexprs
        if "q" in FROZEN[frozen]:
            assert not constexprs.get("NEED_DQ")
        if "k_media" in FROZEN[frozen]:
            assert not constexprs.get("NEED_DMEDIA")
        if "k_latents" in FROZEN[frozen]:
            assert not constexprs.get("NEED_DLATENTS")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_bytes_with_the_tiles_of_each_target(head_dim, heads, arch):
    """From the formulas. Blocks of rows that share keys load them again, from the L2 cache."""
    call = _call(num_keys=256, head_dim=head_dim, heads=heads)
    formulas = _formulas(call, _launches(call, target=Target(arch, num_sms=108)))
    for each, compulsory in _compulsory(call).items():
        if heads == 1:
            assert formulas[each].bytes <= 1.10 * compulsory
    assert ("dkv" in formulas) == (heads > 1)
