"""Peers' state dicts to ours and back: OpenFlamingo's and flamingo-pytorch's from their own code,
flamingo-mini's and Otter's from their lists of keys."""

import pytest
import torch
from checkpoint_cases import (
    DECODER_LAYERS,
    DIM,
    FRAMES,
    MEDIA,
    MINI_BLOCK,
    MINI_RESAMPLER,
    OTTER_BLOCK,
    OTTER_RESAMPLER,
    TEXT_DIM,
    WHERE,
    OpenFlamingo,
    assert_same_tensors,
    make_block,
    make_model,
    make_palm,
    make_resampler,
    make_state,
    make_targets,
    of_a_part,
    resampled_by,
    target_classes,
)
from torch import nn

from flamingo_fast.modules import checkpoints, peer_layouts
from flamingo_fast.modules.checkpoints import (
    PEERS,
    canonical_state_dict,
    load_peer_state_dict,
    peer_state_dict,
)
from flamingo_fast.testing import peers


@pytest.mark.parametrize("peer", PEERS)
def test_round_trip_of_a_whole_model(peer):
    state = make_model(peer)
    checkpoint = canonical_state_dict(state)
    assert checkpoint.peer == peer
    resampler, blocks = make_targets(checkpoint)
    report = load_peer_state_dict(state, resampler=resampler, blocks=blocks)
    assert not report.missing and not report.unexpected
    back = peer_state_dict(
        peer, resampler=resampler, blocks=blocks, decoder_layers=DECODER_LAYERS.get(peer)
    )
    assert_same_tensors(back, of_a_part(peer, state))
    kept = {*back, *checkpoint.other, *checkpoint.duplicates}
    assert kept == set(state)
    without_modules = peer_state_dict(
        peer,
        resampler=checkpoint.resampler,
        blocks=checkpoint.blocks,
        decoder_layers=DECODER_LAYERS.get(peer),
    )
    assert_same_tensors(without_modules, back)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("part", ["resampler", "block"])
def test_round_trip_of_a_part_alone(peer, part):
    prefix = WHERE[peer][part == "block"].replace("{i}", "3")
    state = {
        key.removeprefix(prefix): tensor
        for key, tensor in make_model(peer).items()
        if key.startswith(prefix)
    }
    checkpoint = canonical_state_dict(state)
    alike = peer == "flamingo_pytorch" and part == "block"
    assert checkpoint.peer == ("open_flamingo" if alike else peer)
    assert bool(checkpoint.resampler) == (part == "resampler")
    assert list(checkpoint.blocks) == ([0] if part == "block" else [])
    assert not checkpoint.other and not checkpoint.duplicates
    back = peer_state_dict(
        peer,
        resampler=checkpoint.resampler or None,
        blocks=checkpoint.blocks,
        resampler_prefix="",
        block_prefix="",
    )
    assert_same_tensors(back, state)
    assert_same_tensors(
        canonical_state_dict({f"module.{k}": t for k, t in state.items()}, peer).other, {}
    )


def test_open_flamingo_computes_the_same():
    model = OpenFlamingo()
    checkpoint = canonical_state_dict(model.state_dict())
    resampler, blocks = make_targets(checkpoint)
    load_peer_state_dict(model.state_dict(), resampler=resampler, blocks=list(blocks.values()))
    vision = torch.randn(2, MEDIA, FRAMES, 6, DIM)
    media = model.perceiver(vision)
    torch.testing.assert_close(resampler(vision), media)
    text = torch.randn(2, 4, TEXT_DIM)
    places = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    for i, block in blocks.items():
        theirs = model.lang_encoder.gated_cross_attn_layers[i]
        torch.testing.assert_close(block(text, media, places), theirs(text, media, places))


def test_flamingo_pytorch_computes_the_same():
    palm = make_palm()
    state = palm.state_dict()
    checkpoint = canonical_state_dict(state)
    resampler, blocks = make_targets(checkpoint)
    load_peer_state_dict(state, resampler=resampler, blocks=blocks)
    vision = torch.randn(2, MEDIA, 6, DIM)
    media = palm.perceiver_resampler(vision)
    torch.testing.assert_close(resampler(vision.unsqueeze(2)), media)
    text = torch.randn(2, 4, DIM)
    places = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    for i in (0, 3):
        theirs = palm.layers[i][1]
        torch.testing.assert_close(blocks[i](text, media, places), theirs(text, media, places))
    assert "video_frame_pos_emb" in checkpoint.other


@pytest.mark.parametrize(
    ("keys", "attention", "feed_forward"),
    [
        (MINI_RESAMPLER, "layers.{}.0", "layers.{}.1"),
        (OTTER_RESAMPLER, "layers.{}", "layers.{}.feed_forward"),
    ],
    ids=["flamingo_mini", "otter"],
)
def test_resamplers_compute_the_same(keys, attention, feed_forward):
    state = make_state(keys, "")
    resampler, _ = make_targets(canonical_state_dict(state))
    load_peer_state_dict(state, resampler=resampler)
    vision = torch.randn(2, MEDIA, FRAMES - 1, 6, DIM)
    expected = resampled_by(state, vision, feed_forward, attention)
    torch.testing.assert_close(resampler(vision), expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_flamingo_mini_and_otter_have_the_names_of_open_flamingo():
    ours = make_block(peers.open_flamingo()).state_dict()
    for keys in (MINI_BLOCK, OTTER_BLOCK):
        state = make_state(keys, "")
        block = canonical_state_dict(state).blocks[0]
        assert {key: tensor.shape for key, tensor in block.items()} == {
            key: tensor.shape for key, tensor in ours.items()
        }
    gates = canonical_state_dict(state := make_state(MINI_BLOCK, "")).blocks[0]
    assert torch.equal(gates["attn_gate"], state["alpha_attn"])
    assert torch.equal(gates["ff_gate"], state["alpha_ffw"])


def test_open_flamingo_lists_its_copies():
    state = OpenFlamingo().state_dict()
    checkpoint = canonical_state_dict(state)
    copies = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    assert set(checkpoint.duplicates) == {key for key in state if key.startswith(copies)}
    assert set(checkpoint.other) == {
        *("vision_encoder.weight", "vision_encoder.bias", "lang_encoder.model.embed_tokens.weight"),
        *(
            f"lang_encoder.model.layers.{i}.decoder_layer.{name}"
            for i in range(4)
            for name in ("weight", "bias")
        ),
    }


def test_checkpoint_of_open_flamingo_in_training():
    state = OpenFlamingo().state_dict()
    # As its filter_state_dict_to_trainable and DistributedDataParallel leave them.
    dropped = ("old_decoder_blocks", "gated_cross_attn_layers", "vision_encoder", "decoder_layer")
    partial = {
        f"module.{key}": tensor
        for key, tensor in state.items()
        if not any(word in key for word in dropped)
    }
    saved = {"epoch": 3, "model_state_dict": partial, "optimizer_state_dict": {}}
    checkpoint, whole = canonical_state_dict(saved), canonical_state_dict(state)
    assert checkpoint.peer == "open_flamingo" and not checkpoint.duplicates
    assert list(checkpoint.other) == ["module.lang_encoder.model.embed_tokens.weight"]
    assert_same_tensors(checkpoint.resampler, whole.resampler)
    assert list(checkpoint.blocks) == [1, 3]
    for i in (1, 3):
        assert_same_tensors(checkpoint.blocks[i], whole.blocks[i])


def test_names_of_the_branch_mllm():
    state = {
        key.replace("lang_encoder.", "lang_model.").replace("perceiver.", "vision_tokenizer."): x
        for key, x in OpenFlamingo().state_dict().items()
    }
    checkpoint = canonical_state_dict(state)
    resampler, blocks = make_targets(checkpoint)
    report = load_peer_state_dict(state, resampler=resampler, blocks=blocks)
    assert report.peer == "open_flamingo" and len(report.duplicates) == 30
    back = peer_state_dict(
        "open_flamingo",
        resampler=resampler,
        blocks=blocks,
        resampler_prefix="vision_tokenizer.",
        block_prefix="lang_model.model.layers.{i}.gated_cross_attn_layer.",
    )
    assert_same_tensors(back, {key: state[key] for key in back})
    state["vision_tokenizer.projection.weight"] = torch.zeros(4, DIM)
    with pytest.raises(ValueError, match="unexpected: resampler.projection.weight"):
        load_peer_state_dict(state, resampler=resampler)


def test_blocks_from_the_list_of_open_flamingo_alone():
    copies = "lang_encoder.gated_cross_attn_layers."
    state = {k: x for k, x in OpenFlamingo().state_dict().items() if k.startswith(copies)}
    checkpoint = canonical_state_dict(state)
    assert list(checkpoint.blocks) == [1, 3] and not checkpoint.duplicates
    assert len(checkpoint.blocks[1]) == 11


def test_marks_of_wrappers_anywhere_in_a_name():
    state = OpenFlamingo().state_dict()
    marked = {
        f"_orig_mod.{key}".replace("layers.1.", "layers.1._checkpoint_wrapped_module."): tensor
        for key, tensor in state.items()
    }
    checkpoint, expected = canonical_state_dict(marked), canonical_state_dict(state)
    assert_same_tensors(checkpoint.blocks[1], expected.blocks[1])
    assert_same_tensors(checkpoint.resampler, expected.resampler)
    assert all(key in marked for key in (*checkpoint.other, *checkpoint.duplicates))


@pytest.mark.parametrize(
    "copy",
    [
        "lang_encoder.gated_cross_attn_layers.1.attn.to_q.weight",
        "lang_encoder.old_decoder_blocks.2.bias",
        "module.perceiver.latents",
    ],
)
def test_copies_that_differ(copy):
    state = OpenFlamingo().state_dict()
    first = state.get(copy, state["perceiver.latents"])
    state[copy] = first.clone()
    assert copy in canonical_state_dict(state).duplicates
    state[copy].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=f"{copy} and .* differ"):
        canonical_state_dict(state)
    first.view(-1)[0] = torch.nan
    assert copy in canonical_state_dict(state).duplicates


def test_a_norm_on_top_of_a_language_model_is_no_resampler():
    with pytest.raises(ValueError, match=r"state_dict: no resampler or block .* 2 keys"):
        canonical_state_dict({"norm.weight": torch.ones(2), "layers.0.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("state", "peer", "error", "message"),
    [
        ([], None, TypeError, "state_dict: expected a mapping, got list"),
        (
            {"model_state_dict": 1},
            None,
            TypeError,
            "expected a mapping as model_state_dict, got int",
        ),
        ({"latents": 1}, None, TypeError, "expected tensors, got int for 'latents'"),
        ({0: torch.ones(1)}, None, TypeError, "expected names of tensors, got 0"),
        ({}, None, ValueError, "no resampler or block"),
        ({"latents": torch.ones(1)}, "otters", ValueError, "peer: expected one of .* 'otters'"),
        ({"embed": torch.ones(1)}, "otter", ValueError, r"of otter in 1 keys \(embed\)"),
        (
            {"attn_gate": torch.ones(1), "alpha_attn": torch.ones(1)},
            "flamingo_mini",
            ValueError,
            "peer: flamingo_mini has no attn_gate",
        ),
        (
            {"0.xattn_block.alpha_attn": torch.ones(1), "perceiver.norm.bias": torch.ones(1)},
            None,
            ValueError,
            r"several peers, .*bias \(open_flamingo, otter\), .*alpha_attn \(flamingo_mini\); say",
        ),
        (
            {"time_pos_emb": torch.ones(3, 2, DIM)},
            None,
            ValueError,
            r"time_pos_emb of shape \(3, 2, 12\), not",
        ),
    ],
)
def test_what_is_no_checkpoint(state, peer, error, message):
    with pytest.raises(error, match=message):
        canonical_state_dict(state, peer)


def test_keys_of_open_flamingo_are_not_read_as_those_of_otter():
    with pytest.raises(ValueError, match="peer: otter has no layers.0.0.norm_media.weight"):
        canonical_state_dict(OpenFlamingo().state_dict(), "otter")


def test_strict_reports_and_copies_nothing():
    state = make_model("flamingo_mini")
    resampler, blocks = make_targets(canonical_state_dict(state))
    before = {key: tensor.clone() for key, tensor in resampler.state_dict().items()}
    del state["flamingo.resampler.layers.1.0.to_v.weight"]
    del state["flamingo.lm.h.3.xattn_block.alpha_ffw"]
    state["flamingo.lm.h.1.xattn_block.extra"] = torch.ones(1)
    with pytest.raises(ValueError, match="nothing was copied\n") as error:
        load_peer_state_dict(state, resampler=resampler, blocks=blocks)
    assert_same_tensors(resampler.state_dict(), before)
    report = load_peer_state_dict(state, resampler=resampler, blocks=blocks, strict=False)
    assert report.missing == ("resampler.layers.1.0.to_kv.weight", "blocks.3.ff_gate")
    assert report.unexpected == ("resampler.layers.1.0.to_k.weight", "blocks.1.extra")
    assert len(report.other) == 4
    assert str(report) in str(error.value)
    assert str(report) == (
        "state dict of flamingo_mini: 2 missing, 2 unexpected; 0 copies dropped, "
        "4 other tensors left alone\n"
        "  missing: resampler.layers.1.0.to_kv.weight\n"
        "  missing: blocks.3.ff_gate\n"
        "  unexpected: resampler.layers.1.0.to_k.weight\n"
        "  unexpected: blocks.1.extra"
    )
    loaded = resampler.state_dict()
    assert torch.equal(loaded["latents"], state["flamingo.resampler.latents"])
    key = "layers.1.0.to_kv.weight"
    assert torch.equal(loaded[key], before[key])


def test_a_block_of_another_layer_is_missing():
    state = make_model("otter")
    _, blocks = make_targets(canonical_state_dict(state))
    with pytest.raises(ValueError, match="missing: blocks.2.attn_gate(.|\n)*unexpected: blocks.3"):
        load_peer_state_dict(state, blocks={1: blocks[1], 2: blocks[3]})


def test_a_sequence_of_blocks_is_in_the_order_of_the_layers():
    layers = (2, 10, 11)
    state = {}
    for i in layers:
        state |= make_state(OTTER_BLOCK, f"lang_encoder.layers.{i}.gated_cross_attn_layer.")
    # As safetensors orders it: 10, 11, 2.
    state = dict(sorted(state.items()))
    blocks = [make_block(target_classes()) for _ in layers]
    load_peer_state_dict(state, blocks=blocks)
    for i, block in zip(layers, blocks, strict=True):
        gate = state[f"lang_encoder.layers.{i}.gated_cross_attn_layer.attn_gate"]
        assert torch.equal(block.attn_gate, gate)


@pytest.mark.parametrize("strict", [False, True])
def test_shapes_are_checked_before_anything_is_copied(strict):
    state = make_model("otter")
    resampler, blocks = make_targets(canonical_state_dict(state))
    blocks[3].attn_gate = nn.Parameter(torch.zeros(TEXT_DIM))
    before = resampler.latents.clone()
    with pytest.raises(ValueError, match=r"blocks.3.attn_gate: .* \(20,\), got \(1,\)"):
        load_peer_state_dict(state, resampler=resampler, blocks=blocks, strict=strict)
    assert torch.equal(resampler.latents, before)


def test_modules_keep_their_dtype_and_parts_not_asked_for_are_left():
    state = make_model("open_flamingo")
    checkpoint = canonical_state_dict(state)
    resampler, blocks = make_targets(checkpoint, torch.bfloat16)
    latents = resampler.latents
    report = load_peer_state_dict(state, resampler=resampler)
    assert resampler.latents is latents
    assert torch.equal(latents, state["perceiver.latents"].bfloat16())
    assert "blocks.3.attn_gate" in report.other
    report = load_peer_state_dict(state, blocks=nn.ModuleList(blocks.values()))
    assert torch.equal(blocks[3].attn_gate, checkpoint.blocks[3]["attn_gate"].bfloat16())
    assert "resampler.latents" in report.other


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "resampler, blocks: expected modules to load into"),
        ({"blocks": [nn.Linear(1, 1)]}, ValueError, r"blocks: 1 modules.* 2 blocks.* \[1, 3\]"),
        ({"blocks": {1: None}}, TypeError, "blocks.1: expected a module, got NoneType"),
        ({"resampler": {}}, TypeError, "resampler: expected a module, got dict"),
    ],
)
def test_what_can_not_be_loaded_into(options, error, message):
    with pytest.raises(error, match=message):
        load_peer_state_dict(make_model("otter"), **options)


def test_options_of_our_modules_are_read_but_in_no_peers_layout():
    names = (
        *("attn.to_q.bias", "attn.to_kv.bias", "attn.to_out.bias", "ff.1.bias", "ff.3.bias"),
        *("attn.norm_media.weight", "attn.norm_media.bias"),
    )
    block = canonical_state_dict(make_state(OTTER_BLOCK, "")).blocks[0]
    block |= {name: torch.ones(1) for name in names}
    assert canonical_state_dict(block).blocks[0].keys() == block.keys()
    for peer in PEERS:
        with pytest.raises(
            ValueError, match=f"blocks.2: {peer}'s layout has no place for {names[0]}"
        ):
            peer_state_dict(peer, blocks={2: block}, decoder_layers="h")


@pytest.mark.parametrize(
    ("peer", "change", "message"),
    [
        ("open_flamingo", {"attn_gate": 20}, r"blocks.1: .*attn_gate has shape \(1,\).* \(20,\)"),
        ("otter", {"ff_gate": 20}, r"blocks.1: .*ff_gate has shape \(1,\).* \(20,\)"),
        ("open_flamingo", {"attn.norm.bias": None}, "layout has attn.norm.bias, which is missing"),
        ("flamingo_pytorch", {}, "as wide as the text.* width 12, .* width 20"),
    ],
)
def test_blocks_that_a_layout_can_not_hold(peer, change, message):
    block = canonical_state_dict(make_state(OTTER_BLOCK, "")).blocks[0]
    block |= {key: torch.ones(size) for key, size in change.items() if size}
    block = {key: tensor for key, tensor in block.items() if change.get(key, 1)}
    with pytest.raises(ValueError, match=message):
        peer_state_dict(peer, blocks={1: block}, decoder_layers="model.layers")


@pytest.mark.parametrize(
    ("peer", "options", "message"),
    [
        ("flamingo_pytorch", {"max_num_frames": 2}, "has no place for frame_embs"),
        ("flamingo_pytorch", {}, "has media_time_embs, which is missing"),
        (
            "flamingo_mini",
            {"max_num_frames": 2, "max_num_media": 2},
            "has no place for media_time_embs",
        ),
        ("flamingo_mini", {}, "has frame_embs, which is missing"),
    ],
)
def test_resamplers_that_a_layout_can_not_hold(peer, options, message):
    with pytest.raises(ValueError, match=f"resampler: {peer}'s layout {message}"):
        peer_state_dict(peer, resampler=make_resampler(target_classes(), **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "resampler, blocks: expected modules to save"),
        ({"peer": "mllama"}, ValueError, "peer: expected one of"),
        ({"blocks": [1]}, TypeError, "blocks: expected a mapping of LM layers"),
        ({"blocks": {1: None}, "block_prefix": ""}, TypeError, "blocks.1: expected a module"),
        ({"blocks": {1: {}}}, ValueError, "decoder_layers: otter needs it"),
        ({"blocks": {1: {}, 2: {}}, "block_prefix": "x."}, ValueError, "block_prefix: no {i} in"),
    ],
)
def test_what_can_not_be_saved(options, error, message):
    with pytest.raises(error, match=message):
        peer_state_dict(**{"peer": "otter", **options})


def test_saved_tensors_share_no_memory_with_one_another():
    resampler = make_resampler(target_classes(), max_num_frames=FRAMES)
    state = peer_state_dict("flamingo_mini", resampler=resampler)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(storages) == len(state)
    ours = resampler.latents
    assert state["flamingo.resampler.latents"].data_ptr() == ours.data_ptr()


def test_from_one_peer_to_another():
    state = make_model("flamingo_mini")
    checkpoint = canonical_state_dict(state)
    saved = peer_state_dict(
        "otter",
        resampler=checkpoint.resampler,
        blocks=checkpoint.blocks,
        decoder_layers="model.layers",
    )
    assert set(saved) == {
        *make_state(OTTER_RESAMPLER, "perceiver."),
        *make_state(OTTER_BLOCK, "lang_encoder.model.layers.1.gated_cross_attn_layer."),
        *make_state(OTTER_BLOCK, "lang_encoder.model.layers.3.gated_cross_attn_layer."),
    }
    back = canonical_state_dict(saved)
    assert back.peer == "otter"
    assert_same_tensors(back.resampler, checkpoint.resampler)
    for i in (1, 3):
        assert_same_tensors(back.blocks[i], checkpoint.blocks[i])


def test_a_vision_transformers_layers_are_no_blocks_of_flamingo_pytorch():
    state = make_palm().state_dict()
    state["img_encoder.transformer.layers.5.1.net.0.weight"] = torch.ones(2)
    checkpoint = canonical_state_dict(state)
    assert list(checkpoint.blocks) == [0, 3]
    assert "img_encoder.transformer.layers.5.1.net.0.weight" in checkpoint.other


def test_the_tables_cover_the_peers_own_classes():
    assert set(peer_layouts.RESAMPLERS) == set(peer_layouts.BLOCKS) == set(PEERS)
    theirs = make_resampler(peers.open_flamingo(), max_num_frames=1, max_num_media=1).state_dict()
    templates = {checkpoints._without_number(key)[0] for key in theirs}
    assert templates == set(peer_layouts.RESAMPLER_KEYS)
    assert set(make_block(peers.open_flamingo()).state_dict()) == set(peer_layouts.BLOCK_KEYS)
