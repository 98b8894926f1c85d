"""masked_cross_attention in the attention modules of transformers' IDEFICS and Mllama."""

import re
import sys

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast.layout import MediaLayout
from flamingo_fast.models.extras import require
from flamingo_fast.testing import peers
from flamingo_fast.testing.compare import assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix

IMAGE, EOS, TEXT = 7, 2, 5
# Of the image states; the text's are wider.
IMAGE_DIM = 24
KEYS = 5

impls = pytest.mark.parametrize("impl", ["reference", "sdpa", "torch", "triton"])
fast_impls = pytest.mark.parametrize("impl", ["torch", "triton"])


def _ids(*samples: str) -> torch.Tensor:
    """Of "..i.e", an image token is the third and the end of a document the last of five."""
    return torch.tensor([[{"i": IMAGE, "e": EOS}.get(t, TEXT) for t in s] for s in samples])


def _random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return module.requires_grad_(False)


def _assert_same(module, theirs, ours, hidden_states, image_states):
    """The three-way rule: eager is their module, and the oracle is that in fp64.

    theirs, ours: functions of the module and both states.
    """
    inputs = {
        "hidden_states": random_tensor(hidden_states, seed=1, requires_grad=True),
        "image_states": random_tensor(image_states, seed=2, requires_grad=True),
    }
    dout = random_tensor(hidden_states, seed=3)
    results = [
        outputs_and_gradients(
            lambda *states, call=call: call(module, *states), inputs, ("out",), (dout,)
        )
        for call in (ours, theirs)
    ]
    module.double()
    oracle = outputs_and_gradients(
        lambda *states: theirs(module, *states), inputs, ("out",), (dout,), torch.float64
    )
    assert_close_to_oracle(*results, oracle)


def _attention_of(layout, num_keys, impl, unattended):
    """For `peers.attention_in_place`; each sample's keys are those of its media in turn."""

    def attention(q, k, v, scale):
        k, v = (tensor.unflatten(1, (-1, num_keys)) for tensor in (k, v))
        return ff.masked_cross_attention(
            q, k, v, layout, unattended=unattended, softmax_scale=scale, impl=impl
        )

    return attention


def _in_chunks(function, hidden_states, lengths):
    """`function` of the part of the text and the slice of it, one part after the other."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert ends[-1] == hidden_states.shape[1]
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return torch.cat([function(hidden_states[:, part], part) for part in parts], 1)


def _idefics_bias_and_gate(mask, num_keys):
    """As IdeficsModel.forward makes them."""
    tokens = mask.repeat_interleave(num_keys, dim=2)[:, None].bool()
    # Of fp32 even in fp64: their softmax, in fp32, makes -inf of what is less.
    bias = torch.where(tokens, 0.0, torch.finfo(torch.float32).min)
    return bias, (bias == 0).any(-1).squeeze(1).float()


def _assert_same_as_idefics(
    mask, impl, per_token=None, num_keys=KEYS, heads=2, qk_layer_norms=False, chunks=None
):
    batch, seqlen, num_media = mask.shape
    layer = _random_weights(peers.idefics_layer(heads * 16, heads, IMAGE_DIM, qk_layer_norms))
    bias, gate = _idefics_bias_and_gate(mask, num_keys)

    def theirs(layer, hidden_states, image_states):
        return layer(
            hidden_states,
            image_hidden_states=image_states,
            image_attention_mask=bias.to(hidden_states.dtype),
            cross_attention_gate=gate,
        )

    def ours(layer, hidden_states, image_states):
        def part_of_it(hidden_states, part):
            layout = MediaLayout.from_media_mask(mask[:, part], per_token)
            attention = _attention_of(layout, num_keys, impl, "zero")
            with peers.attention_in_place(layer, attention):
                return layer(
                    hidden_states,
                    image_hidden_states=image_states,
                    cross_attention_gate=torch.ones_like(gate[:, part]),
                )

        return _in_chunks(part_of_it, hidden_states, chunks or [seqlen])

    _assert_same(
        layer, theirs, ours, (batch, seqlen, heads * 16), (batch, num_media * num_keys, IMAGE_DIM)
    )


HOLES = torch.tensor(
    [
        [[1, 0, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]],
        [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1]],
    ]
)


def _random_mask(seed: int, num_media: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 9, num_media, generator=generator) < density).long()


# The second sample has fewer images, the third none; ends of documents close them.
PACKED_TEXT = (".i..ei.i.e..", "...i.......i", ".e..........")


def _one_hot() -> torch.Tensor:
    return peers.idefics_image_attention_mask(_ids(*PACKED_TEXT), IMAGE, EOS, 3)


IDEFICS_MASKS = {
    "holes": lambda: HOLES,
    "random": lambda: _random_mask(0, 4, 0.5),
    "random_sparse": lambda: _random_mask(1, 7, 0.15),
    "more_than_64": lambda: _random_mask(2, 66, 0.05)[:1, :3],
    "one_hot": _one_hot,
    "bool": lambda: HOLES.bool(),
    "nothing": lambda: torch.zeros(2, 3, 2, dtype=torch.int64),
    "one_token": lambda: HOLES[:, 3:4],
    "one_image": lambda: HOLES[..., 1:2],
}


@impls
@pytest.mark.parametrize("mask", IDEFICS_MASKS.values(), ids=IDEFICS_MASKS.keys())
def test_same_as_idefics(mask, impl, guarded):
    _assert_same_as_idefics(mask(), impl)


@impls
def test_same_as_idefics_with_one_hot_masks_that_are_said_to_be(impl, guarded):
    mask = _one_hot()
    assert mask.sum(2).unique().tolist() == [0, 1]
    _assert_same_as_idefics(mask, impl, per_token=1)


def test_one_hot_masks_of_more_images_than_media():
    """Their processor drops what is beyond: these tokens attend to nothing."""
    mask = peers.idefics_image_attention_mask(_ids("i.i.i.."), IMAGE, EOS, 2)
    assert mask[0].sum(1).tolist() == [1, 1, 1, 1, 0, 0, 0]
    _assert_same_as_idefics(mask, "torch", per_token=1)


@impls
def test_same_as_idefics_with_norms_of_q_and_k(impl, guarded):
    _assert_same_as_idefics(HOLES, impl, qk_layer_norms=True)


@impls
def test_same_as_idefics_with_more_than_128_tokens_an_image(impl, guarded):
    _assert_same_as_idefics(HOLES[:1], impl, heads=1, num_keys=133)


@impls
@pytest.mark.parametrize("chunks", [[2, 1, 3], [1] * 6], ids=["prefill", "decode"])
def test_same_as_idefics_in_chunks(chunks, impl, guarded):
    _assert_same_as_idefics(HOLES, impl, chunks=chunks)


@fast_impls
def test_same_as_idefics_in_chunks_of_one_hot_masks(impl, guarded):
    _assert_same_as_idefics(_one_hot(), impl, per_token=1, chunks=[5, 4, 1, 1, 1])


def _assert_same_as_mllama(mask, impl, tokens_per_tile=KEYS, heads=4, kv_heads=2, chunks=None):
    batch, seqlen, num_media, tiles = mask.shape
    dim, num_keys = heads * 16, tiles * tokens_per_tile
    attention_module = _random_weights(peers.mllama_cross_attention(dim, heads, kv_heads))
    bias = peers.mllama_attention_bias(mask, tokens_per_tile)

    def theirs(module, hidden_states, image_states):
        out, _ = module(hidden_states, image_states, attention_mask=bias.to(hidden_states.dtype))
        return out

    def ours(module, hidden_states, image_states):
        def part_of_it(hidden_states, part):
            layout = MediaLayout.from_tile_mask(mask[:, part], tokens_per_tile)
            attention = _attention_of(layout, num_keys, impl, "dense")
            with peers.attention_in_place(module, attention):
                return module(hidden_states, image_states)[0]

        return _in_chunks(part_of_it, hidden_states, chunks or [seqlen])

    _assert_same(
        attention_module, theirs, ours, (batch, seqlen, dim), (batch, num_media * num_keys, dim)
    )


def _tile_mask(*samples: str, tiles, max_num_tiles: int = 4) -> torch.Tensor:
    ids = [_ids(sample)[0].tolist() for sample in samples]
    return peers.mllama_cross_attention_mask(ids, IMAGE, tiles, max_num_tiles)


MLLAMA_MASKS = {
    "one_image": lambda: _tile_mask("..i....", tiles=[[4]]),
    "padded_tiles": lambda: _tile_mask("i....i..", "..i...", tiles=[[1, 3], [2]]),
    "several_images": lambda: _tile_mask(".i..i..i.", tiles=[[2, 1, 4]]),
    "consecutive_images": lambda: _tile_mask(
        "ii..i.iii.", ".ii.......", tiles=[[4, 1, 2, 3, 4, 1], [2, 2]]
    ),
    "ends_in_images": lambda: _tile_mask(".i...ii", tiles=[[1, 4, 2]], max_num_tiles=4),
    "no_image_in_a_sample": lambda: _tile_mask(".i....", "......", tiles=[[3], []]),
    "one_tile": lambda: _tile_mask(".i..i.", tiles=[[1, 1]], max_num_tiles=1),
    "nothing": lambda: torch.zeros(2, 3, 2, 4, dtype=torch.int64),
}


@impls
@pytest.mark.parametrize("mask", MLLAMA_MASKS.values(), ids=MLLAMA_MASKS.keys())
def test_same_as_mllama(mask, impl, guarded):
    """Text before the first image, too: it attends to everything, padding included."""
    _assert_same_as_mllama(mask(), impl)


@impls
def test_same_as_mllama_with_more_than_128_tokens_a_medium(impl, guarded):
    mask = _tile_mask(".i..i.", tiles=[[4, 1]])
    _assert_same_as_mllama(mask, impl, tokens_per_tile=37, heads=2, kv_heads=1)


@impls
@pytest.mark.parametrize("chunks", [[1, 2, 3, 2], [1] * 8], ids=["prefill", "decode"])
def test_same_as_mllama_in_chunks(chunks, impl, guarded):
    """A chunk's own mask may attend to fewer images than the whole, and to none."""
    mask = _tile_mask("..ii.i..", ".....i..", tiles=[[4, 2, 1], [3]])
    _assert_same_as_mllama(mask, impl, chunks=chunks)


@fast_impls
def test_decoding_as_mllama_with_a_growing_mask(impl, guarded):
    """A new token's row is a copy of the last; the layout's last token is all that is asked for."""
    mask = _tile_mask("..ii.i..", ".....i..", tiles=[[4, 2, 1], [3]])
    whole = MediaLayout.from_tile_mask(mask, KEYS)
    grown = torch.cat([mask, mask[:, -1:]], 1)
    last = MediaLayout.from_tile_mask(grown, KEYS).last(1)
    assert last == whole.last(1)
    q = random_tensor((2, 1, 2, 16), seed=1)
    k, v = (random_tensor((2, 3, 4 * KEYS, 2, 16), seed=seed) for seed in (2, 3))
    out = ff.masked_cross_attention(q, k, v, last, unattended="dense", impl=impl)
    bias = peers.mllama_attention_bias(mask[:, -1:], KEYS)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        *(tensor.flatten(1, 2).transpose(1, 2) for tensor in (k, v)),
        attn_mask=bias,
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_tiles_as_media_of_their_own(guarded):
    """The other way to say padded tiles: each tile is a medium."""
    mask = _tile_mask("i....i..", "..i...", tiles=[[1, 3], [2]])
    tiles = MediaLayout.from_media_mask(mask.flatten(2))
    images = MediaLayout.from_tile_mask(mask, KEYS)
    q = random_tensor((2, 8, 2, 16), seed=1)
    k, v = (random_tensor((2, 8, KEYS, 2, 16), seed=seed) for seed in (2, 3))
    of_tiles = ff.masked_cross_attention(q, k, v, tiles, unattended="dense")
    k, v = (tensor.unflatten(1, (2, 4)).flatten(2, 3) for tensor in (k, v))
    of_images = ff.masked_cross_attention(q, k, v, images, unattended="dense")
    torch.testing.assert_close(of_images, of_tiles)


def test_absent_transformers_is_an_error_that_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"transformers is not installed: pip install 'flamingo_fast\[models\]'"
    with pytest.raises(ImportError, match=message):
        peers.idefics_layer(16, 1, IMAGE_DIM)


def test_a_transformers_without_the_module_is_said_to_be_another_version():
    transformers = pytest.importorskip("transformers")
    message = (
        rf"^transformers {re.escape(transformers.__version__)} has no transformers.models.none"
    )
    with pytest.raises(ImportError, match=message):
        require("transformers.models.none.modeling_none")
