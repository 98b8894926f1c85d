"""transformers' own hooks, and what its tests of Idefics, Idefics2 and Mllama ask of a model.

Those tests are not in its wheel, and leave gates closed and masks whole; here they are open, images
are not first, and one is padded.
"""

import copy
import io
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from patch_idefics2_cases import IMAGE, whole_inputs, whole_model
from patch_models import FAMILIES
from patch_models import IMAGE as LAST_ID
from torch import nn

import flamingo_fast
from flamingo_fast.patching import state, transformers_hooks
from flamingo_fast.patching.transformers_hooks import patch_on_load, register_attention

transformers = pytest.importorskip("transformers")

IS_5 = int(transformers.__version__.partition(".")[0]) >= 5
NAMES = ("idefics", "idefics2", "mllama")
needs_hook = pytest.mark.skipif(not IS_5, reason="transformers 5 has the hook")


def make(name: str) -> nn.Module:
    return whole_model() if name == "idefics2" else FAMILIES[name].model()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return whole_inputs(torch.float32) if name == "idefics2" else FAMILIES[name].inputs()


def forward(model: nn.Module, name: str, **kwargs: object) -> object:
    # Of a copy, whose weights PyTorch aligns: on some CPUs the bits of a product depend on where
    # weights begin in memory, and a file that is mapped has them anywhere.
    with torch.no_grad():
        return copy.deepcopy(model)(**{**inputs_of(name), **kwargs})


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is told once is not told here: other tests wait for it."""
    monkeypatch.setattr(state, "_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flamingo_fast.patching.PatchWarning)
        yield


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@needs_hook
def test_loads_patched(name: str, tmp_path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    with patch_on_load() as reports:
        loaded = type(model).from_pretrained(tmp_path)
    (report,) = reports
    assert report.patched and not report.left
    by_hand = make(name)
    flamingo_fast.patch(by_hand)
    for each, other in zip(loaded.named_modules(), by_hand.named_modules(), strict=True):
        assert each[0] == other[0] and type(each[1]) is type(other[1])
        assert state.is_patched(each[1]) == state.is_patched(other[1]), each[0]
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(forward(loaded, name).logits, forward(by_hand, name).logits)
    torch.save(loaded, io.BytesIO())

    loaded.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(map(state.is_patched, again.modules()))
    assert torch.equal(forward(again, name).logits, forward(model, name).logits)
    flamingo_fast.unpatch(loaded)
    assert torch.equal(forward(loaded, name).logits, forward(model, name).logits)


def test_saved_patched_and_loaded(name: str, tmp_path) -> None:
    model = make(name)
    before = forward(model, name).logits
    flamingo_fast.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(map(state.is_patched, loaded.modules()))
    assert torch.equal(forward(loaded, name).logits, before)


def test_without_transformers_it_is_said_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"transformers is not installed: pip install 'flamingo_fast\[models\]'"
    with pytest.raises(ImportError, match=message), patch_on_load():
        pass
    with pytest.raises(ImportError, match=message):
        register_attention()


@needs_hook
def test_made_of_a_config_with_options() -> None:
    """New weights are as ever."""
    model = make("idefics2")
    torch.manual_seed(0)
    plain = transformers.AutoModelForImageTextToText.from_config(model.config)
    with patch_on_load(norm=False) as reports:
        torch.manual_seed(0)
        made = transformers.AutoModelForImageTextToText.from_config(model.config)
    assert type(made) is type(model) and not reports[0].options.norm
    kinds = {type(each).__name__ for each in made.modules() if state.is_patched(each)}
    assert kinds and not any("Norm" in kind for kind in kinds)
    for key, value in plain.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key


@needs_hook
def test_is_an_instance_of_its_class_while_it_is_made() -> None:
    from transformers.models.idefics2 import modeling_idefics2 as idefics2
    from transformers.monkey_patching import apply_patches

    original = idefics2.Idefics2PerceiverResampler
    config = make("idefics2").config.perceiver_config
    with patch_on_load(), apply_patches():
        assert idefics2.Idefics2PerceiverResampler is not original
        made = idefics2.Idefics2PerceiverResampler(config)
        assert isinstance(made, idefics2.Idefics2PerceiverResampler)
        assert not isinstance(nn.Identity(), idefics2.Idefics2PerceiverResampler)
    assert type(made) is original and state.is_patched(made)


@needs_hook
def test_a_model_that_fails_leaves_no_class_behind() -> None:
    config = make("idefics").config
    config.num_attention_heads = 5
    module = sys.modules["transformers.models.idefics.modeling_idefics"]
    original = module.IdeficsModel
    with patch_on_load(), pytest.raises(ValueError, match="divisible"):
        transformers.AutoModelForImageTextToText.from_config(config)
    assert module.IdeficsModel is original is transformers.IdeficsModel


@needs_hook
def test_hook_is_given_back_and_wrong_options_are_told_first() -> None:
    from transformers.monkey_patching import get_patch_mapping

    with pytest.raises(TypeError, match="norm: expected True or False"), patch_on_load(norm=1):
        pass
    assert not get_patch_mapping()
    with patch_on_load():
        # Names of which one is in another's are different models.
        assert all(each[0] == "^" and each[-1] == "$" for each in get_patch_mapping())
        with pytest.raises(ValueError, match="already"), patch_on_load():
            pass
    assert not get_patch_mapping()


@pytest.mark.skipif(IS_5, reason="of transformers 4")
def test_transformers_4_is_told_of_patch() -> None:
    with pytest.raises(ImportError, match=r"flamingo_fast\.patch\(model\)"), patch_on_load():
        pass


def test_attention_function(name: str) -> None:
    """Equal to eager with masks; and without, where "sdpa" is causal in Mllama."""
    register_attention()
    model = make(name)
    masks = [inputs_of(name)]
    if name == "mllama":
        masks = [{**masks[0], "cross_attention_mask": None}, *masks]
    for inputs in masks:
        outputs = {}
        for attention in ("eager", "sdpa", "flamingo_fast"):
            model.set_attn_implementation(attention)
            with torch.no_grad():
                outputs[attention] = model(**inputs).logits
        close(outputs["flamingo_fast"], outputs["eager"])
        is_causal = inputs.get("cross_attention_mask", 0) is None
        assert is_causal != torch.allclose(outputs["sdpa"], outputs["eager"], atol=1e-3)
    flamingo_fast.patch(model)
    warnings.simplefilter("error", flamingo_fast.patching.PatchWarning)
    with torch.no_grad():
        close(model(**inputs).logits, outputs["eager"])


def test_attention_function_leaves_self_attention_causal() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)

    def of(is_cross: bool) -> torch.Tensor:
        module = nn.Module()
        module.is_causal, module.is_cross_attention = True, is_cross
        out, weights = transformers_hooks.attention(module, q, k, v, None, scaling=1.0)
        assert weights is None
        return out.transpose(1, 2)

    attend = nn.functional.scaled_dot_product_attention
    close(of(False), attend(q, k, v, is_causal=True, scale=1.0))
    close(of(True), attend(q, k, v, scale=1.0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_of_the_same_kinds(name: str, attention: str) -> None:
    """Hidden states, weights of attention, tuples; `retain_grad` of them works."""
    model = make(name)
    model.set_attn_implementation(attention)
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    theirs = forward(model, name, **asked)
    theirs_tuple = forward(model, name, return_dict=False)
    flamingo_fast.patch(model)
    ours = forward(model, name, **asked)
    assert list(ours) == list(theirs) and type(ours) is type(theirs)
    for kind in ("hidden_states", "attentions"):
        for mine, other in zip(ours.get(kind, ()), theirs.get(kind, ()), strict=True):
            close(mine, other)
    close(ours.logits, theirs.logits)
    ours_tuple = forward(model, name, return_dict=False)
    assert [type(each) for each in ours_tuple] == [type(each) for each in theirs_tuple]
    close(ours_tuple[0], theirs_tuple[0])
    states = model(**inputs_of(name), output_hidden_states=True).hidden_states
    states[1].retain_grad()
    states[-1].sum().backward()
    assert states[1].grad.abs().sum() > 0


def test_a_row_is_the_same_alone(name: str) -> None:
    model = make(name)
    flamingo_fast.patch(model)
    together = forward(model, name).logits
    for row in range(2):
        with torch.no_grad():
            alone = model(**{key: each[row : row + 1] for key, each in inputs_of(name).items()})
        close(alone.logits[0], together[row])


def test_recomputed_layers_have_the_same_gradients(name: str) -> None:
    found = []
    for patched, recompute in ((False, False), (True, False), (True, True)):
        model = make(name).train()
        if patched:
            flamingo_fast.patch(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = inputs_of(name)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    theirs, ours, recomputed = found
    assert theirs.keys() == ours.keys() == recomputed.keys()
    for key, value in theirs.items():
        for each in (ours[key], recomputed[key]):
            torch.testing.assert_close(each, value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}],
    ids=["greedy", "no cache", "beams", "sampled"],
)
def test_generates_the_same(name: str, how: dict[str, object]) -> None:
    model = make(name)
    inputs = inputs_of(name)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :2] = 0
    tokens = []
    for _ in range(2):
        torch.manual_seed(0)
        tokens.append(
            model.generate(
                **inputs,
                max_new_tokens=4,
                min_new_tokens=4,
                suppress_tokens=[IMAGE, LAST_ID],
                **how,
            )
        )
        flamingo_fast.patch(model)
    assert torch.equal(*tokens)


def test_embeddings_in_place_of_ids(name: str) -> None:
    model = make(name)
    flamingo_fast.patch(model)
    inputs = inputs_of(name)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    from_embeddings = forward(model, name, input_ids=None, inputs_embeds=embeddings)
    close(from_embeddings.logits, forward(model, name).logits)


def test_idefics_images_that_no_token_sees_change_nothing() -> None:
    """transformers' test of cross-attention gates, with gates and layers open."""
    model = make("idefics")
    flamingo_fast.patch(model)
    inputs = inputs_of("idefics")
    nothing = torch.zeros_like(inputs["image_attention_mask"])
    unseen, other_unseen, seen, other_seen = (
        forward(model, "idefics", pixel_values=pixels, image_attention_mask=mask).logits
        for mask in (nothing, torch.ones_like(nothing))
        for pixels in (inputs["pixel_values"], 1 - inputs["pixel_values"])
    )
    assert torch.equal(unseen, other_unseen)
    assert not torch.allclose(seen, other_seen) and not torch.allclose(seen, unseen)
