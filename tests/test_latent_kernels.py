"""The kernels of latent_attention: their launches, their splits and what changes no bit."""

import dataclasses

import pytest
import torch
from attention_cases import assert_bits_equal
from attention_contract import no_host_sync, use_real_launchers
from latent_cases import BF16, FP16, NAMES, LatentCase, cases, check, run

import flamingo_fast as ff
from flamingo_fast.kernels.latent_config import key_splits
from flamingo_fast.kernels.launch import Target, recording
from flamingo_fast.ops import latent_attention as op
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

FORWARD, SPLIT_FORWARD = ["_latent_fwd_kernel"], ["_latent_fwd_kernel", "_combine_splits_kernel"]
ONE_PASS, TWO_PASSES = ["_latent_bwd_kernel"], ["_latent_bwd_kernel", "_latent_dkv_kernel"]
SPLIT_ONE_PASS = ["_latent_bwd_kernel", "_sum_splits_kernel"]
SPLIT_TWO_PASSES = [*SPLIT_ONE_PASS, "_latent_dkv_kernel"]

SIZES = {
    "100": LatentCase(1, 64, 100, head_dim=32, dtype=BF16),
    "no_features": LatentCase(2, 16, 0, dtype=FP16),
    "one_feature": LatentCase(2, 16, 1, dtype=BF16),
    "one_latent": LatentCase(2, 1, 37, dtype=FP16),
    "64": LatentCase(1, 64, 64),
    "300": LatentCase(1, 5, 300, heads=4, kv_heads=2, dtype=BF16),
    "lengths": LatentCase(4, 16, 100, 1, dtype=BF16, media_seqlens=(0, 37, 100, 999)),
}
# More than 64 rows of a medium share a key/value head.
MANY_ROWS = {
    "gqa": LatentCase(1, 64, 100, 4, 1, dtype=BF16),
    "gqa_fp32": LatentCase(2, 33, 37, 3, 1, dtype=torch.float32),
    "many_latents": LatentCase(1, 70, 40, 2, dtype=FP16),
    "no_features": LatentCase(1, 70, 0, 1, dtype=BF16),
    "lengths": LatentCase(4, 40, 50, 4, 2, dtype=BF16, media_seqlens=(0, 37, 50, 999)),
    "lengths_fp32": LatentCase(2, 33, 40, 2, 1, 8, media_seqlens=(0, 39)),
    "head_dim_of_160": LatentCase(1, 5, 37, head_dim=160, dtype=BF16),
    "projection": LatentCase(
        2,
        33,
        37,
        2,
        1,
        dtype=BF16,
        media_layout="projection",
        latents_layout="projection",
        q_layout="batch_expanded",
    ),
}
SPLIT = {
    "split": (LatentCase(1, 5, 1100, 1, dtype=BF16), SPLIT_ONE_PASS),
    "fp32": (LatentCase(1, 5, 1030, 1, head_dim=8), SPLIT_ONE_PASS),
    "lengths": (
        LatentCase(2, 4, 1600, 1, dtype=FP16, media_seqlens=(0, 1040)),
        SPLIT_ONE_PASS,
    ),
    "gqa": (LatentCase(1, 40, 1100, 2, 1, dtype=BF16), SPLIT_TWO_PASSES),
}


def _assert_launched(guarded, kernels: list[str]) -> None:
    # On a GPU a program may hold all of these rows, and one pass is enough.
    if torch.get_default_device().type == "cpu":
        assert [launch.kernel for launch in guarded.launches] == kernels


@cases(SIZES)
def test_all_rows_of_a_head_in_one_block(case, guarded):
    check(case, "triton")
    _assert_launched(guarded, FORWARD + ONE_PASS)


@cases(MANY_ROWS)
def test_more_rows_than_one_block(case, guarded):
    check(case, "triton")
    _assert_launched(guarded, FORWARD + TWO_PASSES)


@pytest.mark.parametrize(("case", "backward"), SPLIT.values(), ids=SPLIT.keys())
def test_split_keys(case, backward, guarded):
    check(case, "triton")
    _assert_launched(guarded, SPLIT_FORWARD + backward)


def test_how_keys_are_split():
    """512 media keys each, where there are many and few programs; the batch is no argument."""
    keys = (0, 1, 1024, 1025, 1536, 65536)
    assert [key_splits(8, count) for count in keys] == [1, 1, 1, 3, 3, 128]
    assert [key_splits(programs, 65536) for programs in (1, 63, 64, 1000)] == [128, 128, 1, 1]


FROZEN = {
    "q": (("q",), TWO_PASSES),
    "media": (NAMES[1:3], TWO_PASSES),
    "latents": (NAMES[3:], TWO_PASSES),
    "keys": (NAMES[1:], ONE_PASS),
}


@pytest.mark.parametrize(("frozen", "backward"), FROZEN.values(), ids=FROZEN.keys())
def test_frozen_inputs_of_many_rows(frozen, backward, guarded):
    case = dataclasses.replace(MANY_ROWS["lengths"], frozen=frozen)
    check(case, "triton")
    _assert_launched(guarded, FORWARD + backward)


BITS = {
    "lengths": LatentCase(3, 16, 100, 2, dtype=BF16, media_seqlens=(0, 37, 100)),
    "fp32": LatentCase(3, 5, 37, 2),
    "gqa": LatentCase(3, 33, 40, 4, 2, dtype=FP16),
    "split": LatentCase(3, 4, 1100, 1, 1, 8, dtype=BF16, media_seqlens=(5, 1100, 530)),
}


@cases(BITS)
def test_a_medium_does_not_depend_on_the_batch(case, guarded):
    inputs = [tensor.detach() for tensor in case.inputs().values()]
    dout, lengths = case.dout(), case.lengths()

    def results(media: slice) -> list[torch.Tensor]:
        leaves = [tensor[media].clone().requires_grad_() for tensor in inputs]
        some = None if lengths is None else lengths[media]
        out = ff.latent_attention(*leaves, media_seqlens=some, impl="triton")
        return [out, *torch.autograd.grad(out, leaves, dout[media])]

    everything = results(slice(None))
    for media in (slice(0, 1), slice(1, 3)):
        for some, of_all in zip(results(media), everything, strict=True):
            assert torch.equal(some, of_all[media])


@cases(BITS)
def test_the_order_of_programs_changes_no_bit(case):
    ordered, shuffled = [], []
    for seed, results in ((None, ordered), (1, shuffled)):
        with guard(shuffle_seed=seed):
            results.append(run(case.call("triton"), case))
    assert_bits_equal(shuffled[0], ordered[0])


@cases({"one_pass": BITS["lengths"], "two_passes": BITS["gqa"], "split": BITS["split"]})
def test_masked_lanes_that_hold_huge_values(case):
    with guard(poison="huge") as guarded:
        check(case, "triton")
    assert guarded.launches


@cases({"two_passes": MANY_ROWS["lengths"], "split": BITS["split"]})
def test_nan_of_what_is_not_valid_goes_nowhere(case, guarded):
    clean, inputs = run(case.call("triton"), case), case.inputs()
    padded = torch.arange(case.features) >= case.lengths()[:, None]
    for name in ("k_media", "v_media"):
        dirty = inputs[name].detach().clone()
        dirty[padded] = float("nan")
        inputs[name] = dirty.requires_grad_()
    results = run(case.call("triton"), case, inputs=inputs)
    assert_bits_equal(results, clean)
    assert not results["dk_media"][padded].any() and not results["dv_media"][padded].any()


@cases({"two_passes": MANY_ROWS["lengths_fp32"], "split": SPLIT["fp32"][0]})
def test_large_scores(case, guarded):
    """Gradients of a softmax that picks one key cancel to nothing: only that they are finite."""
    case = dataclasses.replace(case, softmax_scale=1e4)
    oracle = run(case.call_reference(), case, torch.float64)
    results = run(case.call("triton"), case)
    torch.testing.assert_close(results["out"], oracle["out"].float(), rtol=1e-2, atol=1e-2)
    assert all(tensor.isfinite().all() for tensor in results.values())


LAUNCHES = {
    "one_pass": (LatentCase(2, 64, 256, dtype=BF16), FORWARD + ONE_PASS),
    "128_rows": (LatentCase(2, 64, 256, 2, 1, dtype=BF16), FORWARD + ONE_PASS),
    "two_passes": (LatentCase(2, 64, 256, 4, 1, dtype=BF16), FORWARD + TWO_PASSES),
    "lengths": (LatentCase(2, 64, 256, media_seqlens=(3, 4), dtype=BF16), FORWARD + ONE_PASS),
    "split": (LatentCase(2, 64, 4096, dtype=BF16), SPLIT_FORWARD + SPLIT_ONE_PASS),
    "split_gqa": (LatentCase(2, 64, 4096, 4, 1, dtype=BF16), SPLIT_FORWARD + SPLIT_TWO_PASSES),
}


@pytest.mark.parametrize(("case", "kernels"), LAUNCHES.values(), ids=LAUNCHES.keys())
@pytest.mark.cpu
def test_launches_on_a_gpu_without_a_host_sync(case, kernels, monkeypatch):
    use_real_launchers(monkeypatch, op)
    inputs = {name: x.detach().to("meta").requires_grad_() for name, x in case.inputs().items()}
    lengths = case.lengths()
    if lengths is not None:
        lengths = lengths.int().to("meta")
    with recording(Target("sm_90", num_sms=132)) as launches, no_host_sync():
        out = ff.latent_attention(**inputs, media_seqlens=lengths, impl="triton")
        torch.autograd.grad(out, list(inputs.values()), torch.empty_like(out))
    assert [launch.kernel.fn.__name__ for launch in launches] == kernels
