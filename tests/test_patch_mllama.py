"""Mllama of transformers, patched: its outputs and quirks, without the dense mask of all tiles."""

import contextlib
import copy
import inspect

import patch_cases
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import flamingo_fast
from flamingo_fast.patching import PatchWarning, mllama
from flamingo_fast.patching.state import is_patched
from flamingo_fast.testing import peers

transformers = pytest.importorskip("transformers")

IMAGE, VOCAB, TILES, IMAGE_SIZE = 3, 48, 4, 28
# First image late, consecutive images, one with all tiles; an image alone; text alone.
ROWS = (
    ([1, 9, 10, IMAGE, 12, 13, IMAGE, IMAGE, 14, 15, 16], [2, 1, 4]),
    ([1, 20, IMAGE, 21, 22, 23, 24, 25], [3]),
    ([1, 30, 31, 32, 33, 34], []),
)
IS_5 = int(transformers.__version__.partition(".")[0]) >= 5
CACHE = "cache" if IS_5 else "past_key_values"


def make(
    attention: str = "sdpa", image_size: int = IMAGE_SIZE, seed: int = 0, **text: object
) -> nn.Module:
    """Five tokens a tile, cross-attention in two of four layers, two query heads a key head."""
    of_text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "cross_attention_layers": [1, 3],
        "rope_scaling": {"rope_type": "default"},
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    of_vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
        "intermediate_size": 24,
        "vision_output_dim": 32,
        "image_size": image_size,
        "patch_size": 14,
        "max_num_tiles": TILES,
        "intermediate_layers_indices": [0],
    }
    config = transformers.MllamaConfig(
        text_config=of_text | text, vision_config=of_vision, image_token_index=IMAGE
    )
    torch.manual_seed(seed)
    model = transformers.MllamaForConditionalGeneration(config)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return patch_cases.open_gates(model).eval()


def inputs(rows: tuple = ROWS, seed: int = 0, pad_left: bool = True) -> dict[str, torch.Tensor]:
    """Of texts with images, as the processor makes them."""
    generator = torch.Generator().manual_seed(seed)
    length, images = max(len(ids) for ids, _ in rows), max(len(tiles) for _, tiles in rows)
    num_tiles = torch.tensor([tiles + [0] * (images - len(tiles)) for _, tiles in rows])
    mask = torch.zeros(len(rows), length, images, TILES, dtype=torch.int64)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (text, tiles) in enumerate(rows):
        begin = length - len(text) if pad_left else 0
        of_text = slice(begin, begin + len(text))
        ids[row, of_text] = torch.tensor(text)
        if tiles:
            of_row = peers.mllama_cross_attention_mask([text], IMAGE, [tiles], TILES)[0]
            mask[row, of_text, : len(tiles)] = of_row
    there = torch.arange(TILES) < num_tiles.clamp(min=1)[..., None]
    pixels = torch.randn(len(rows), images, TILES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels * there[..., None, None, None],
        # The first of the supported aspect ratios are one tile high.
        "aspect_ratio_ids": num_tiles,
        "aspect_ratio_mask": there.long(),
        "cross_attention_mask": mask,
    }


def call_with(given: dict[str, torch.Tensor], **more: object) -> patch_cases.Call:
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(**given, **more, labels=labels)
        return out.logits, out.loss

    return call


@contextlib.contextmanager
def _metas_semantics(model: nn.Module):
    """Tokens that attend to nothing leave cross-attention layers as they came."""

    def restore(_: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> torch.Tensor:
        rows = kwargs["full_text_row_masked_out_mask"][:, 0]
        return torch.where(rows != 0, out, args[0])

    text = model.model.language_model
    hooks = [
        text.layers[index].register_forward_hook(restore, with_kwargs=True)
        for index in text.cross_attention_layers
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attention", "training"), [("sdpa", True), ("eager", False)])
def test_parity(attention: str, training: bool, dtype: torch.dtype) -> None:
    model = make(attention).train(training)
    # Rows of padding on the left attend to nothing, and eager attention to nothing is noise.
    call = call_with(inputs(pad_left=attention != "eager"))
    report = patch_cases.check_parity(model, call, dtype)
    assert not report.left, str(report)
    assert {entry.rule for entry in report.patched} == {rule.name for rule in mllama.RULES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_of_middle_size(dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 1}
    # Sums over the width stay near 1.
    model = make(**sizes, initializer_range=0.06)
    assert not patch_cases.check_parity(model, call_with(inputs()), dtype).left


def test_parity_under_autocast() -> None:
    model, plain = make().train(), call_with(inputs())
    oracle = patch_cases.outcomes(copy.deepcopy(model).double(), plain)

    def outcomes() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return patch_cases.outcomes(model, plain)

    before = outcomes()
    flamingo_fast.patch(model)
    patch_cases.check_close(outcomes(), before, oracle)


@pytest.mark.parametrize("feature", ["cross_attention", "gated_residual", "norm"])
def test_parity_without_a_feature(feature: str) -> None:
    report = patch_cases.check_parity(make(), call_with(inputs()), **{feature: False})
    is_left = {entry.rule for entry in report.left}
    assert (
        is_left
        == {
            "cross_attention": {"mllama.cross_attention", "mllama.text_model", "mllama.model"},
            "gated_residual": {"mllama.vision_layer"},
            "norm": {"mllama.rms_norm"},
        }[feature]
    )


def test_parity_with_gradient_checkpointing() -> None:
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patch_cases.check_parity(model, call_with(inputs(), use_cache=False))


@pytest.mark.parametrize("tokens", [11, 1])
def test_any_mask_of_tiles(tokens: int) -> None:
    """Some tiles of an image and not others, tiles that nothing attends to, and none at all."""
    generator = torch.Generator().manual_seed(2)
    given = inputs()
    given["cross_attention_mask"] = torch.randint(0, 2, (3, 11, 3, TILES), generator=generator)
    given["cross_attention_mask"][0, :, 1] = 0
    given["cross_attention_mask"][1, ::2] = 0
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        given[name] = given[name][:, -tokens:]

    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(**given).logits
        return logits, logits.square().mean()

    patch_cases.check_parity(make(), call)


def test_without_mask_attends_to_all_images_as_eager() -> None:
    given = inputs(ROWS[:1])
    del given["cross_attention_mask"]
    plain = call_with(given)

    def call_by(attention: str) -> patch_cases.Call:
        def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
            model.set_attn_implementation(attention)
            return plain(model)

        return call

    report = patch_cases.check_parity(make(), call_by("sdpa"), same_call=call_by("eager"))
    assert any("#48172" in note for note in report.notes())


def test_text_alone() -> None:
    given = inputs()
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    patch_cases.check_parity(make(), call_with(text))


def test_zero_block_is_metas() -> None:
    plain = call_with(inputs())

    def metas(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with _metas_semantics(model):
            return plain(model)

    report = patch_cases.check_parity(make(), plain, same_call=metas, unattended="zero_block")
    assert not any("unattended" in note for note in report.notes())
    assert any("unattended" in note for note in flamingo_fast.patch(make()).notes())


def test_zero_block_leaves_tokens_bit_for_bit() -> None:
    model, seen = make(), []
    flamingo_fast.patch(model, unattended="zero_block")
    for index in (1, 3):
        model.model.language_model.layers[index].register_forward_hook(
            lambda _, args, out: seen.append((args[0], out))
        )
    given = inputs()
    attends = given["cross_attention_mask"].flatten(2).any(2)
    for kept in (slice(None), slice(0, 1)):
        short = {name: given[name] for name in given}
        for name in ("input_ids", "attention_mask", "cross_attention_mask"):
            short[name] = given[name][:, kept]
        model(**short)
        for before, after in seen:
            same = (before == after).all(2)
            assert torch.equal(same, ~attends[:, kept])
        seen.clear()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        pytest.param(
            {"cache_implementation": "static", "disable_compile": True},
            marks=pytest.mark.skipif(not IS_5, reason="4.57 has none for images"),
        ),
        {"use_cache": False},
    ],
)
def test_generates_the_same(how: dict) -> None:
    given = inputs()

    def generate(model: nn.Module) -> torch.Tensor:
        return model.generate(**given, max_new_tokens=8, do_sample=False, **how)[:, 11:]

    for seed in range(2):
        patch_cases.check_generation(make(seed=seed), generate)


def test_generates_metas() -> None:
    given, model = inputs(), make()
    with _metas_semantics(model):
        before = model.generate(**given, max_new_tokens=8, do_sample=False)
    flamingo_fast.patch(model, unattended="zero_block")
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_image_in_mid_generation(dtype: torch.dtype) -> None:
    """Its keys come after those in the cache, and the mask becomes wider."""
    first = inputs((([1, 9, IMAGE, 12, 13], [2]), ([1, 8, 10, IMAGE, 11], [4])))
    second = inputs((([14, IMAGE, 15], [3]), ([IMAGE, 16, 17], [1])), seed=1)
    old, new = first["cross_attention_mask"], second["cross_attention_mask"]
    # What was there stays in sight before the new one.
    seen = old[:, -1:] * (new.flatten(2).sum(2) == 0)[..., None, None]
    wide = torch.cat([seen, new], 2)

    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        logits = []
        steps = [
            first,
            {"input_ids": torch.tensor([[7], [6]]), "cross_attention_mask": old[:, -1:]},
            second | {"cross_attention_mask": wide},
            {"input_ids": torch.tensor([[5], [4]]), "cross_attention_mask": wide[:, -1:]},
        ]
        for step in steps:
            step = {name: each for name, each in step.items() if name != "attention_mask"}
            logits.append(model(**step, **{CACHE: cache}).logits)
        logits = torch.cat(logits, 1)
        return logits, logits.float().square().mean()

    patch_cases.check_parity(make(), call, dtype)


def test_cached_text_in_pieces_with_the_whole_mask() -> None:
    given, model = inputs(), make()
    whole = model(**given).logits

    def in_pieces() -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        logits = []
        for begin, end in ((0, 5), (5, 6), (6, 11)):
            now = {name: each for name, each in given.items() if begin == 0 or name[:3] != "pix"}
            now["input_ids"] = given["input_ids"][:, begin:end]
            now["attention_mask"] = given["attention_mask"][:, :end]
            if not IS_5:
                now["cache_position"] = torch.arange(begin, end)
            logits.append(model(**now, **{CACHE: cache}).logits)
        return torch.cat(logits, 1)

    before = in_pieces()
    flamingo_fast.patch(model)
    is_text = given["attention_mask"].bool()
    for logits in (in_pieces(), model(**given).logits):
        torch.testing.assert_close(logits[is_text], before[is_text], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[is_text], whole[is_text], rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions() -> None:
    given, model = inputs(), make("eager")
    before = model(**given, output_hidden_states=True, output_attentions=True)
    flamingo_fast.patch(model)
    with pytest.warns(PatchWarning, match="output_attentions"):
        after = model(**given, output_attentions=True)
    assert len(after.attentions) == 4
    torch.testing.assert_close(after.attentions, before.attentions)
    after = model(**given, output_hidden_states=True)
    torch.testing.assert_close(after.hidden_states, before.hidden_states, rtol=1e-4, atol=1e-4)


def test_attention_dropout_is_the_peers() -> None:
    given, model = inputs(), make(dropout=0.5).train()

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        return model(**given).logits

    before = logits()
    report = flamingo_fast.patch(model, norm=False, gated_residual=False)
    assert torch.equal(logits(), before)
    assert any("dropout" in note for note in report.notes())
    # Of a part that is in training mode alone as well.
    model.eval().model.language_model.layers[3].train()
    ours = logits()
    flamingo_fast.unpatch(model)
    assert torch.equal(logits(), ours)


def test_saved_and_copied() -> None:
    patch_cases.check_saved_and_copied(make(), call_with(inputs()))


def test_text_model_alone_with_a_dense_mask() -> None:
    given, model = inputs(), make()
    states = torch.randn(9 * TILES, 5, 32)
    rows = given["cross_attention_mask"].flatten(2).any(2)[:, None, :, None].float()
    dense = peers.mllama_attention_bias(given["cross_attention_mask"], 5)
    text = model.model.language_model

    def hidden() -> torch.Tensor:
        return text(
            input_ids=given["input_ids"],
            cross_attention_states=states,
            cross_attention_mask=dense,
            full_text_row_masked_out_mask=rows,
        ).last_hidden_state

    before = hidden()
    flamingo_fast.patch(model)
    torch.testing.assert_close(hidden(), before, rtol=1e-4, atol=1e-4)
    flamingo_fast.patch(model, unattended="zero_block")
    ours = hidden()
    flamingo_fast.unpatch(model)
    with _metas_semantics(model):
        torch.testing.assert_close(ours, hidden(), rtol=1e-4, atol=1e-4)


class _EditedAttention(transformers.models.mllama.modeling_mllama.MllamaTextCrossAttention):
    def forward(self, hidden_states, **kwargs):  # type: ignore[override]
        # As they are, gated and added to what they are the norm of, they would cancel it.
        return hidden_states.flip(-1), None


def test_attention_of_other_code_keeps_the_dense_mask() -> None:
    model = make()
    model.model.language_model.layers[3].cross_attn.__class__ = _EditedAttention
    report = flamingo_fast.patch(model)
    left = {entry.rule: entry.reason for entry in report.left}
    assert "none of those known" in left["mllama.cross_attention"]
    assert left.keys() >= {"mllama.cross_layer", "mllama.text_model", "mllama.model"}
    flamingo_fast.unpatch(model)
    patch_cases.check_parity(model, call_with(inputs()))


@pytest.mark.parametrize("part", ["language_model", "language_model.layers.3.cross_attn"])
def test_parts_that_were_unpatched_have_their_mask(part: str) -> None:
    given, model = inputs(), make()
    before = model(**given).logits
    flamingo_fast.patch(model)
    flamingo_fast.unpatch(model.model.get_submodule(part))
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-4, atol=1e-4)
    assert is_patched(model.model)


def test_mask_of_another_size() -> None:
    given, model = inputs(), make()
    flamingo_fast.patch(model)
    given["cross_attention_mask"] = given["cross_attention_mask"][:, :, :2]
    with pytest.raises(ValueError, match="8 tiles of 5 tokens, but there are 60 tokens of images"):
        model(**given)


def test_what_layers_are_given_is_a_pytree() -> None:
    model, seen = make(), []
    flamingo_fast.patch(model)
    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["cross_attention_mask"]), with_kwargs=True
    )
    model(**inputs())
    twin = tree_map(lambda each: each.clone() if isinstance(each, torch.Tensor) else each, seen[0])
    assert twin.layout == seen[0].layout and copy.deepcopy(twin).num_tiles == 12
    assert (
        max(each.numel() for each in tree_leaves(twin) if isinstance(each, torch.Tensor))
        < 3 * 11 * 12
    )


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.untyped_storage().nbytes() // each.itemsize)
        return out


@torch.no_grad()
def test_prefill_makes_no_dense_mask() -> None:
    """4096 tokens over an image of 4 tiles of 1601."""
    model = make(image_size=560, num_hidden_layers=2, cross_attention_layers=[1])
    ids = torch.full((1, 4096), 9)
    ids[0, 100] = IMAGE
    mask = torch.zeros(1, 4096, 1, TILES, dtype=torch.int64)
    mask[:, 100:] = 1
    states = torch.randn(TILES, 1601, 32)
    largest, logits = [], []
    for patched in (False, True):
        if patched:
            flamingo_fast.patch(model)
        with _Largest() as found:
            out = model(
                input_ids=ids,
                cross_attention_states=states,
                cross_attention_mask=mask,
                logits_to_keep=64,
            )
        largest.append(found.numel)
        logits.append(out.logits)
    dense = 4096 * TILES * 1601
    # Self-attention has a mask of 4096 x 4096 of its own.
    assert largest[0] >= dense > 4096 * 4096 >= largest[1]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def test_takes_the_arguments_of_its_own_forward() -> None:
    """In the order of both versions."""
    own = list(inspect.signature(type(make().model).forward).parameters)
    ours = list(inspect.signature(mllama.model_forward).parameters)
    assert own[:7] == ours[:7]
