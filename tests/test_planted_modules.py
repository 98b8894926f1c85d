"""Modules with one fault each: the comparison with a peer's module must see every one of them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_cases import FP32, check, inputs_of, like, randomized

from flamingo_fast.modules import GatedCrossAttentionBlock, PerceiverResampler, blocks
from flamingo_fast.modules import cross_attention as attention_module
from flamingo_fast.modules import feed_forward as feed_forward_module
from flamingo_fast.modules import resampler as resampler_module
from flamingo_fast.ops import feed_forward as feed_forward_op
from flamingo_fast.testing import peers

# Two images, then one more than there are media.
LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)


def _check_block() -> None:
    options = {"dim": 24, "dim_visual": 20, "heads": 2, "dim_head": 16}
    peer = randomized(peers.open_flamingo().GatedCrossAttentionBlock(**options))
    ours = like(peer, GatedCrossAttentionBlock(**options))
    inputs = inputs_of(FP32, x=(2, 7, 24), media=(2, 2, 5, 20))
    check(ours, peer, inputs, lambda module, x, media: module(x, media, LOCATIONS))


def _check_resampler() -> None:
    options = {"dim": 24, "depth": 2, "num_latents": 5, "heads": 2, "dim_head": 16}
    peer = randomized(peers.open_flamingo().PerceiverResampler(**options))
    check(like(peer, PerceiverResampler(**options)), peer, inputs_of(FP32, x=(2, 3, 1, 7, 24)))


def _with(**changed: Any) -> Callable[[Any], Any]:
    """Calls the real function with other keyword arguments."""
    return lambda function: lambda *args, **kwargs: function(*args, **{**kwargs, **changed})


def _scaled_gradient(function: Any) -> Any:
    return lambda *args: 1.001 * function(*args)


def _gate_without_tanh(function: Any) -> Any:
    def call(x, y, gate, *args, **kwargs):
        return function(x, y, torch.atanh(gate.clamp(-0.99, 0.99)), *args, **kwargs)

    return call


def _tanh_gelu(function: Any) -> Any:
    return lambda hidden, activation, impl: F.gelu(hidden, approximate="tanh")


def _swapped_sources(function: Any) -> Any:
    """The latents' keys with the media's values of as many."""

    def call(q, k_media, v_media, k_latents, v_latents, **kwargs):
        return function(q, k_media, v_media, k_latents, v_media[:, : k_latents.shape[1]], **kwargs)

    return call


FAULTS = {
    "norm_eps": (_check_block, blocks, "gated_residual_norm", _with(eps=1e-3)),
    "gate_without_tanh": (_check_block, blocks, "gated_residual_norm", _gate_without_tanh),
    "no_second_gate": (
        _check_block,
        feed_forward_module,
        "feed_forward",
        _with(gate=torch.full((1,), 20.0)),
    ),
    "another_gelu": (_check_block, feed_forward_op, "_activate", _tanh_gelu),
    "gradient_of_the_activation": (
        _check_block,
        feed_forward_op,
        "_activation_backward",
        _scaled_gradient,
    ),
    "past_the_last": (
        _check_block,
        attention_module,
        "masked_cross_attention",
        _with(past_last="zero"),
    ),
    "scale_of_scores": (
        _check_block,
        attention_module,
        "masked_cross_attention",
        _with(softmax_scale=0.26),
    ),
    "scale_of_latents": (
        _check_resampler,
        resampler_module,
        "latent_attention",
        _with(softmax_scale=0.26),
    ),
    "values_of_the_latents": (
        _check_resampler,
        resampler_module,
        "latent_attention",
        _swapped_sources,
    ),
    "gelu_of_latents": (_check_resampler, feed_forward_op, "_activate", _tanh_gelu),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch):
    run, module, name, plant = FAULTS[fault]
    run()
    planted = functools.wraps(getattr(module, name))(plant(getattr(module, name)))
    monkeypatch.setattr(module, name, planted)
    with pytest.raises(AssertionError, match="max error"):
        run()
