"""Patched OpenFlamingo: whole models of its own code; modules alone, vendored and edited."""

import copy
import inspect
import linecache
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import patch_cases
import pytest
import torch
from patch_open_flamingo_cases import (
    BF16,
    EOC,
    FP32,
    IMAGE,
    PAD,
    attentions_of,
    call_model,
    make_batch,
    make_model,
)
from torch import nn

from flamingo_fast import modules
from flamingo_fast.patching import PatchReport, PatchWarning, parts, patch, unpatch
from flamingo_fast.patching.state import is_patched, state_of
from flamingo_fast.testing import peers


@pytest.mark.parametrize(
    ("family", "immediate", "dtype", "training"),
    [
        ("llama", True, FP32, False),
        ("gpt2", True, BF16, True),
        ("gpt2", False, FP32, True),
        ("llama", False, BF16, False),
    ],
)
def test_whole_model(family: str, immediate: bool, dtype: torch.dtype, training: bool) -> None:
    model = make_model(family, immediate, every=2 if training else 1).train(training)
    report = patch_cases.check_parity(model, call_model, dtype)
    assert not report.left
    rules = {entry.rule for entry in report.patched}
    names = ("attention", "block", "perceiver_attention", "resampler")
    assert rules == {f"open_flamingo.{name}" for name in names}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_whole_model_of_middle_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fused gated residuals of larger ones."""
    monkeypatch.setattr(parts, "_FEW_IN_TRAINING", 0)
    patch_cases.check_parity(make_model("llama", dim=256, depth=2), call_model, dtype)


@pytest.mark.parametrize("off", ["cross_attention", "resampler", "gated_residual", "norm"])
def test_features_left_out(off: str) -> None:
    report = patch_cases.check_parity(make_model(depth=2), call_model, **{off: False})
    assert {entry.reason for entry in report.left} <= {f"{off}=False"}
    assert bool(report.left) == (off != "norm")


def _generate(model: Any, beams: int = 1, tokens: int = 8) -> torch.Tensor:
    ids, mask, images = make_batch()
    options = {"max_new_tokens": tokens, "num_beams": beams, "pad_token_id": PAD}
    return model.generate(images, ids, attention_mask=mask, do_sample=False, **options)[:, 11:]


@pytest.mark.parametrize(
    ("family", "immediate", "beams", "cache"),
    [("llama", True, 1, True), ("gpt2", False, 1, True), ("llama", True, 3, True),
     ("gpt2", True, 1, False)],
)  # fmt: skip
def test_generation(family: str, immediate: bool, beams: int, cache: bool) -> None:
    model = make_model(family, immediate)
    patch_cases.check_generation(model, lambda model: _generate(model, beams), media_kv_cache=cache)


def _conversation(model: Any) -> Iterator[torch.Tensor]:
    """Logits of a prompt with an image, of two tokens, and of a second image and two more."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 2, 1, 3, 8, 8, generator=generator)
    turns = [torch.tensor([[7, IMAGE, 9], [IMAGE, 8, 9]]), torch.tensor([[6], [7]])]
    turns += [torch.tensor([[8], [9]]), torch.tensor([[IMAGE, 5], [IMAGE, 6]])]
    turns += [torch.tensor([[9], [9]]), torch.tensor([[10], [11]])]
    lang: Any = model.lang_encoder
    lang._use_cached_vision_x = True
    past, seen = None, 0
    for number, ids in enumerate(turns):
        if number in (0, 3):
            # The text before is in the language model's cache, and its images are not asked again.
            model._encode_vision_x(images[:, 0:1] if number == 0 else images[:, 1:2])
        seen += ids.shape[1]
        mask = torch.ones(2, seen, dtype=torch.long)
        output = lang(ids, mask, past_key_values=past, use_cache=True)
        past = output.past_key_values
        yield output.logits
    lang.clear_conditioned_layers()
    lang._use_cached_vision_x = False


@pytest.mark.parametrize("inference", [False, True])
def test_new_image_in_the_middle_of_a_generation(inference: bool) -> None:
    model = make_model("gpt2")
    with torch.inference_mode(inference), torch.no_grad():
        before = list(_conversation(model))
        patch(model)
        after = list(_conversation(model))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4])
def test_text_after_media_that_were_cached(tokens: int) -> None:
    model = make_model("llama")
    ids, _, images = make_batch()

    @torch.no_grad()
    def scores() -> torch.Tensor:
        model.cache_media(ids, images)
        text = torch.randint(5, EOC, (5, tokens), generator=torch.Generator().manual_seed(1))
        out = model(None, text, torch.ones_like(text), clear_conditioned_layers=False)
        model.uncache_media()
        return out.logits

    before = scores()
    patch(model)
    torch.testing.assert_close(scores(), before, rtol=1e-4, atol=1e-4)


def _count_projections(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an element with each call of a cross-attention's to_kv."""
    projections = {id(attn.to_kv) for attn in attentions_of(model)}
    calls: list[int] = []
    linear = nn.Linear.forward

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if id(self) in projections:
            calls.append(x.shape[0])
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return calls


def test_media_are_projected_once_in_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    calls = _count_projections(model, monkeypatch)
    found = {}
    for cache in (True, False):
        patch(model, media_kv_cache=cache)
        calls.clear()
        _generate(model)
        found[cache] = len(calls)
    assert found == {True: 3, False: 24}
    patch(model)
    call_model(model)
    calls.clear()
    call_model(model)
    assert len(calls) == 3  # With gradients, or in another pass of images, always anew.


def test_what_is_kept_of_media_dies_with_them() -> None:
    model = make_model()
    patch(model)
    for end in (model.lang_encoder.clear_conditioned_layers, lambda: unpatch(model)):
        with torch.no_grad():
            model.cache_media(*make_batch()[::2])
            text = torch.full((5, 1), 7)
            model(None, text, torch.ones_like(text), clear_conditioned_layers=False)
        memories = [state_of(attn).memory["media_kv"] for attn in attentions_of(model)]
        tensors = [(memory._value[0], memory._sample) for memory in memories]
        kept = [weakref.ref(each) for pair in tensors for each in pair]
        del memories, tensors
        assert all(each() is not None for each in kept) and len(kept) == 6
        end()
        assert all(each() is None for each in kept)
        model.uncache_media()


def test_what_is_kept_follows_weights_and_media() -> None:
    module = _attention()
    plain = copy.deepcopy(module)
    patch(module)
    x, media, locations = _inputs()
    with torch.no_grad():
        for change in (
            lambda: module.to_kv.weight.mul_(-1),
            lambda: media.add_(1),
            lambda: module.load_state_dict(copy.deepcopy(module.state_dict())),
            lambda: setattr(module.to_kv, "weight", nn.Parameter(module.to_kv.weight * 2)),
        ):
            module(x, media, locations)
            change()
            plain.load_state_dict(module.state_dict())
            torch.testing.assert_close(module(x, media, locations), plain(x, media, locations))
        with torch.autocast("cpu", BF16):
            assert module(x, media, locations).dtype == plain(x, media, locations).dtype


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_media_that_change_uncounted_are_noticed(mode: Any) -> None:
    module = _attention()
    plain = copy.deepcopy(module)
    patch(module)
    x, _, locations = _inputs()
    with mode():
        media = torch.randn(_inputs()[1].shape)
        for change in (
            lambda: media.data.mul_(-1),
            lambda: media.numpy()[:1].fill(2),
            lambda: media[-1:, :1].data.add_(1),
        ):
            module(x, media, locations)
            change()
            torch.testing.assert_close(module(x, media, locations), plain(x, media, locations))


class _Gated(nn.Module):
    def __init__(self, ff: nn.Module) -> None:
        super().__init__()
        self.ff = ff

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ff(x).sigmoid() * x


@pytest.mark.parametrize("make", [_Gated, lambda ff: nn.Sequential(), lambda ff: ff[1]])
def test_feed_forward_of_any_class(make: Any) -> None:
    torch.manual_seed(0)
    block = _block_of(peers.open_flamingo())
    block.ff = make(block.ff)
    block.attn_gate.data.fill_(0.5)
    block.ff_gate.data.fill_(0.5)
    _, media, locations = _inputs()
    x = torch.randn(*locations.shape, 20)
    if type(block.ff) is nn.Linear:
        block.ff = nn.Linear(20, 20)
    before = block(x, media, locations)
    patch(block)
    torch.testing.assert_close(block(x, media, locations), before)


def test_nothing_is_kept_by_a_checkpoint_or_of_sharded_weights() -> None:
    module = _attention()
    patch(module)
    x, media, locations = _inputs()
    media.requires_grad_()
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint(module.train(), x, media, locations, use_reentrant=True).sum().backward()
    module.eval().to_kv._is_fsdp_managed_module = True
    with torch.no_grad():
        module(x, media, locations)
    assert not state_of(module).memory


def test_hooks_of_projections_see_each_call() -> None:
    module = _attention()
    shapes = []
    module.to_kv.register_forward_hook(
        lambda _, args, out: shapes.append((args[0].shape, out.shape))
    )
    x, media, locations = _inputs()
    with torch.no_grad():
        module(x, media, locations)
        patch(module)
        module(x, media, locations)
        module(x, media, locations)
    assert len(shapes) == 3 and len(set(shapes)) == 1


def _attention(immediate: bool = True, **options: Any) -> Any:
    torch.manual_seed(2)
    sizes = {"dim": 20, "dim_visual": 12, "dim_head": 8, "heads": 3}
    helpers = options.pop("helpers", None) or peers.open_flamingo()
    cls = options.pop("cls", helpers.MaskedCrossAttention)
    return cls(**sizes, only_attend_immediate_media=immediate).eval()


def _inputs(dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text of 6 tokens, two media of 5, and locations: late, side by side, too many, none."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 6, 20, generator=generator).to(dtype)
    media = torch.randn(4, 2, 5, 12, generator=generator).to(dtype)
    locations = torch.zeros(4, 6, dtype=torch.bool)
    for row, places in enumerate([(3,), (1, 2), (0, 2, 4), ()]):
        locations[row, list(places)] = True
    return x, media, locations


class WithInputs(nn.Module):
    """A module, and its inputs as parameters."""

    def __init__(self, module: nn.Module, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ParameterList(inputs)

    def forward(self, *others: Any, **options: Any) -> torch.Tensor:
        return self.module(*self.inputs, *others, **options)


def _weighted(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, (out * weights).sum() / 10


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_attention_alone(immediate: bool, dtype: torch.dtype, cached: bool) -> None:
    x, media, locations = _inputs()
    model = WithInputs(_attention(immediate), x[:, :4] if cached else x, media)
    report = patch_cases.check_parity(
        model, lambda model: _weighted(model(locations, use_cached_media=cached)), dtype
    )
    assert len(report.patched) == 1 and len(report.notes()) == 1


@pytest.mark.parametrize("unattended", ["zero", "zero_block"])
@pytest.mark.parametrize("immediate", [True, False])
def test_other_meanings_of_text_without_media(unattended: str, immediate: bool) -> None:
    torch.manual_seed(2)
    sizes = {"dim": 20, "dim_visual": 12, "dim_head": 8, "heads": 3}
    options: dict[str, Any] = {**sizes, "only_attend_immediate_media": immediate}
    peer = peers.open_flamingo().GatedCrossAttentionBlock(**options)
    patch_cases.open_gates(peer)
    ours = modules.GatedCrossAttentionBlock(**options, unattended=unattended, past_last="zero")
    ours.load_state_dict(peer.state_dict())
    x, media, locations = _inputs()
    assert not torch.allclose(peer(x, media, locations), ours(x, media, locations), atol=1e-3)
    report = patch(peer, unattended=unattended)
    assert not report.notes()
    torch.testing.assert_close(peer(x, media, locations), ours(x, media, locations))
    if unattended == "zero_block":
        assert torch.equal(peer(x, media, locations)[3], x[3])
    text = peer(x[:, :1], media, locations, use_cached_media=True)
    torch.testing.assert_close(text, ours(x[:, :1], media, locations, use_cached_media=True))


def _resampler(**options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "num_latents": 4}
    module = peers.open_flamingo().PerceiverResampler(**sizes, **options)
    for name, parameter in module.named_parameters():
        if "norm" in name:  # So that layers' norms differ.
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
    return module


@pytest.mark.parametrize("features", [3, 40])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_resampler(features: int, dtype: torch.dtype) -> None:
    """Few features are normed by each layer, of many the norms' statistics are shared."""
    module = _resampler(max_num_media=2, max_num_frames=3)
    x = torch.randn(2, 2, 3, features, 16, generator=torch.Generator().manual_seed(1))

    def call(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        return _weighted(module(x.to(module.latents.dtype)))

    report = patch_cases.check_parity(module, call, dtype)
    assert len(report.patched) == 4


def test_resampler_whose_parts_are_hooked_or_edited() -> None:
    module = _resampler()
    x = torch.randn(1, 2, 1, 40, 16)
    attn, ff = module.layers[0]
    seen = []
    attn.register_forward_hook(lambda _, args, out: seen.append((args[1].shape, out.shape)))
    ff[1].register_forward_hook(lambda _, args, out: seen.append(out.shape))
    before = module(x)
    patch(module)
    torch.testing.assert_close(module(x), before)
    assert seen[:2] == seen[2:]

    class Edited(type(attn)):  # type: ignore[misc]
        def forward(self, x, latents):
            return 2 * super().forward(x, latents)

    attn.__class__ = Edited
    report = patch(module)
    assert [entry.name for entry in report.left] == ["", "layers.0.0"]
    assert "its attentions are left" in report.left[0].reason
    torch.testing.assert_close(module(x), copy.deepcopy(module)(x))


@torch.no_grad()
def test_resampler_with_an_attention_that_is_no_longer_patched() -> None:
    module = _resampler()
    x = torch.randn(4, 2, 1, 64, 16)
    before = module(x)
    patch(module)
    unpatch(module.layers[1][0])
    torch.testing.assert_close(module(x), before)


def test_probes_draw_on_the_cpu() -> None:
    helpers = peers.open_flamingo()
    model = nn.ModuleList([_block_of(helpers), _resampler_of(helpers)])
    patch_cases.check_probes_draw_on_the_cpu(model)


def _vendored(name: str, *edits: tuple[str, str]) -> types.ModuleType:
    """OpenFlamingo's file under another name, as others have it."""
    source = inspect.getsource(peers.open_flamingo())
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module.__file__ = file
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def test_vendored_and_inherited() -> None:
    helpers = _vendored("of_vendored_helpers", ("    # blocks\n", "    # layers\n"))

    class Mine(peers.open_flamingo().MaskedCrossAttention):  # type: ignore[misc,name-defined]
        def extra(self) -> None: ...

    for module in (_attention(helpers=helpers), _attention(cls=Mine), _resampler_of(helpers)):
        report = patch(module)
        assert report.patched and not report.left, str(report)
        assert {entry.source for entry in report.patched} == {"OpenFlamingo 2.0.1"}


def _resampler_of(helpers: Any) -> nn.Module:
    return helpers.PerceiverResampler(dim=16, depth=2, dim_head=8, heads=2, num_latents=4)


def _block_of(helpers: Any) -> nn.Module:
    """Gates closed, as they start."""
    return helpers.GatedCrossAttentionBlock(dim=20, dim_visual=12, dim_head=8, heads=3)


# Of the attention; the block; the resampler and its attention.
HARMLESS = [
    ("q = q * self.scale\n\n        sim =", "q = self.scale * q\n\n        sim ="),
    ("x = self.ff(x) * self.ff_gate.tanh() + x", "x = x + self.ff_gate.tanh() * self.ff(x)"),
    ("latents = ff(latents) + latents", "latents = latents + ff(latents)"),
]
SEMANTIC = [
    (
        "torch.eq if self.only_attend_immediate_media",
        "torch.ge if self.only_attend_immediate_media",
    ),
    ("text_without_media_mask = text_time == 0", "text_without_media_mask = text_time == -1"),
    ("torch.count_nonzero(media_locations, dim=1)", "media_locations.shape[1]"),
    ("self.ff(x) * self.ff_gate.tanh() + x", "self.ff(x) * self.ff_gate + x"),
    ("latents = ff(latents) + latents", "latents = ff(latents)"),
]


def _report_of_edited(edit: tuple[str, str], number: int, **options: Any) -> PatchReport:
    helpers = _vendored(f"of_edited_{number}", edit)
    torch.manual_seed(0)
    return patch(nn.ModuleList([_block_of(helpers), _resampler_of(helpers)]), **options)


def test_edited_code_is_left_or_probed() -> None:
    for number, edit in enumerate(HARMLESS):
        report = _report_of_edited(edit, number)
        assert report.left and "none of those known" in report.left[0].reason
        report = _report_of_edited(edit, number, unknown="probe")
        assert not report.left, str(report)
        assert any("probed" in entry.source for entry in report.patched)
    for number, edit in enumerate(SEMANTIC):
        report = _report_of_edited(edit, 10 + number, unknown="probe")
        reasons = [entry.reason for entry in report.left]
        assert any("probed: " in reason for reason in reasons), f"{edit}: {report}"


def test_our_own_modules_are_no_peers() -> None:
    block = modules.GatedCrossAttentionBlock(dim=20, dim_visual=12, dim_head=8, heads=3)
    assert not patch(nn.ModuleList([block, modules.PerceiverResampler(dim=16)])).entries


def test_what_broadcasts_takes_its_own_forward() -> None:
    module = _attention()
    x, media, locations = _inputs()
    before = module(x, media[:1], locations)
    patch(module)
    with pytest.warns(PatchWarning, match="broadcast"):
        assert torch.equal(module(x, media[:1], locations), before)
    with pytest.raises(AssertionError, match=r"media_location\.shape"):
        module(x, media, locations[:, :3])


@torch.no_grad()
def test_compiled() -> None:
    """Without gradients, which take most of the time; whole models are compiled with them."""
    torch.manual_seed(0)
    block = patch_cases.open_gates(_block_of(peers.open_flamingo()))
    x, media, locations = _inputs()
    before = block(x, media, locations)
    patch(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, media, locations), before)


def test_recomputed() -> None:
    torch.manual_seed(0)
    block = patch_cases.open_gates(_block_of(peers.open_flamingo()))
    x, media, locations = _inputs()
    patch(block)
    checkpoint = torch.utils.checkpoint.checkpoint
    gradients = []
    for recompute in (False, True):
        arguments = (x.clone().requires_grad_(), media.clone().requires_grad_())
        if recompute:
            out = checkpoint(block, *arguments, locations, use_reentrant=False)
            block(*arguments, ~locations)  # Another pass over the layers before the backward.
        else:
            out = block(*arguments, locations)
        gradients.append(torch.autograd.grad(out.sum(), arguments))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_saved_and_copied() -> None:
    """A block: a whole model's classes are made where they can't be imported from."""
    x, media, locations = _inputs()
    block = patch_cases.open_gates(_block_of(_vendored("of_saved_helpers")))
    patch_cases.check_saved_and_copied(block, lambda model: _weighted(model(x, media, locations)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_model_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """By its state dict: the classes that OpenFlamingo makes of a language model's aren't pickled.

    Into a model that isn't patched, and from that one into a patched one.
    """
    patched, plain, again = (make_model(family, depth=2) for _ in range(3))
    with torch.no_grad():
        for number, model in enumerate((plain, again), start=1):
            for parameter in model.parameters():
                parameter.mul_(1 + number / 4)
    for model in (patched, again):
        assert patch(model).patched
    torch.save(patched.state_dict(), tmp_path / "patched.pt")
    plain.load_state_dict(torch.load(tmp_path / "patched.pt"))
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    again.load_state_dict(torch.load(tmp_path / "plain.pt"))
    with torch.no_grad():
        expected, _ = call_model(patched)
        for model in (plain, again):
            torch.testing.assert_close(call_model(model)[0], expected)


def test_patched_forwards_are_gone_after_unpatch() -> None:
    model = make_model()
    patch(model)
    unpatch(model)
    assert not any(is_patched(each) or "forward" in vars(each) for each in model.modules())
