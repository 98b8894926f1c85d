"""Peers' models and state dicts, and ours to load them into."""

import importlib

import torch
from torch import nn

from flamingo_fast import modules
from flamingo_fast.testing import peers

DIM, TEXT_DIM, HEADS, DIM_HEAD, LATENTS, FRAMES, MEDIA = 12, 20, 2, 4, 5, 3, 2
HEAD_OPTIONS = {"dim_head": DIM_HEAD, "heads": HEADS}

MINI_RESAMPLER = """
latents 5 12
time_pos_emb 3 1 12
layers.{i}.0.norm_media.weight 12
layers.{i}.0.norm_media.bias 12
layers.{i}.0.norm_latents.weight 12
layers.{i}.0.norm_latents.bias 12
layers.{i}.0.to_q.weight 8 12
layers.{i}.0.to_k.weight 8 12
layers.{i}.0.to_v.weight 8 12
layers.{i}.0.to_out.weight 12 8
layers.{i}.1.0.weight 12
layers.{i}.1.0.bias 12
layers.{i}.1.1.weight 48 12
layers.{i}.1.3.weight 12 48
norm.weight 12
norm.bias 12
"""
MINI_BLOCK = """
alpha_attn 1
alpha_ffw 1
attn.norm.weight 20
attn.norm.bias 20
attn.to_q.weight 8 20
attn.to_kv.weight 16 12
attn.to_out.weight 20 8
ffw.0.weight 20
ffw.0.bias 20
ffw.1.weight 80 20
ffw.3.weight 20 80
"""
OTTER_RESAMPLER = """
latents 5 12
frame_embs 3 12
layers.{i}.norm_media.weight 12
layers.{i}.norm_media.bias 12
layers.{i}.norm_latents.weight 12
layers.{i}.norm_latents.bias 12
layers.{i}.to_q.weight 8 12
layers.{i}.to_kv.weight 16 12
layers.{i}.to_out.weight 12 8
layers.{i}.feed_forward.0.weight 12
layers.{i}.feed_forward.0.bias 12
layers.{i}.feed_forward.1.weight 48 12
layers.{i}.feed_forward.3.weight 12 48
norm.weight 12
norm.bias 12
"""
OTTER_BLOCK = """
attn_gate 1
ff_gate 1
attn.norm.weight 20
attn.norm.bias 20
attn.to_q.weight 8 20
attn.to_kv.weight 16 12
attn.to_out.weight 20 8
feed_forward.0.weight 20
feed_forward.0.bias 20
feed_forward.1.weight 80 20
feed_forward.3.weight 20 80
"""
# Where each whole model below keeps its parts, and what saving that in `peer_state_dict` takes.
WHERE = {
    "open_flamingo": ("perceiver.", "lang_encoder.model.layers.{i}.gated_cross_attn_layer."),
    "flamingo_pytorch": ("perceiver_resampler.", "layers.{i}.1."),
    "flamingo_mini": ("flamingo.resampler.", "flamingo.lm.h.{i}.xattn_block."),
    "otter": ("perceiver.", "lang_encoder.transformer.blocks.{i}.gated_cross_attn_layer."),
}
DECODER_LAYERS = {
    "open_flamingo": "model.layers",
    "flamingo_mini": "h",
    "otter": "transformer.blocks",
}
BLOCK_LAYERS = {"open_flamingo": (1, 3), "flamingo_pytorch": (0, 3)}


class _Layer(nn.Module):
    def __init__(self, block, decoder_layer):
        super().__init__()
        self.gated_cross_attn_layer = block
        self.decoder_layer = decoder_layer


class OpenFlamingo(nn.Module):
    """The tree of modules that `Flamingo` and `FlamingoLMMixin.init_flamingo` make."""

    def __init__(self):
        super().__init__()
        self.vision_encoder = nn.Linear(3, DIM)
        self.perceiver = make_resampler(peers.open_flamingo(), max_num_frames=FRAMES)
        lm = self.lang_encoder = nn.Module()
        lm.model = nn.Module()
        lm.model.embed_tokens = nn.Embedding(7, TEXT_DIM)
        lm.old_decoder_blocks = nn.ModuleList(nn.Linear(TEXT_DIM, TEXT_DIM) for _ in range(4))
        lm.gated_cross_attn_layers = nn.ModuleList(
            make_block(peers.open_flamingo()) if i % 2 else None for i in range(4)
        )
        pairs = zip(lm.gated_cross_attn_layers, lm.old_decoder_blocks, strict=True)
        lm.model.layers = nn.ModuleList(_Layer(block, layer) for block, layer in pairs)


def make_resampler(classes, **options):
    return classes.PerceiverResampler(
        dim=DIM, depth=2, num_latents=LATENTS, **HEAD_OPTIONS, **options
    )


def make_block(classes, dim=TEXT_DIM, dim_visual=DIM):
    return _with_open_gates(
        classes.GatedCrossAttentionBlock(dim=dim, dim_visual=dim_visual, **HEAD_OPTIONS)
    )


def _with_open_gates(block):
    for gate in (block.attn_gate, block.ff_gate):
        nn.init.normal_(gate)
    return block


def target_classes():
    return modules


def make_state(keys, prefix):
    state = {}
    for line in keys.split("\n")[1:-1]:
        name, *shape = line.split()
        for i in (0, 1) if "{i}" in name else (0,):
            state[prefix + name.replace("{i}", str(i))] = torch.randn(*map(int, shape))
    return state


def make_palm():
    palm = importlib.import_module("flamingo_pytorch").FlamingoPaLM(
        dim=DIM,
        num_tokens=7,
        depth=4,
        cross_attn_every=3,
        img_encoder=nn.Linear(3, DIM),
        perceiver_num_latents=LATENTS,
        max_video_frames=FRAMES,
        **HEAD_OPTIONS,
    )
    for i in BLOCK_LAYERS["flamingo_pytorch"]:
        _with_open_gates(palm.layers[i][1])
    return palm


def make_model(peer):
    """A whole model's state dict."""
    if peer == "open_flamingo":
        return OpenFlamingo().state_dict()
    if peer == "flamingo_pytorch":
        return make_palm().state_dict()
    resampler, block = {
        "flamingo_mini": (MINI_RESAMPLER, MINI_BLOCK),
        "otter": (OTTER_RESAMPLER, OTTER_BLOCK),
    }[peer]
    resampler_prefix, block_prefix = WHERE[peer]
    state = make_state(resampler, resampler_prefix)
    for i in range(4):
        before = block_prefix.replace("{i}", str(i))
        layer = before.replace("xattn_block", "lm_block").replace(
            "gated_cross_attn_layer", "decoder_layer"
        )
        state |= {layer + "attn.weight": torch.randn(2)}
        if i in (1, 3):
            state |= make_state(block, before)
    return state


def of_a_part(peer, state):
    """A whole model's tensors that are the resampler's or a block's, but for second copies."""
    resampler, block = WHERE[peer]
    blocks = tuple(block.replace("{i}", str(i)) for i in BLOCK_LAYERS.get(peer, (1, 3)))
    return {key: tensor for key, tensor in state.items() if key.startswith((resampler, *blocks))}


def assert_same_tensors(got, want):
    assert sorted(got) == sorted(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key


def make_targets(checkpoint, dtype=None):
    """New modules of the shapes of a checkpoint."""
    classes = target_classes()
    embeddings = {
        option: len(checkpoint.resampler[key])
        for option, key in (("max_num_frames", "frame_embs"), ("max_num_media", "media_time_embs"))
        if key in checkpoint.resampler
    }
    blocks = {
        i: make_block(classes, len(block["attn.norm.weight"]), block["attn.to_kv.weight"].shape[1])
        for i, block in checkpoint.blocks.items()
    }
    resampler = make_resampler(classes, **embeddings)
    return resampler.to(dtype), {i: block.to(dtype) for i, block in blocks.items()}


def resampled_by(state, media, feed_forward, attention):
    """A resampler's output by the state dict of flamingo-mini or Otter: (B, T, F, v, D)."""
    layer_norm = lambda x, name: nn.functional.layer_norm(
        x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
    )
    heads = lambda x: x.unflatten(-1, (HEADS, DIM_HEAD)).transpose(-2, -3)
    if "time_pos_emb" in state:
        media = media + state["time_pos_emb"][: media.shape[2]]
    else:
        media = media + state["frame_embs"][: media.shape[2], None]
    media = media.flatten(2, 3)
    latents = state["latents"].expand(*media.shape[:2], -1, -1)
    for i in range(2):
        attn, ff = attention.format(i), feed_forward.format(i)
        x = layer_norm(latents, f"{attn}.norm_latents")
        keys = torch.cat((layer_norm(media, f"{attn}.norm_media"), x), -2)
        if f"{attn}.to_kv.weight" in state:
            k, v = (keys @ state[f"{attn}.to_kv.weight"].T).chunk(2, -1)
        else:
            k, v = (keys @ state[f"{attn}.to_{name}.weight"].T for name in "kv")
        q = x @ state[f"{attn}.to_q.weight"].T
        out = nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        out = out.transpose(-2, -3).flatten(-2)
        latents = latents + out @ state[f"{attn}.to_out.weight"].T
        x = layer_norm(latents, f"{ff}.0") @ state[f"{ff}.1.weight"].T
        latents = latents + nn.functional.gelu(x) @ state[f"{ff}.3.weight"].T
    return layer_norm(latents, "norm")
