"""What only a GPU shows: graphs of calls, syncs with the CPU, and other libraries' own kernels."""

import contextlib
import dataclasses
from unittest import mock

import attention_cases
import latent_cases
import pytest
import torch
from attention_cases import AttentionCase
from latent_cases import LatentCase

import flamingo_fast as ff
from flamingo_fast import MediaLayout
from flamingo_fast.modules import MaskedCrossAttention

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.get_default_device().type != "cuda",
    reason="needs a GPU and TEST_DEVICE=cuda",
)

BF16 = torch.bfloat16

IMAGES = AttentionCase(
    seqlen=300,
    images=((7, 200), (3,)),
    num_media=2,
    heads=4,
    head_dim=64,
    num_keys=64,
    dtype=BF16,
)
LATENTS = LatentCase(4, 64, 256, 4, head_dim=64, dtype=BF16)
CALLS = {
    "one_medium": IMAGES,
    "one_medium_gqa": dataclasses.replace(IMAGES, kv_heads=2),
    "several_media": dataclasses.replace(IMAGES, attend="all_previous"),
    "long_media": dataclasses.replace(IMAGES, num_keys=257),
    "tiles_across_media": dataclasses.replace(IMAGES, attend="all_previous", num_keys=5),
    "wide_heads": dataclasses.replace(IMAGES, head_dim=128),
    "wide_heads_several_media": dataclasses.replace(IMAGES, head_dim=128, attend="all_previous"),
    "decode": dataclasses.replace(IMAGES, last=1),
    "decode_wide_heads": dataclasses.replace(IMAGES, last=1, head_dim=128),
    "decode_several_media": dataclasses.replace(IMAGES, last=1, attend="all_previous"),
    "latents": LATENTS,
    "latents_wide_heads": dataclasses.replace(LATENTS, head_dim=128),
    "latents_gqa": dataclasses.replace(LATENTS, kv_heads=1),
    "latents_split": dataclasses.replace(LATENTS, batch=1, features=4096),
    "latents_seqlens": dataclasses.replace(LATENTS, media_seqlens=(0, 37, 256, 100)),
}


def _inputs_and_call(case):
    inputs = list(case.inputs().values())
    function = case.call("triton")

    def call(*leaves):
        with _without_default_device():
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return inputs, call


@contextlib.contextmanager
def _without_default_device():
    """As most users call: a default device is a mode, for which shortcuts step aside."""
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device("cuda")


def _check(case, impl):
    check = latent_cases.check if isinstance(case, LatentCase) else attention_cases.check
    check(case, impl)


# Tiles of a GPU's own launch configurations, which tests with a few tokens don't fill.
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_values(case):
    _check(case, "triton")


@contextlib.contextmanager
def _no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_no_call_waits_for_the_gpu(case):
    inputs, call = _inputs_and_call(case)
    call(*inputs)
    with _no_sync():
        call(*inputs)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_a_graph_computes_what_the_call_does(case):
    inputs, call = _inputs_and_call(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(tensor.flip(0) * 0.5)
    graph.replay()
    for got, expected in zip(captured, call(*inputs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_every_call_gives_the_same_bits(case):
    inputs, call = _inputs_and_call(case)
    first = call(*inputs)
    for _ in range(3):
        for got, expected in zip(call(*inputs), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", ["varlen", "flash_attn", "xformers"])
@pytest.mark.parametrize(
    "case", [CALLS["one_medium"], CALLS["latents"], CALLS["latents_seqlens"]], ids=str
)
def test_other_libraries(case, impl):
    try:
        _check(case, impl)
    except ff.BackendUnavailableError as error:
        pytest.skip(str(error))


def test_layers_share_a_layout_until_the_locations_change():
    layers = [MaskedCrossAttention(dim=32, dim_visual=24, dim_head=16, heads=2) for _ in range(2)]
    x, media = torch.randn(2, 9, 32), torch.randn(2, 2, 4, 24)
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[:, 1] = True
    made = MediaLayout.from_media_locations
    with mock.patch.object(MediaLayout, "from_media_locations", side_effect=made) as making:
        with _without_default_device():
            first = [layer(x, media, locations) for layer in layers]
            assert making.call_count == 1
            # A write that PyTorch doesn't count, as those of collectives.
            locations.data[:, 1], locations.data[:, 5] = False, True
            moved = layers[0](x, media, locations)
            assert making.call_count == 2
            torch.testing.assert_close(moved, layers[0](x, media, locations.clone()))
            assert not torch.equal(moved, first[0])
            locations[:, 5] = False
            layers[1](x, media, locations)
        assert making.call_count == 4


def test_a_graph_makes_its_own_layout():
    layer = MaskedCrossAttention(dim=32, dim_visual=24, dim_head=16, heads=2)
    x, media = torch.randn(2, 9, 32), torch.randn(2, 2, 4, 24)
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[:, 1] = True
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), _without_default_device():
        layer(x, media, locations)
        with torch.cuda.graph(graph):
            captured = layer(x, media, locations)
        locations[:, 1], locations[:, 5] = False, True
        graph.replay()
        assert torch.equal(captured, layer(x, media, locations))
