"""Cases of latent_attention: how ours, eager and the fp64 oracle are called, and with what."""

import dataclasses
import functools
import math

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.testing import eager
from flamingo_fast.testing.compare import Comparison, assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

FP16, BF16 = torch.float16, torch.bfloat16

NAMES = ("q", "k_media", "v_media", "k_latents", "v_latents")

# Of q, the media, the latents and the gradient of the output.
MEMORY_LAYOUTS = [
    {"q_layout": "sliced", "media_layout": "sliced", "latents_layout": "sliced"},
    {"q_layout": "padded", "media_layout": "padded", "latents_layout": "transposed"},
    {"q_layout": "transposed", "dout_layout": "transposed", "media_layout": "transposed"},
    {"q_layout": "stepped", "media_layout": "stepped", "latents_layout": "stepped"},
    {"media_layout": "projection", "latents_layout": "projection", "dout_layout": "padded"},
    {"media_layout": "projection", "heads": 4, "kv_heads": 2, "dout_layout": "expanded"},
    {"latents_layout": "projection", "q_layout": "batch_expanded"},
]


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """One call.

    *_layout: of `random_tensor`; of keys and values also "projection": halves of one tensor; of q
        "batch_expanded": the same memory for all media.
    frozen: inputs that want no gradient.
    """

    batch: int = 3
    latents: int = 6
    features: int = 11
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    media_seqlens: tuple[int, ...] | None = None
    softmax_scale: float | None = None
    q_layout: str = "contiguous"
    media_layout: str = "contiguous"
    latents_layout: str = "contiguous"
    dout_layout: str = "contiguous"
    frozen: tuple[str, ...] = ()

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.latents, self.heads, self.head_dim

    def _keys_and_values(self, num_keys: int, layout: str, seed: int) -> tuple[torch.Tensor, ...]:
        kv_heads = self.kv_heads or self.heads
        if layout == "projection":
            both = (self.batch, num_keys, 2, kv_heads, self.head_dim)
            return random_tensor(both, self.dtype, seed=seed).unbind(2)
        shape = (self.batch, num_keys, kv_heads, self.head_dim)
        return tuple(
            random_tensor(shape, self.dtype, seed=seed + offset, layout=layout)
            for offset in range(2)
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """By name, in the order of the arguments."""
        if self.q_layout == "batch_expanded":
            q = random_tensor((1, *self.q_shape[1:]), self.dtype, seed=0).expand(self.q_shape)
        else:
            q = random_tensor(self.q_shape, self.dtype, seed=0, layout=self.q_layout)
        media = self._keys_and_values(self.features, self.media_layout, seed=1)
        latents = self._keys_and_values(self.latents, self.latents_layout, seed=3)
        return {
            name: tensor.detach().requires_grad_(name not in self.frozen)
            for name, tensor in zip(NAMES, (q, *media, *latents), strict=True)
        }

    def lengths(self) -> torch.Tensor | None:
        return (
            None
            if self.media_seqlens is None
            else torch.tensor(self.media_seqlens, dtype=torch.int64)
        )

    def dout(self) -> torch.Tensor:
        """The gradient of the output."""
        return random_tensor(self.q_shape, self.dtype, seed=9, layout=self.dout_layout)

    def call(self, impl: str):
        """latent_attention as a function of the five tensors."""
        return functools.partial(
            ff.latent_attention,
            media_seqlens=self.lengths(),
            softmax_scale=self.softmax_scale,
            impl=impl,
        )

    def call_eager(self):
        return functools.partial(
            eager.latent_attention,
            media_seqlens=self.lengths(),
            softmax_scale=self.softmax_scale,
        )

    def call_reference(self):
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return functools.partial(
            reference.latent_attention, media_seqlens=self.lengths(), softmax_scale=scale
        )


def cases(named: dict[str, LatentCase]):
    return pytest.mark.parametrize("case", named.values(), ids=named.keys())


def run(
    function,
    case: LatentCase,
    dtype: torch.dtype | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The output and the gradients of a function of the five tensors."""
    inputs = case.inputs() if inputs is None else inputs
    return outputs_and_gradients(function, inputs, ("out",), (case.dout(),), dtype)


def check(case: LatentCase, impl: str) -> list[Comparison]:
    """The output and all gradients of latent_attention by the three-way rule.

    In fp64 the oracle is no better than ours, so both agree but for some rounding.
    """
    oracle = run(case.call_reference(), case, torch.float64)
    ours = run(case.call(impl), case)
    for name, tensor in ours.items():
        assert tensor.dtype == case.dtype, f"{name}: {tensor.dtype}"
    if case.dtype == torch.float64:
        torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-12)
        return []
    return assert_close_to_oracle(ours, run(case.call_eager(), case), oracle, _scales(case, oracle))


def _scales(case: LatentCase, oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of many keys the backward's weights are rounded as the log-sum of the scores is."""
    if case.features < 1000:
        return {}
    log_sum = math.log(case.features)
    return {name: log_sum * tensor.abs().max().item() for name, tensor in oracle.items()}
