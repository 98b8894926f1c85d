"""Idefics2's perceiver of transformers, patched: alone and in a whole model."""

import copy
import warnings

import patch_cases
import pytest
import torch
from torch import nn

import flamingo_fast
from flamingo_fast.patching import PatchWarning, Rule, idefics2, register, rules, state
from flamingo_fast.testing.compare import assert_close_to_oracle

transformers = pytest.importorskip("transformers")
from patch_idefics2_cases import (  # noqa: E402
    LATENTS,
    WIDTH,
    config,
    randomise,
    whole_inputs,
    whole_model,
)
from transformers.models.idefics2 import modeling_idefics2  # noqa: E402

GRID = (4, 5)
ATTENTION, PERCEIVER = "idefics2.perceiver_attention", "idefics2.perceiver"


def perceiver(attention: str = "sdpa", **sizes: object) -> nn.Module:
    cfg = config(**sizes)
    cfg._attn_implementation = attention
    return randomise(modeling_idefics2.Idefics2PerceiverResampler(cfg)).eval()


def valid_areas(*areas: tuple[int, int]) -> torch.Tensor:
    """(N, rows * columns): the first rows and columns of each image are valid."""
    rows, columns = torch.arange(GRID[0])[:, None], torch.arange(GRID[1])
    return torch.stack([((rows < h) & (columns < w)).flatten() for h, w in areas])


MASKS = {
    "none padded": valid_areas(GRID, GRID, GRID),
    "rows padded": valid_areas((4, 5), (2, 5), (3, 5)),
    "columns padded": valid_areas((3, 2), (1, 4), (4, 3)),
    "one image all padded": valid_areas((4, 3), (0, 0), (2, 5)),
    "all padded": valid_areas((0, 0), (0, 0), (0, 0)),
    "random": torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) < 0.5,
}


def call_with(mask: torch.Tensor) -> patch_cases.Call:
    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        features: torch.Tensor = model.features
        out = model.perceiver(context=features, attention_mask=mask)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out, (out * weights.to(out)).sum()

    return call


class WithFeatures(nn.Module):
    """The features are a parameter, so that their gradient is looked at too."""

    def __init__(self, resampler: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.perceiver = resampler
        generator = torch.Generator().manual_seed(2)
        self.features = nn.Parameter(torch.randn(3, 20, width, generator=generator))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.matrix
def test_parity(attention: str, dtype: torch.dtype, mask: str) -> None:
    model = WithFeatures(perceiver(attention))
    report = patch_cases.check_parity(model, call_with(MASKS[mask]), dtype)
    assert len(report.patched) == 2 * 4 + 2 and not report.left


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 1, 16), (3, 3, 20)], ids=["one kv head", "no groups"]
)
def test_parity_of_other_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    model = WithFeatures(perceiver(heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    patch_cases.check_parity(model, call_with(MASKS["columns padded"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity_of_middle_size(dtype: torch.dtype) -> None:
    model = perceiver(width=256, heads=8, kv_heads=2, head_dim=48)
    patch_cases.check_parity(WithFeatures(model, 256), call_with(MASKS["columns padded"]), dtype)


@pytest.mark.parametrize("off", ["resampler", "norm"])
def test_parts_alone(off: str) -> None:
    model = WithFeatures(perceiver())
    report = patch_cases.check_parity(model, call_with(MASKS["columns padded"]), **{off: False})
    kinds = {entry.rule for entry in report.patched}
    assert kinds == ({"idefics2.rms_norm"} if off == "resampler" else {ATTENTION, PERCEIVER})


def test_padding_has_no_part() -> None:
    """Whatever is in it; an image of padding alone has its latents to attend to."""
    model = perceiver()
    features, mask = torch.randn(3, 20, WIDTH), MASKS["one image all padded"]
    flamingo_fast.patch(model)
    with torch.no_grad():
        before = model(context=features, attention_mask=mask)
        after = model(context=features + 9 * ~mask[..., None], attention_mask=mask)
    assert torch.equal(before, after)


def test_mask_of_integers() -> None:
    model, features = perceiver(), torch.randn(3, 20, WIDTH)
    mask = MASKS["columns padded"]
    flamingo_fast.patch(model)
    with torch.no_grad():
        of_bools = model(context=features, attention_mask=mask)
        of_integers = model(context=features, attention_mask=mask.long())
    assert torch.equal(of_bools, of_integers)


def test_without_values_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no patch is left out, and none of padding is attended to."""
    monkeypatch.setattr(idefics2, "values_are_at_hand", lambda mask: False)
    for mask in MASKS.values():
        patch_cases.check_parity(WithFeatures(perceiver()), call_with(mask))


def test_autocast_keeps_the_peers_dtypes() -> None:
    model = WithFeatures(perceiver())
    call = call_with(MASKS["columns padded"])
    oracle = patch_cases.outcomes(copy.deepcopy(model).double(), call)
    with torch.autocast("cpu", torch.bfloat16):
        eager = patch_cases.outcomes(model, call)
        flamingo_fast.patch(model)
        ours = patch_cases.outcomes(model, call)
    assert ours["logits"].dtype == eager["logits"].dtype == torch.float32
    for found in (oracle, eager, ours):
        del found["loss"]
    assert_close_to_oracle(ours, eager, oracle)


def test_compiles_whole() -> None:
    model, features, mask = perceiver(), torch.randn(3, 20, WIDTH), MASKS["random"]
    with torch.no_grad():
        before = model(context=features, attention_mask=mask)
        flamingo_fast.patch(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(context=features, attention_mask=mask), before)


def test_saved_and_copied() -> None:
    model = WithFeatures(perceiver())
    patch_cases.check_saved_and_copied(model, call_with(MASKS["columns padded"]))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_told", set())


def check_told(model: nn.Module, words: str, **kwargs: object) -> None:
    """Patched it does the same, bit for bit, and says why; once."""
    features, mask = torch.randn(3, 20, WIDTH), MASKS["columns padded"]

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(context=features, attention_mask=mask, **kwargs)

    before = run()
    flamingo_fast.patch(model, norm=False)
    with pytest.warns(PatchWarning, match=words):
        assert torch.equal(run(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        run()


def test_dropout_in_training_is_the_peers(told: None) -> None:
    model = perceiver(dropout=0.5).train()
    check_told(model, "attention dropout in training")
    (note,) = flamingo_fast.patch(model).notes()
    assert "own forward runs in training" in note
    flamingo_fast.unpatch(model)
    patch_cases.check_parity(WithFeatures(model.eval()), call_with(MASKS["random"]))


def test_output_attentions_is_the_peers(told: None) -> None:
    check_told(perceiver("eager"), "output_attentions", output_attentions=True)


def test_hooks_on_attention_see_the_peers_weights(told: None) -> None:
    model, seen = perceiver("eager"), []
    model.layers[0].self_attn.register_forward_hook(lambda *call: seen.append(call[2][1]))
    check_told(model, "hooks on its attention")
    assert len(seen) == 3 and torch.equal(seen[0], seen[1])
    model.set_attn_implementation("sdpa")
    assert call_with(MASKS["random"])(WithFeatures(model))[0].isfinite().all()
    assert seen[-1] is None


def test_other_attention_functions_are_the_peers(told: None) -> None:
    def twice(module: nn.Module, q, k, v, mask, **kwargs):  # type: ignore[no-untyped-def]
        out, weights = modeling_idefics2.eager_attention_forward(module, q, k, v, mask, **kwargs)
        return 2 * out, weights

    transformers.AttentionInterface.register("test_twice", twice)
    check_told(perceiver("test_twice"), "the attention implementation 'test_twice'")


def test_attention_alone() -> None:
    """Called with a mask of the peer's, or with none; it returns no weights."""
    attn = perceiver("eager").layers[0].self_attn
    latents, context = torch.randn(2, LATENTS, WIDTH), torch.randn(2, 7, WIDTH)
    dense = torch.zeros(2, 1, LATENTS, 7 + LATENTS)
    dense[1, ..., :3] = torch.finfo(torch.float32).min
    with torch.no_grad():
        before = [attn(latents, context, mask)[0] for mask in (None, dense)]
        assert flamingo_fast.patch(attn).patched
        after = [attn(latents, context, mask) for mask in (None, dense)]
    assert after[0][1] is None and torch.equal(after[1][0], before[1])
    torch.testing.assert_close(after[0][0], before[0])


def test_attentions_that_are_left_alone_leave_the_perceiver() -> None:
    model = perceiver()
    model.layers[1].self_attn.forward = lambda *args, **kwargs: None
    report = flamingo_fast.patch(model)
    assert {entry.name for entry in report.left} == {"", "layers.1.self_attn"}
    assert any("attentions are left alone" in entry.reason for entry in report.left)


@pytest.fixture
def unknown_source() -> None:
    """As of another version."""
    for rule in idefics2.RULES:
        register(Rule(**{**vars(rule), "known": {}}), overwrite=True)
    yield
    register(*idefics2.RULES, overwrite=True)


def test_probes_draw_on_the_cpu() -> None:
    patch_cases.check_probes_draw_on_the_cpu(perceiver())


def test_probes(unknown_source: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flamingo_fast.patch(perceiver()).patched
    report = flamingo_fast.patch(perceiver(), unknown="probe")
    assert report.patched and not report.left
    # A mask of another meaning.
    theirs = modeling_idefics2.Idefics2PerceiverResampler.forward
    monkeypatch.setattr(
        modeling_idefics2.Idefics2PerceiverResampler,
        "forward",
        lambda self, context, attention_mask: theirs(self, context, ~attention_mask),
    )
    (left,) = flamingo_fast.patch(perceiver(), unknown="probe").left
    assert left.rule == PERCEIVER and "results differ" in left.reason


def call_whole(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = whole_inputs(model.dtype)
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    return out.logits, out.loss


@pytest.mark.parametrize(
    ("attention", "dtype", "training"),
    [
        ("sdpa", torch.float32, False),
        ("eager", torch.float32, True),
        ("sdpa", torch.bfloat16, True),
    ],
    ids=["sdpa", "eager train", "bf16 train"],
)
def test_whole_model(attention: str, dtype: torch.dtype, training: bool) -> None:
    model = whole_model(attention).train(training)
    for name, parameter in model.named_parameters():
        # A softmax doesn't see what is added to all its scores: this gradient is rounding alone.
        if "vision_model" in name and name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)
    report = patch_cases.check_parity(model, call_whole, dtype)
    assert {entry.rule for entry in report.patched} >= {ATTENTION, PERCEIVER}
    assert not report.left


def test_generates_the_same_tokens() -> None:
    model = whole_model()
    for beams in (1, 2):
        patch_cases.check_generation(
            model,
            lambda model, beams=beams: model.generate(
                **whole_inputs(torch.float32), max_new_tokens=6, min_new_tokens=6, num_beams=beams
            ),
        )


def test_whole_model_saved_and_loaded(tmp_path) -> None:
    model = whole_model()
    patch_cases.check_saved_and_copied(model, call_whole)
    flamingo_fast.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(map(state.is_patched, loaded.modules()))
    with torch.no_grad():
        torch.testing.assert_close(call_whole(loaded)[0], call_whole(model)[0])


def test_rules_take_any_module() -> None:
    for module in (nn.Linear(2, 2), nn.ModuleList(), nn.Module()):
        assert rules.rule_of(module) is None
