"""Resamplers against OpenFlamingo's and flamingo-pytorch's, and against loops of PyTorch's own."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from module_cases import BF16, FP32, check, inputs_of, like, randomized, results
from torch import nn

from flamingo_fast.modules import (
    MLPResampler,
    PerceiverAttention,
    PerceiverResampler,
    TransformerResampler,
)
from flamingo_fast.modules.checkpoints import load_peer_state_dict
from flamingo_fast.testing import peers
from flamingo_fast.testing.compare import compare

HEADS = {"heads": 2, "dim_head": 16}
OPTIONS = {"dim": 24, "depth": 2, "num_latents": 5, **HEADS}
EMBEDDINGS = [{}, {"max_num_frames": 4}, {"max_num_frames": 3, "max_num_media": 3}]
FEATURES = (2, 3, 3, 7, 24)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


def resampler(dtype=FP32, our_class=PerceiverResampler, **options):
    options = OPTIONS | options
    if our_class is not PerceiverResampler:
        del options["num_latents"]
    if our_class is MLPResampler:
        del options["heads"], options["dim_head"]
    return randomized(our_class(**options)).to(dtype)


@every_dtype
@pytest.mark.parametrize("peer", ["open_flamingo", "flamingo_pytorch"])
def test_perceiver_attention(peer, dtype):
    theirs = getattr(peers, peer)().PerceiverAttention(dim=24, **HEADS)
    randomized(theirs).to(dtype)
    ours = like(theirs, PerceiverAttention(dim=24, **HEADS))
    check(ours, theirs, inputs_of(dtype, x=(2, 3, 7, 24), latents=(2, 3, 5, 24)))


@every_dtype
def test_heads_that_share_keys_and_values(dtype):
    """As OpenFlamingo's, whose heads then have equal weights."""
    ours = randomized(PerceiverAttention(dim=24, heads=4, dim_head=8, kv_heads=2)).to(dtype)
    theirs = peers.open_flamingo().PerceiverAttention(dim=24, heads=4, dim_head=8).to(dtype)
    weight = ours.to_kv.weight.unflatten(0, (2, 2, 8)).repeat_interleave(2, 1)
    theirs.load_state_dict(ours.state_dict() | {"to_kv.weight": weight.flatten(0, 2)})
    inputs = inputs_of(dtype, x=(2, 3, 7, 24), latents=(2, 3, 5, 24))

    def of_shared(found):
        gradient = found["dto_kv.weight"].unflatten(0, (2, 2, 2, 8)).sum(2)
        return found | {"dto_kv.weight": gradient.flatten(0, 2)}

    found = results(ours, inputs)
    eager = of_shared(results(theirs, inputs))
    oracle = of_shared(results(theirs, inputs, dtype=torch.float64))
    for name, tensor in found.items():
        scale = 4 * oracle[name].abs().max().item() if tensor.dim() == 1 else None
        comparison = compare(name, tensor, eager[name], oracle[name], scale)
        assert dataclasses.replace(comparison, drift_ulp=0.0).ok, comparison


@pytest.mark.parametrize("outer", [(), (3,), (2, 1, 3)], ids=str)
def test_perceiver_attention_of_any_dimensions_before(outer):
    ours = randomized(PerceiverAttention(dim=24, **HEADS))
    x, latents = inputs_of(FP32, x=(*outer, 7, 24), latents=(*outer, 5, 24)).values()
    out = ours(x, latents)
    assert out.shape == latents.shape
    flat = ours(x.reshape(-1, 7, 24), latents.reshape(-1, 5, 24))
    torch.testing.assert_close(out.reshape(-1, 5, 24), flat)


@every_dtype
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("options", EMBEDDINGS, ids=str)
def test_open_flamingo(options, share, dtype):
    theirs = peers.open_flamingo().PerceiverResampler(**OPTIONS, **options)
    randomized(theirs).to(dtype)
    ours = like(theirs, PerceiverResampler(**OPTIONS, **options))
    ours.share_media_norm = share
    check(ours, theirs, inputs_of(dtype, x=FEATURES))


@every_dtype
def test_flamingo_pytorch(dtype):
    theirs = peers.flamingo_pytorch().PerceiverResampler(**OPTIONS, num_media_embeds=4)
    randomized(theirs).to(dtype)
    ours = resampler(dtype, max_num_media=4)
    load_peer_state_dict(theirs.state_dict(), resampler=ours)
    names = {"media_pos_emb": "media_time_embs"}
    check(ours, theirs, inputs_of(dtype, x=(2, 3, 7, 24)), names=names)
    check(ours, theirs, inputs_of(dtype, x=(2, 7, 24)), names=names)


def test_images():
    """(B, N, S, dim) and (B, S, dim): videos of one frame, batches of one medium."""
    ours = resampler(max_num_frames=2, max_num_media=2)
    x = torch.randn(2, 2, 7, 24)
    assert torch.equal(ours(x), ours(x[:, :, None]))
    assert torch.equal(ours(x[:, 0]), ours(x[:, :1, None]))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("batch", [0, 2])
def test_few_layers_and_no_media(depth, batch):
    ours = resampler(depth=depth)
    assert ours(torch.randn(batch, 3, 1, 7, 24)).shape == (batch, 3, 5, 24)


@every_dtype
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "heads": 4, "kv_heads": 2}, {"norm": "rms"}, {"dim_media": 20}],
    ids=str,
)
def test_media_normed_once_for_all_layers(options, dtype):
    # Smaller weights than elsewhere: of peaked softmaxes the largest error is a matter of luck.
    separate, shared = (randomized(resampler(dtype, **options), std=0.15) for _ in range(2))
    separate.share_media_norm, shared.share_media_norm = False, True
    inputs = inputs_of(dtype, x=(2, 3, 1, 7, options.get("dim_media", 24)))
    check(shared, separate, inputs)
    shared.merge_media_projections = True
    check(shared, separate, inputs)
    with torch.no_grad():
        merged, plain, oracle = (
            module(x)
            for module, x in (
                (shared, inputs["x"]),
                (separate, inputs["x"]),
                (copy.deepcopy(separate).double(), inputs["x"].double()),
            )
        )
    error, limit = ((out - oracle).abs().max() for out in (merged, plain))
    assert error <= 2 * (limit + torch.finfo(dtype).eps * oracle.abs().max())


def _norms_with(**attributes):
    def change(ours):
        for name, value in attributes.items():
            setattr(ours.layers[1][0].norm_media, name, value)

    return change


def _hooked(ours):
    ours.layers[1][0].to_kv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        (lambda ours: None, True),
        (_norms_with(weight=None, bias=None), False),
        (_norms_with(eps=0.5), False),
        (_hooked, False),
    ],
    ids=["alike", "no_bias", "eps", "hook"],
)
def test_norms_of_media_are_shared_by_layers_that_allow_it(change, is_shared, monkeypatch):
    ours = resampler()
    change(ours)
    x = torch.randn(FEATURES)
    ours.share_media_norm = False
    separate = ours(x)
    ours.share_media_norm = True
    normed = []
    with monkeypatch.context() as patch:
        patch.setattr(PerceiverAttention, "forward", _recording(normed))
        shared = ours(x)
    assert normed == [is_shared] * 2
    torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-5)


def _recording(normed):
    forward = PerceiverAttention.forward

    def record(self, *args, **kwargs):
        normed.append(kwargs["media_kv"] is not None)
        return forward(self, *args, **kwargs)

    return record


@pytest.mark.cpu
@pytest.mark.parametrize("num_media", [1, 3])
def test_few_media_are_normed_by_each_layer(num_media, monkeypatch):
    """Of fewer features than a projection has rows."""
    ours = resampler()
    normed = []
    monkeypatch.setattr(PerceiverAttention, "forward", _recording(normed))
    ours(torch.randn(1, num_media, 1, 22, 24))
    assert normed == [num_media * 22 >= 64] * 2


def _lengths():
    return torch.tensor([[21, 9, 1], [14, 20, 7]])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("our_class", [PerceiverResampler, TransformerResampler])
def test_lengths_are_as_each_medium_alone(our_class, merge):
    ours = resampler(our_class=our_class)
    x = torch.randn(FEATURES).flatten(2, 3)
    with torch.set_grad_enabled(not merge):
        ours.merge_media_projections = merge
        out = ours(x, media_seqlens=_lengths())
        for sample in range(2):
            for medium, length in enumerate(_lengths()[sample].tolist()):
                alone = ours(x[sample : sample + 1, medium : medium + 1, :length])
                got = out[sample, medium][: alone.shape[2]]
                torch.testing.assert_close(got, alone[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_nan_of_padding_goes_nowhere(merge):
    ours = resampler(max_num_frames=3)
    ours.merge_media_projections = merge
    lengths = _lengths()
    x = torch.randn(FEATURES)
    dirty = x.clone()
    dirty.flatten(2, 3)[torch.arange(21) >= lengths[..., None]] = torch.nan
    with torch.no_grad():
        clean = ours(x, media_seqlens=lengths)
        assert torch.equal(ours(dirty, media_seqlens=lengths), clean)


def test_more_frames_than_in_training():
    """Embeddings of 3 frames, linearly interpolated to 7: by loops."""
    ours = resampler(max_num_frames=3).double()
    without = resampler().double()
    without.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(1, 2, 7, 4, 24, dtype=torch.float64)
    moved = x.clone()
    for frame in range(7):
        place = frame * 2 / 6
        first = min(int(place), 1)
        share = place - first
        embedding = (1 - share) * ours.frame_embs[first] + share * ours.frame_embs[first + 1]
        moved[:, :, frame] += embedding.detach()
    torch.testing.assert_close(ours(x), without(moved))
    ours(x).sum().backward()
    assert (ours.frame_embs.grad != 0).all()


class Loops(nn.Module):
    """MLPResampler and TransformerResampler by PyTorch's modules' functions, of our parameters."""

    def __init__(self, ours, lengths=None):
        super().__init__()
        for name, parameter in ours.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in ours.named_children():
            self.add_module(name, module)
        self.lengths = lengths

    def _norm(self, norm, x):
        if norm.__class__.__name__ == "RMSNorm":
            return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def _attend(self, attn, x, length):
        q, k, v = attn.to_qkv(self._norm(attn.norm, x)).chunk(3, -1)
        heads = []
        for h in range(attn.heads):
            part = slice(h * attn.dim_head, (h + 1) * attn.dim_head)
            scores = q[:, part] @ k[:length, part].mT * attn.dim_head**-0.5
            heads.append(scores.softmax(-1) @ v[:length, part])
        return attn.to_out(torch.cat(heads, -1))

    def _feed(self, ff, x):
        hidden = ff[1](self._norm(ff[0], x))
        hidden = F.gelu(hidden) if isinstance(ff[2], nn.GELU) else hidden.relu().square()
        return ff[3](hidden)

    def forward(self, x):
        if getattr(self, "media_proj", None) is not None:
            x = self.media_proj(x)
        frames = getattr(self, "frame_embs", None)
        if frames is not None:
            x = x + frames[: x.shape[2], None]
        x = x.flatten(2, 3)
        out = []
        for sample in range(x.shape[0]):
            for medium in range(x.shape[1]):
                tokens = x[sample, medium]
                length = None if self.lengths is None else int(self.lengths[sample, medium])
                for layer in self.layers:
                    if len(layer) == 2:
                        tokens = tokens + self._attend(layer[0], tokens, length)
                        layer = layer[1]
                    tokens = tokens + self._feed(layer, tokens)
                out.append(self._norm(self.norm, tokens))
        return torch.stack(out).unflatten(0, x.shape[:2])


@every_dtype
@pytest.mark.parametrize("our_class", [MLPResampler, TransformerResampler])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "activation": "squared_relu", "bias": True},
        {"dim_media": 20, "max_num_frames": 3},
    ],
    ids=str,
)
def test_other_resamplers_by_loops(options, our_class, dtype):
    ours = resampler(dtype, our_class, **options)
    x = inputs_of(dtype, x=(2, 2, 3, 3, options.get("dim_media", 24)))
    check(ours, Loops(ours), x)


def test_lengths_of_the_transformer_by_loops():
    ours = resampler(our_class=TransformerResampler)
    lengths = torch.tensor([[9, 4], [1, 8]])
    valid = (torch.arange(9) < lengths[..., None])[..., None]

    def call(module, x):
        arguments = {} if isinstance(module, Loops) else {"media_seqlens": lengths}
        return module(x, **arguments) * valid

    check(ours, Loops(ours, lengths), inputs_of(FP32, x=(2, 2, 3, 3, 24)), call)


@pytest.mark.parametrize("our_class", [PerceiverResampler, MLPResampler, TransformerResampler])
def test_kernels(our_class, guarded):
    plain = resampler(our_class=our_class, norm="rms", activation="squared_relu")
    by_kernels = resampler(
        our_class=our_class, norm="rms", activation="squared_relu", impl="triton"
    )
    inputs = inputs_of(FP32, x=(1, 2, 7, 24))
    found = results(by_kernels, inputs)
    for name, tensor in results(plain, inputs).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 24), None, r"x: expected shape \(B, N, F, S, 24\).* got \(2, 24\)"),
        ((2, 3, 7, 20), None, r"x: expected .* got \(2, 3, 7, 20\)"),
        ((2, 3, 7, 24), (3, 2), r"media_seqlens: expected shape \(2, 3\), got \(3, 2\)"),
        ((2, 4, 7, 24), None, "x: expected at most max_num_media = 3 media, got 4"),
    ],
)
@pytest.mark.parametrize("our_class", [PerceiverResampler, MLPResampler, TransformerResampler])
def test_wrong_arguments_by_name(our_class, shape, lengths, message):
    ours = resampler(our_class=our_class, max_num_media=3)
    media_seqlens = None if lengths is None else torch.ones(lengths, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ours(torch.randn(shape), media_seqlens=media_seqlens)
    with pytest.raises(ValueError, match=r"places: expected shape \(2, 3\), got \(1, 1\)"):
        ours(torch.randn(2, 3, 7, 24), places=torch.ones(1, 1, dtype=torch.int64))
