"""Cases of masked_cross_attention: how ours, eager and the fp64 oracle are called, with what."""

import dataclasses
import functools
import random

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing import eager
from flamingo_fast.testing.compare import Comparison, assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

FP16, BF16 = torch.float16, torch.bfloat16

HEAD_DIMS = [(16, BF16), (40, FP16), (64, torch.float32), (80, BF16)]
HEAD_DIMS += [(96, torch.float32), (128, FP16), (256, BF16)]

# Of q, k, v and the gradient of the output.
MEMORY_LAYOUTS = [
    {"q_layout": "sliced"},
    {"q_layout": "padded", "kv_layout": "sliced"},
    {"q_layout": "transposed", "dout_layout": "transposed"},
    {"kv_layout": "transposed"},
    {"kv_layout": "padded", "dense_kv": True},
    {"kv_layout": "stepped", "q_layout": "stepped"},
    {"kv_layout": "projection", "dout_layout": "padded"},
    {"kv_layout": "projection", "dense_kv": True, "heads": 4, "kv_heads": 2},
    {"dout_layout": "expanded", "q_layout": "expanded"},
]

impls = pytest.mark.parametrize("impl", ["torch", "triton", "sdpa"])
fast_impls = pytest.mark.parametrize("impl", ["torch", "triton"])


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call.

    images: positions of the image tokens of each sample; None: `num_media` of each, at random.
    num_media: of all samples, or of each; None: as many as there are image tokens.
    last: only so many last tokens of each row have a query, as in decoding.
    shuffled: the tokens of each sample attend in a random order.
    dense_kv: k and v are (batch, num_media, keys, heads, head_dim), not (media_total, ...).
    *_layout: of `random_tensor`; of k and v also "projection": halves of one tensor.
    frozen: inputs that want no gradient.
    """

    seqlen: int = 24
    images: tuple[tuple[int, ...], ...] | None = None
    num_media: int | tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 16
    num_keys: int = 5
    dtype: torch.dtype = torch.float32
    attend: str = "previous"
    shuffled: bool = False
    media_seqlens: tuple[int, ...] | None = None
    unattended: str = "zero"
    past_last: str = "zero"
    softmax_scale: float | None = None
    last: int | None = None
    dense_kv: bool = False
    q_layout: str = "contiguous"
    kv_layout: str = "contiguous"
    dout_layout: str = "contiguous"
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None:
            object.__setattr__(self, "batch", len(self.images))
        elif self.num_media is None:
            raise ValueError("either images or num_media must be given")

    def __str__(self) -> str:
        def text(value: object) -> str:
            if isinstance(value, tuple):
                return "_".join(map(text, value)) or "none"
            return str(value).removeprefix("torch.")

        return "-".join(
            f"{field.name}={text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
            and (field.name != "batch" or self.images is None)
        )

    @property
    def positions(self) -> tuple[tuple[int, ...], ...]:
        """Where the image tokens of each sample are."""
        if self.images is not None:
            return self.images
        generator = random.Random(self.seed)
        return tuple(
            tuple(sorted(generator.sample(range(self.seqlen), min(count, self.seqlen))))
            for count in self.media_counts
        )

    @property
    def media_counts(self) -> tuple[int, ...]:
        """Media of each sample."""
        if self.num_media is None:
            return tuple(map(len, self.images))
        if isinstance(self.num_media, int):
            return (self.num_media,) * self.batch
        return self.num_media

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def media_locations(self) -> torch.Tensor:
        locations = torch.zeros(self.batch, self.seqlen, dtype=torch.bool)
        for sample, positions in enumerate(self.positions):
            locations[sample, list(positions)] = True
        return locations

    def layout(self) -> MediaLayout:
        layout = MediaLayout.from_media_locations(
            self.media_locations(),
            self.media_counts,
            self.attend,
            media_seqlens=None
            if self.media_seqlens is None
            else torch.tensor(self.media_seqlens, dtype=torch.int32),
        )
        if self.shuffled:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(self.seqlen, generator=generator, device="cpu")
            layout = MediaLayout.from_intervals(
                layout.media_start[:, order],
                layout.media_end[:, order],
                self.media_counts,
                layout.max_media_per_token,
                media_seqlens=layout.media_seqlens,
            )
        return layout if self.last is None else layout.last(self.last)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        rows = self.seqlen if self.last is None else self.last
        return self.batch, rows, self.heads, self.head_dim

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random q, k and v."""
        media = (sum(self.media_counts),)
        if self.dense_kv:
            media = (self.batch, max(self.media_counts, default=0))
        kv_shape = (*media, self.num_keys, self.kv_heads or self.heads, self.head_dim)
        inputs = {
            "q": random_tensor(self.q_shape, self.dtype, seed=10 * self.seed, layout=self.q_layout)
        }
        if self.kv_layout == "projection":
            both = (*kv_shape[:-2], 2, *kv_shape[-2:])
            fused = random_tensor(both, self.dtype, seed=10 * self.seed + 1)
            inputs["k"], inputs["v"] = fused.unbind(-3)
        else:
            for offset, name in enumerate(("k", "v"), start=1):
                inputs[name] = random_tensor(
                    kv_shape, self.dtype, seed=10 * self.seed + offset, layout=self.kv_layout
                )
        return {
            name: tensor.detach().requires_grad_(name not in self.frozen)
            for name, tensor in inputs.items()
        }

    def dout(self) -> torch.Tensor:
        """The gradient of the output."""
        return random_tensor(
            self.q_shape, self.dtype, seed=10 * self.seed + 3, layout=self.dout_layout
        )

    def call(self, impl: str, layout: MediaLayout | None = None):
        """masked_cross_attention as a function of q, k and v."""
        return functools.partial(
            ff.masked_cross_attention,
            layout=self.layout() if layout is None else layout,
            unattended=self.unattended,
            past_last=self.past_last,
            softmax_scale=self.softmax_scale,
            impl=impl,
        )

    def call_eager(self, layout: MediaLayout | None = None):
        return functools.partial(
            eager.masked_cross_attention,
            layout=self.layout() if layout is None else layout,
            unattended=self.unattended,
            past_last=self.past_last,
            softmax_scale=self.softmax_scale,
        )

    def call_reference(self, layout: MediaLayout | None = None):
        layout = self.layout() if layout is None else layout

        def function(q, k, v):
            k, v = (tensor.flatten(0, -4) for tensor in (k, v))
            return reference.masked_cross_attention(
                q, k, v, layout, self.unattended, self.past_last, self.scale
            )

        return function


def cases(named: dict[str, AttentionCase]):
    return pytest.mark.parametrize("case", named.values(), ids=named.keys())


def run(function, case: AttentionCase, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """out, dq, dk and dv of a function of q, k and v."""
    return outputs_and_gradients(function, case.inputs(), ("out",), (case.dout(),), dtype)


def check(case: AttentionCase, impl: str, layout: MediaLayout | None = None) -> list[Comparison]:
    """The output and all gradients of masked_cross_attention by the three-way rule.

    layout: instead of the case's own, for as many tokens and media.
    """
    oracle = run(case.call_reference(layout), case, torch.float64)
    ours, same_precision = run(case.call(impl, layout), case), run(case.call_eager(layout), case)
    for name, tensor in ours.items():
        assert tensor.dtype == case.dtype, f"{name}: {tensor.dtype}"
    return assert_close_to_oracle(ours, same_precision, oracle, _scales(case, oracle))


def _scales(case: AttentionCase, oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    """A softmax over one key is 1: its gradient is the difference of two equal products."""
    if case.num_keys != 1 or not sum(case.media_counts):
        return {}
    inputs = {name: tensor.detach().double() for name, tensor in case.inputs().items()}
    product = case.scale * inputs["v"].norm(dim=-1).max() * case.dout().double().norm(dim=-1).max()
    return {
        f"d{name}": (product * inputs[other].abs().max()).item()
        for name, other in (("q", "k"), ("k", "q"))
        if f"d{name}" in oracle
    }


def assert_bits_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


def run_on(
    case: AttentionCase,
    impl: str,
    inputs: dict[str, torch.Tensor],
    dout: torch.Tensor | None = None,
    layout: MediaLayout | None = None,
) -> dict[str, torch.Tensor]:
    """As `run`, of other inputs and another gradient of the output than the case's own."""
    dout = case.dout() if dout is None else dout
    return outputs_and_gradients(case.call(impl, layout), inputs, ("out",), (dout,))


def with_nan(tensor: torch.Tensor, *index) -> torch.Tensor:
    """A copy with NaN at tensor[index]."""
    changed = tensor.detach().clone()
    changed[index] = float("nan")
    return changed.requires_grad_(tensor.requires_grad)
