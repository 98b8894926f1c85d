"""What every module promises: copies, dtypes, compiling, checkpointing, names in errors."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from module_cases import BF16, FP32, randomized
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_fast import modules
from flamingo_fast.testing.inputs import random_tensor

HEADS = {"heads": 2, "dim_head": 16}
ATTENTION = {"dim": 16, "dim_visual": 12, **HEADS}
RESAMPLER = {"dim": 16, "depth": 2, "max_num_frames": 2}
TEXT, MEDIA, FEATURES = (2, 5, 16), (2, 2, 3, 12), (2, 2, 1, 7, 16)
# Of each class the arguments, and the shapes of what it is called with.
MODULES = {
    "FeedForward": ({"dim": 16}, (TEXT,)),
    "GatedCrossAttentionBlock": (ATTENTION, (TEXT, MEDIA)),
    "GatedResidual": ({"dim": 16}, (TEXT, TEXT)),
    "GatedResidualNorm": ({"dim": 16}, (TEXT, TEXT)),
    "LayerNorm": ({"dim": 16}, (TEXT,)),
    "MLPResampler": (RESAMPLER, (FEATURES,)),
    "MaskedCrossAttention": (ATTENTION, (TEXT, MEDIA)),
    "PerceiverAttention": ({"dim": 16, **HEADS}, ((2, 2, 7, 16), (2, 2, 3, 16))),
    "PerceiverResampler": ({**RESAMPLER, **HEADS, "num_latents": 3}, (FEATURES,)),
    "RMSNorm": ({"dim": 16}, (TEXT,)),
    "SquaredReLU": ({}, (TEXT,)),
    "TransformerResampler": ({**RESAMPLER, **HEADS}, (FEATURES,)),
    "VanillaCrossAttention": (ATTENTION, (TEXT, MEDIA)),
}
every_module = pytest.mark.parametrize("name", MODULES)
COMPOSED = [name for name, (options, _) in MODULES.items() if "dim" in options]


def make(name, **options):
    return randomized(getattr(modules, name)(**MODULES[name][0] | options))


def inputs_of(name, dtype=FP32):
    inputs = [
        random_tensor(shape, dtype, seed=seed, requires_grad=True)
        for seed, shape in enumerate(MODULES[name][1])
    ]
    if inputs[-1].shape == MEDIA:
        inputs.append(torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool))
    return inputs


def run(module, inputs, call=None):
    """Outputs and all gradients."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    module.zero_grad()
    out = (module if call is None else call)(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    sum(x.float().square().sum() for x in outputs).backward()
    wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    return [*(x.detach() for x in outputs), *(x.grad.clone() for x in wanted)]


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


def test_no_module_is_left_out():
    public = {name for name in modules.__all__ if inspect.isclass(getattr(modules, name))}
    assert public == set(MODULES)


@every_module
def test_copies(name):
    module, inputs = make(name), inputs_of(name)
    expected = run(module, inputs)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert repr(other) == repr(module)
        assert_same(run(other, inputs), expected)


@every_module
def test_state_dict(name):
    module, other = make(name), getattr(modules, name)(**MODULES[name][0])
    other.load_state_dict(module.state_dict(), strict=True)
    assert_same(run(other, inputs_of(name)), run(module, inputs_of(name)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64], ids=str)
@every_module
def test_dtypes(name, dtype):
    module = make(name).to(dtype)
    for tensor, wide in zip(
        run(module, inputs_of(name, dtype)), run(make(name), inputs_of(name)), strict=True
    ):
        assert tensor.dtype == dtype
        error = (tensor.double() - wide.double()).square().mean().sqrt()
        assert error <= 0.1 * wide.double().square().mean().sqrt() + 1e-3


@every_module
def test_compiled(name):
    torch.compiler.reset()
    module, inputs = make(name), inputs_of(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(module, inputs, compiled), run(module, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@every_module
def test_activation_checkpointing(name):
    module, inputs = make(name), inputs_of(name)
    again = lambda *leaves: checkpoint(module, *leaves, use_reentrant=False)
    assert_same(run(module, inputs, again), run(module, inputs))


def is_trained(tensor):
    return tensor.requires_grad


@pytest.mark.parametrize("name", COMPOSED)
def test_autocast(name):
    module, inputs = make(name), inputs_of(name)
    expected = run(module, inputs)
    with torch.autocast("cpu", BF16):
        found = run(module, inputs)
    outputs = len(expected) - len([*module.parameters(), *filter(is_trained, inputs)])
    assert all(x.dtype == FP32 and x.isfinite().all() for x in found[outputs:])
    error = (found[0].double() - expected[0].double()).square().mean().sqrt()
    assert error <= 0.1 * expected[0].double().square().mean().sqrt()


@pytest.mark.parametrize("name", COMPOSED)
def test_made_on_meta(name):
    with torch.device("meta"):
        module = getattr(modules, name)(**MODULES[name][0])
    assert all(parameter.is_meta for parameter in module.parameters())
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in make(name).state_dict().items()}


@every_module
def test_repr_says_what_it_was_made_with(name):
    module = make(name)
    assert module.extra_repr() in repr(module)
    for says in ("heads=2", "dim=16", "num_latents=3", "max_num_frames=2"):
        option, _, value = says.partition("=")
        if getattr(module, option, None) == int(value):
            assert says in module.extra_repr()
    if "Resampler" in name:
        assert "max_num_frames=2" in module.extra_repr()


@every_module
def test_the_docstring_names_the_arguments(name):
    our_class = getattr(modules, name)
    doc = our_class.__doc__
    assert doc
    # "those of `PerceiverResampler`": documented there.
    for other in re.findall(r"(?:those of|see|of) `(\w+)`", doc):
        doc += getattr(modules, other, nn.Module).__doc__ or ""
    for argument in inspect.signature(our_class.__init__).parameters:
        if argument not in ("self", "attn", "impl") and "Norm" not in name:
            assert re.search(rf"\b{argument}\b", doc), argument


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        *(
            (name, {"dim": value}, ValueError, f"dim: expected an int >= 1, got {value!r}")
            for name in ("PerceiverAttention", "MaskedCrossAttention", "MLPResampler")
            for value in (0, 2.0, True)
        ),
        *(
            (name, {"norm": "batch"}, ValueError, "norm: expected .* 'batch'")
            for name in COMPOSED
            if name not in ("GatedResidual", "LayerNorm", "RMSNorm")
        ),
        *((name, {"impl": "cuda"}, ValueError, "impl: expected .* 'cuda'") for name in MODULES),
        *(
            (name, {"kv_heads": 3}, ValueError, "kv_heads: expected a divisor of 2 heads, got 3")
            for name in COMPOSED
            if "dim_head" in MODULES[name][0] and name != "TransformerResampler"
        ),
        *(
            (name, {"heads": 0}, ValueError, "heads: expected an int >= 1, got 0")
            for name in COMPOSED
            if "heads" in MODULES[name][0]
        ),
        *(
            (name, {"activation": "relu"}, ValueError, "activation: expected .* 'relu'")
            for name in ("FeedForward", "GatedCrossAttentionBlock", "PerceiverResampler")
        ),
        *(
            (name, options, ValueError, f"{next(iter(options))}: expected")
            for name in ("MaskedCrossAttention", "GatedCrossAttentionBlock")
            for options in (
                {"attend": "all"},
                {"unattended": "nothing"},
                {"past_last": "dense"},
                {"dim_visual": 0},
                {"dim_head": -1},
            )
        ),
        *(
            (name, options, ValueError, f"{next(iter(options))}: expected an int >= 1")
            for name in ("PerceiverResampler", "MLPResampler", "TransformerResampler")
            for options in ({"max_num_frames": 0}, {"max_num_media": 0.5}, {"dim_media": 0})
        ),
        *(
            (name, {"depth": -1}, ValueError, "depth: expected an int >= 0, got -1")
            for name in ("PerceiverResampler", "MLPResampler", "TransformerResampler")
        ),
        ("PerceiverResampler", {"num_latents": 0}, ValueError, "num_latents: expected an int >= 1"),
        ("FeedForward", {"mult": 0.01}, ValueError, "mult: expected a hidden width of at least 1"),
        ("FeedForward", {"dim": 0}, ValueError, "dim: expected an int >= 1, got 0"),
        ("MaskedCrossAttention", {"unattended": "zero_block"}, ValueError, "unattended: expected"),
        *(
            (
                name,
                {"unattended": "zero_block", "past_last": "uniform"},
                ValueError,
                "past_last: expected None or 'zero' .* got 'uniform'",
            )
            for name in ("GatedCrossAttentionBlock", "VanillaCrossAttention")
        ),
        ("VanillaCrossAttention", {"ff_mult": 4}, TypeError, "ff_mult"),
    ],
)
def test_wrong_arguments_by_name(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(modules, name)(**MODULES[name][0] | options)
