"""Idefics of transformers, patched: outputs, gradients, generation, and what it keeps."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import patch_cases
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flamingo_fast
from flamingo_fast.patching import PatchWarning
from flamingo_fast.patching.state import is_patched
from flamingo_fast.testing.compare import assert_close_to_oracle

pytest.importorskip("transformers")
from transformers import DynamicCache, IdeficsConfig, IdeficsForVisionText2Text

VOCABULARY = 50

VARIANTS: dict[str, dict[str, Any]] = {
    "resampler": {"cross_layer_interval": 2},
    "norms": {"qk_layer_norms": True, "qk_layer_norms_perceiver": True},
    "features": {"use_resampler": False, "alpha_type": "vector", "qk_layer_norms": True},
    "mid-size": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "cross_layer_interval": 4,
        "n_latents": 16,
        "head_dim": 96,
        "width": 96,
        "image_size": 60,
    },
}


def make_model(
    *,
    use_resampler: bool = True,
    qk_layer_norms_perceiver: bool = False,
    n_latents: int = 3,
    head_dim: int = 8,
    width: int = 24,
    image_size: int = 30,
    attention: str = "sdpa",
    **options: Any,
) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_layer_interval": 1,
        "alpha_initializer": "ones",
    }
    config = IdeficsConfig(
        vocab_size=VOCABULARY,
        additional_vocab_size=0,
        use_resampler=use_resampler,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": width,
            "image_size": image_size,
            "patch_size": 15,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 2 * width,
        },
        perceiver_config={
            "use_resampler": use_resampler,
            "resampler_n_latents": n_latents,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": head_dim,
            "qk_layer_norms_perceiver": qk_layer_norms_perceiver,
        },
        attn_implementation=attention,
        **{**sizes, **options},
    )
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        # Far from their starts, where much is small and the model always says the same.
        parameter.data.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        # What all keys have in common changes no softmax: such gradients are all error.
        parameter.requires_grad_(not name.endswith(("k_proj.bias", "k_layer_norm.bias")))
    if use_resampler:
        for _, feed_forward in model.model.perceiver_resampler.blocks:
            # The derivative of ReLU jumps where rounding changes a sign.
            feed_forward.act = nn.SiLU()
    return patch_cases.open_gates(model).eval()


def make_inputs(
    mask: str = "processor", *, tokens: int = 11, num_images: int = 3, image_size: int = 30
) -> dict[str, torch.Tensor]:
    """Two samples; the first one's padding is on the left, the second one has fewer images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, tokens), generator=generator)
    attended = torch.ones(2, tokens, dtype=torch.long)
    attended[0, :2] = 0
    images = torch.zeros(2, tokens, num_images, dtype=torch.long)
    if mask == "random":
        images = torch.randint(0, 2, images.shape, generator=generator)
        images[1, :3] = 0
    elif mask == "processor":
        # Of the first sample consecutive images; the second's comes late, its other one is padding.
        for sample, starts in enumerate(([3, 4, 8], [6])):
            for image, start in enumerate(starts):
                images[sample, start:] = 0
                images[sample, start:, image] = 1
    elif mask == "text in batch":
        images[0, 3:, 1] = 1
    images[attended == 0] = 0
    pixels = torch.randn(2, num_images, 3, image_size, image_size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "pixel_values": pixels,
        "image_attention_mask": images,
    }


def make_call(inputs: dict[str, torch.Tensor], **options: Any) -> patch_cases.Call:
    def call(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype), **options}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        out = model(**given, labels=labels, use_cache=False)
        return out.logits, out.loss

    return call


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["processor", "random", "text in batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(variant: str, mask: str, dtype: torch.dtype, train: bool) -> None:
    model = make_model(**VARIANTS[variant]).train(train)
    call = make_call(make_inputs(mask, image_size=model.config.vision_config.image_size))
    report = patch_cases.check_parity(model, call, dtype)
    rules = {entry.rule for entry in report.patched}
    assert not report.left and {"idefics.model", "idefics.cross_attention"} <= rules


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(attention: str, reentrant: bool) -> None:
    model = make_model(attention=attention).train()
    before = patch_cases.outcomes(model, make_call(make_inputs()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.gated_cross_attn_layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    flamingo_fast.patch(model)
    after = patch_cases.outcomes(model, make_call(make_inputs()))
    assert len(calls) == 2
    assert before.keys() == after.keys()
    close(after, before)


def generate(**options: Any) -> Callable[[Any], torch.Tensor]:
    def of(model: Any) -> torch.Tensor:
        given = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, **options}
        return model.generate(**make_inputs(), **given)

    return of


@pytest.mark.parametrize("variant", ["resampler", "features"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beam", "uncached", "static"],
)
def test_generation(variant: str, options: dict) -> None:
    patch_cases.check_generation(make_model(**VARIANTS[variant]), generate(**options))


@pytest.mark.parametrize("variant", ["resampler", "features"])
def test_images_are_projected_once_a_generation(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    layer = model.model.gated_cross_attn_layers[0]
    modules = [layer.cross_attn.k_proj, layer.cross_attn.v_proj]
    if variant == "resampler":
        modules.append(model.model.perceiver_resampler)
        modules.append(model.model.perceiver_resampler.blocks[0][1])
    calls: dict[Any, int] = dict.fromkeys(modules, 0)
    for module in modules:
        module.register_forward_hook(lambda module, *_: calls.update({module: calls[module] + 1}))
    flamingo_fast.patch(model, media_kv_cache=False)
    generate()(model)
    assert calls[modules[0]] == calls[modules[1]] == 7
    calls.update(dict.fromkeys(modules, 0))
    flamingo_fast.patch(model)
    for times in (1, 2):
        generate()(model)
        assert [calls[each] for each in (*modules[:2], *modules[3:])] == [times] * (
            2 + (variant == "resampler")
        )


def logits_of(model: Any, inputs: dict, cache: Any, tokens: slice, **features: Any) -> torch.Tensor:
    given = {
        "input_ids": inputs["input_ids"][:, tokens],
        "attention_mask": inputs["attention_mask"][:, : tokens.stop],
        "image_attention_mask": inputs["image_attention_mask"][:, tokens],
        "past_key_values": cache,
    }
    return model(**given, **features, use_cache=True).logits


@torch.no_grad()
def test_new_images_in_mid_generation() -> None:
    model = make_model(use_resampler=False)
    inputs = make_inputs("random")
    first, second = inputs["pixel_values"], inputs["pixel_values"].flip(0)
    features = torch.randn(2, 3, 5, 24)

    def decode() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        mine = features.clone()
        # Of tensors made there PyTorch counts no changes.
        change = 1 if mine.is_inference() else -1
        found = [logits_of(model, inputs, cache, slice(0, 6), pixel_values=first)]
        found.append(logits_of(model, inputs, cache, slice(6, 7), pixel_values=second))
        for token in (7, 8):
            step = slice(token, token + 1)
            found.append(logits_of(model, inputs, cache, step, image_encoder_embeddings=mine))
            mine.mul_(change)
        found.append(logits_of(model, inputs, cache, slice(9, 11), pixel_values=first))
        return found

    before = decode()
    with torch.inference_mode():
        inference = decode()
    with flamingo_fast.patched(model):
        close(decode(), before)
        with torch.inference_mode():
            close(decode(), inference)


@torch.no_grad()
def test_cached_decoding_in_bf16() -> None:
    model = make_model().bfloat16()
    inputs = make_inputs()
    steps = [slice(0, 6), *(slice(token, token + 1) for token in range(6, 11))]

    def decode(model: Any) -> dict[str, torch.Tensor]:
        cache = DynamicCache(config=model.config)
        pixels = inputs["pixel_values"].to(model.dtype)
        of = [logits_of(model, inputs, cache, step, pixel_values=pixels) for step in steps]
        return {"logits": torch.cat(of, 1)}

    oracle, before = decode(copy.deepcopy(model).double()), decode(model)
    flamingo_fast.patch(model)
    assert_close_to_oracle(decode(model), before, oracle)


@torch.no_grad()
def test_weights_that_change_between_generations() -> None:
    model = make_model()
    features = torch.randn(6, 5, 24).view(2, 3, 5, 24)
    inputs = make_inputs()
    step = slice(0, 11)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        return logits_of(model, inputs, cache, step, image_encoder_embeddings=features)

    flamingo_fast.patch(model)
    logits()
    for parameter in model.parameters():
        parameter.data = -parameter.data
        parameter.data.mul_(1.1)
    after = logits()
    flamingo_fast.unpatch(model)
    close(after, logits())


def test_what_is_kept_ends_with_the_cache() -> None:
    model = make_model()
    flamingo_fast.patch(model)
    inputs = make_inputs()
    cache = DynamicCache(config=model.config)
    state = vars(model.model)["_flamingo_fast"]
    with torch.no_grad():
        logits_of(model, inputs, cache, slice(0, 11), pixel_values=inputs["pixel_values"])
    assert len(state.memory["kept"]) == 1
    assert not copy.deepcopy(state).memory
    del cache
    assert len(state.memory["kept"]) == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_states_and_attentions(attention: str) -> None:
    model = make_model(attention=attention)
    inputs = make_inputs("random")
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    before = model(**inputs, **options)
    with flamingo_fast.patched(model):
        after = model(**inputs, **options)
    assert len(before.hidden_states) == 3
    close(after.hidden_states, before.hidden_states)
    if attention == "eager":
        assert len(before.attentions) == 2
        close(after.attentions, before.attentions)


def test_saved_and_copied() -> None:
    patch_cases.check_saved_and_copied(make_model(**VARIANTS["norms"]), make_call(make_inputs()))


@pytest.mark.parametrize(
    ("option", "left"),
    [
        ("cross_attention", set()),
        ("resampler", set()),
        ("gated_residual", set()),
        ("norm", {"idefics.rms_norm"}),
        ("media_kv_cache", set()),
    ],
)
def test_without_a_feature(option: str, left: set) -> None:
    model = make_model()
    report = patch_cases.check_parity(model, make_call(make_inputs()), **{option: False})
    assert {entry.rule for entry in report.left} == left
    patch_cases.check_generation(model, generate(), **{option: False})


def test_zero_block_leaves_tokens_without_images() -> None:
    model = make_model()
    layer = model.model.gated_cross_attn_layers[0]
    passed = []
    layer.register_forward_hook(lambda _, args, out: passed.append((args[0], out)))
    inputs = make_inputs("random")
    silent = ~inputs["image_attention_mask"].bool().any(2)
    assert silent.any() and not silent.all()
    call = make_call(inputs)
    for options in ({}, {"cross_attention": False}):
        call(model)
        flamingo_fast.patch(model, unattended="zero_block", **options)
        call(model)
        flamingo_fast.unpatch(model)
        (x, theirs), (y, ours) = passed
        assert torch.equal(x, y) and torch.equal(ours[silent], x[silent])
        close(ours[~silent], theirs[~silent])
        assert not torch.allclose(theirs[silent], x[silent])
        passed.clear()
    patch_cases.check_parity(model, call, unattended="zero")


def test_layer_on_its_own() -> None:
    model = make_model()
    layer = model.model.gated_cross_attn_layers[0]
    x, features = torch.randn(2, 5, 32), torch.randn(2, 6, 24)
    mask = torch.randint(0, 2, (2, 1, 5, 6)).bool()
    mask[0, 0, 1] = False
    arguments = {
        "image_attention_mask": torch.zeros(2, 1, 5, 6).masked_fill(~mask, torch.finfo().min),
        "cross_attention_gate": mask.any(3)[:, 0].float(),
    }
    before = layer(x, None, features, **arguments)
    flamingo_fast.patch(model)
    close(layer(x, None, features, **arguments), before)
    with pytest.raises(ValueError, match="cross_attention_gate"):
        layer(x, None, features)
    with pytest.raises(NotImplementedError, match="not implemented"):
        layer(x, None, features, **arguments, past_key_values=DynamicCache())


class Sizes(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return out


@pytest.mark.parametrize("mask", ["processor", "random"])
@torch.no_grad()
def test_no_mask_of_all_image_tokens(mask: str) -> None:
    model = make_model(use_resampler=False, image_size=60)
    inputs = make_inputs(mask, tokens=128, num_images=16)
    inputs["image_encoder_embeddings"] = torch.randn(2, 16, 17, 24)
    del inputs["pixel_values"]
    mask_size = inputs["image_attention_mask"].numel() * 17
    with Sizes() as before:
        model(**inputs)
    flamingo_fast.patch(model)
    with Sizes() as after:
        model(**inputs)
    assert before.largest == mask_size and after.largest < mask_size


def test_dropout_in_training_is_the_peers() -> None:
    model = make_model(dropout=0.3)
    call = make_call(make_inputs())
    patch_cases.check_parity(model, call)
    model.train()
    torch.manual_seed(0)
    before, _ = call(model)
    report = flamingo_fast.patch(model)
    assert "attention dropout" in report.notes()[0]
    torch.manual_seed(0)
    close(call(model)[0], before)


def test_hooks_on_the_attention_are_called() -> None:
    model = make_model()
    layer = model.model.gated_cross_attn_layers[1]
    calls = []
    layer.cross_attn.register_forward_hook(lambda *_: calls.append(1))
    call = make_call(make_inputs())
    before, _ = call(model)
    flamingo_fast.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)
        close(call(model)[0], before)
    assert len(calls) == 2


def test_layer_that_was_unpatched_gets_its_mask() -> None:
    model = make_model()
    call = make_call(make_inputs())
    before, _ = call(model)
    flamingo_fast.patch(model)
    flamingo_fast.unpatch(model.model.gated_cross_attn_layers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)
        close(call(model)[0], before)


def test_other_attention_falls_back() -> None:
    model = make_model()
    inputs = make_inputs()
    before = model(**inputs).logits
    flamingo_fast.patch(model)
    calls = []

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        calls.append(set(_))
        scores = q @ k.mT * scaling + (0 if mask is None else mask)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("written_here", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("written_here", eager_mask)
    model.config._attn_implementation = "written_here"
    with pytest.warns(PatchWarning, match="attention is 'written_here'"):
        after = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    close(after[valid], before[valid])
    assert calls and all("flamingo_fast_images" not in each for each in calls)


def test_wrong_inputs_are_refused_as_before() -> None:
    model = make_model()
    inputs = make_inputs()
    wrong = [
        {**inputs, "image_attention_mask": inputs["image_attention_mask"][:, 1:4]},
        {**inputs, "image_attention_mask": inputs["image_attention_mask"][..., :2]},
        {**inputs, "pixel_values": None},
    ]

    def errors() -> list[str]:
        found = []
        for each in wrong:
            with pytest.raises(Exception) as error:  # noqa: PT011
                model(**each)
            found.append(str(error.value))
        return found

    before = errors()
    with flamingo_fast.patched(model):
        assert errors() == before


@torch.no_grad()
def test_autocast() -> None:
    model = make_model(qk_layer_norms=True)
    inputs = make_inputs()
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs, output_hidden_states=True)
        flamingo_fast.patch(model)
        after = model(**inputs, output_hidden_states=True)
    assert after.hidden_states[-1].dtype == before.hidden_states[-1].dtype
    error, allowed = ((each.logits - exact).abs().max() for each in (after, before))
    assert error <= 2 * allowed


def test_layers_of_other_code_keep_their_mask() -> None:
    model = make_model()
    layer = model.model.gated_cross_attn_layers[0]
    call = make_call(make_inputs())

    class Changed(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(2 * hidden_states, *args, **kwargs)

    layer.__class__ = Changed
    before, _ = call(model)
    report = flamingo_fast.patch(model)
    assert not is_patched(layer) and not is_patched(model.model)
    reasons = {entry.rule: entry.reason for entry in report.left}
    assert reasons["idefics.model"] == "1 of its cross-attention layers are left"
    close(call(model)[0], before)


def test_output_has_the_same_fields() -> None:
    model = make_model()
    inputs = make_inputs()

    def fields() -> list[str]:
        return [field.name for field in dataclasses.fields(model(**inputs))]

    before = fields()
    flamingo_fast.patch(model)
    assert fields() == before
    assert isinstance(model(**inputs, return_dict=False), tuple)
