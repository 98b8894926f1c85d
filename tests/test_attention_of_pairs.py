"""Attention of image-text pairs on a CPU: samples with a medium each go in a few calls together."""

import pytest
import torch
import torch.nn.functional as F

from flamingo_fast import MediaLayout, masked_cross_attention
from flamingo_fast.ops import cpu_attention
from flamingo_fast.testing.compare import compare

pytestmark = pytest.mark.cpu

HEADS, HEAD_DIM = 2, 8


def inputs(batch: int, seqlen: int, first: int, num_keys: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, seqlen), (batch, num_keys), (batch, num_keys)]
    tensors = [
        torch.randn(*shape, HEADS, HEAD_DIM, generator=generator).to(dtype) for shape in shapes
    ]
    locations = torch.zeros(batch, seqlen, dtype=torch.bool)
    locations[:, first] = True
    return tensors, locations


def outcomes(tensors, layout, impl, dtype=None):
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors)
    out = masked_cross_attention(q, k, v, layout, impl=impl)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return {
        "out": out.detach(),
        **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout), strict=True)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "seqlen", "first", "num_keys"),
    [
        (2, 1, 0, 1),
        (5, 7, 3, 6),
        # The last call has fewer samples.
        (37, 9, 0, 5),
        (3, 130, 1, 4),
        # Of long texts each sample is a call of its own.
        (3, 600, 90, 65),
    ],
)
@pytest.mark.parametrize("cache_bytes", [2**13, 2**20])
def test_same_as_the_oracle(batch, seqlen, first, num_keys, dtype, cache_bytes, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_CACHE_BYTES", cache_bytes)
    tensors, locations = inputs(batch, seqlen, first, num_keys, dtype)
    layout = MediaLayout.from_media_locations(locations, 1)
    exact = outcomes(tensors, layout, "reference", torch.float64)
    ours, theirs = (outcomes(tensors, layout, impl) for impl in ("torch", "sdpa"))
    for name, expected in exact.items():
        assert (found := compare(name, ours[name], theirs[name], expected)).is_close, str(found)
    assert not ours["out"][:, :first].any() and not ours["dq"][:, :first].any()


@pytest.mark.parametrize("needed", ["q", "kv"])
def test_only_the_gradients_that_are_wanted(needed):
    (q, k, v), locations = inputs(6, 5, 1, 3, torch.float32)
    layout = MediaLayout.from_media_locations(locations, 1)
    expected = outcomes((q, k, v), layout, "torch")
    leaves = {"q": [("dq", q)], "kv": [("dk", k), ("dv", v)]}[needed]
    for _, leaf in leaves:
        leaf.requires_grad_()
    out = masked_cross_attention(q, k, v, layout, impl="torch")
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
    gradients = torch.autograd.grad(out, [leaf for _, leaf in leaves], dout)
    for (name, _), gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name])


def calls_of(monkeypatch, tensors, layout) -> tuple[int, int]:
    """Of the flash kernel, and of the backward's products."""
    counts = {"forward": 0, "backward": 0}
    attention, products = F.scaled_dot_product_attention, cpu_attention._products

    def counted(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(
        cpu_attention.F, "scaled_dot_product_attention", counted("forward", attention)
    )
    monkeypatch.setattr(cpu_attention, "_products", counted("backward", products))
    outcomes(tensors, layout, "torch")
    return counts["forward"], counts["backward"]


def test_few_calls_for_many_samples(monkeypatch):
    tensors, locations = inputs(32, 16, 0, 8, torch.float32)
    layout = MediaLayout.from_media_locations(locations, 1)
    assert calls_of(monkeypatch, tensors, layout) == (1, 1)
    # As large a share of q as the temporaries of long texts may take.
    monkeypatch.setattr(cpu_attention, "_CACHE_BYTES", 0)
    forward, backward = calls_of(monkeypatch, tensors, layout)
    assert forward == 1 and 3 <= backward < 32


def test_other_places_are_no_pairs(monkeypatch):
    tensors, locations = inputs(8, 16, 2, 8, torch.float32)
    locations[3] = locations[3].roll(1)
    layout = MediaLayout.from_media_locations(locations, 1)
    assert calls_of(monkeypatch, tensors, layout) == (8, 8)
    expected = outcomes(tensors, layout, "reference")
    for name, found in outcomes(tensors, layout, "torch").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
