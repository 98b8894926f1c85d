"""Layouts, and stand-ins of libraries' functions, for backends of sequences of any length."""

import functools
import random

import torch
from attention_contract import locations_at

import flamingo_fast as ff
from flamingo_fast.ops import varlen_attention as varlen
from flamingo_fast.testing.inputs import random_tensor

R = 3  # tokens of a medium


def make_previous(images, seqlen, num_media=None, seqlens=None, attend="previous"):
    return ff.MediaLayout.from_media_locations(
        locations_at(images, seqlen),
        list(map(len, images)) if num_media is None else num_media,
        attend,
        media_seqlens=None if seqlens is None else torch.tensor(seqlens),
    )


def make_random(attend: str, seed: int):
    generator = random.Random(seed)
    images = [sorted(generator.sample(range(50), generator.randrange(7))) for _ in range(4)]
    return make_previous(images, 50, attend=attend)


def make_shuffled(seqlens=None):
    """One medium, or none, for each token, in any order; the rows of a medium are scattered."""
    start = torch.tensor([[2, 0, 2, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1]])
    attends = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1]])
    return ff.MediaLayout.from_intervals(
        start,
        start + attends,
        [3, 0, 2],
        1,
        media_seqlens=None if seqlens is None else torch.tensor(seqlens),
    )


def _packed():
    """Two rows of several documents, the third of them without media; padding after the last."""
    return ff.MediaLayout.packed(
        locations_at([(1, 4, 9, 20), (0, 7)], 24), [0, 8, 12, 19, 24, 30, 40], [2, 1, 0, 1, 1, 1]
    )


LAYOUTS = {
    **{f"previous_{seed}": functools.partial(make_random, "previous", seed) for seed in range(3)},
    **{f"next_{seed}": functools.partial(make_random, "next", seed) for seed in range(3)},
    "before_the_first": lambda: make_previous([(4, 8), (11,)], 12),
    "without_media": lambda: make_previous([(), (2, 5), (), (), (0,), ()], 7),
    "nothing_at_all": lambda: make_previous([(), ()], 5),
    "more_images_than_media": lambda: make_previous([(1, 3, 6), (0, 2, 4)], 8, [1, 2]),
    "more_media_than_images": lambda: make_previous([(3,), ()], 6, [4, 2]),
    "seqlens": lambda: make_previous([(1, 3), (0, 4, 5)], 9, seqlens=[0, 3, 1, 0, 2]),
    "next_seqlens": lambda: make_previous([(1, 3), (0, 4)], 9, seqlens=[3, 0, 0, 1], attend="next"),
    "any_order": make_shuffled,
    "any_order_seqlens": lambda: make_shuffled([1, 0, 3, 0, 2]),
    "mask": lambda: ff.MediaLayout.from_media_mask(torch.eye(4)[None, [3, 1, 1, 0]].bool(), 1),
    "decode": lambda: make_previous([(2, 5), (), (0,)], 9).last(1),
    "decode_seqlens": lambda: make_previous([(2, 5), (8,)], 9, seqlens=[2, 0, 1]).last(1),
    "long_rows": lambda: make_previous([range(0, 900, 90), (5,)], 1000),
    "packed": _packed,
}


# What takes the place of the libraries.


def attend_by_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, without_keys):
    """Attention for each sequence; `without_keys` times q where it has none.

    Rows that the kernels' grid would not reach are NaN.
    """
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1
        assert not any(x % 8 for x in (*tensor.stride()[:-1], tensor.storage_offset()))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    outs = []
    sequences = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    lengths = list(zip(*sequences, strict=True))
    for rows, keys, values in zip(
        q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True
    ):
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", rows, keys) * scale, -1)
        out = torch.einsum("hqk,khd->qhd", weights, values)
        if len(keys) == 0:
            out = rows * without_keys
        outs.append(torch.where(torch.arange(len(rows))[:, None, None] < longest, out, torch.nan))
    return torch.cat(outs)


def _check_decoding(q, k, longest):
    """With grouped heads FlashAttention 2 takes a max_seqlen_q of 1 for a row in each sequence."""
    assert longest > 1 or q.shape[1] == k.shape[1]


def stand_in_of_varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    enable_gqa=False,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_k, num_splits) == (R, 1)
    _check_decoding(query, key, max_q)
    return attend_by_sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, scale, 0)


def older_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    """As PyTorch 2.11 has it."""
    assert max_k == R and query.shape[1] == key.shape[1]
    return attend_by_sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, scale, 0)


def _flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert max_seqlen_k == R
    assert deterministic
    _check_decoding(q, k, max_seqlen_q)
    return attend_by_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, 0)


def _flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    num_splits=0,
    deterministic=False,
):
    assert (max_seqlen_k, num_splits, deterministic) == (R, 1, True)
    out = attend_by_sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, torch.nan
    )
    return out, None


def _memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    if query.dim() == 5:
        assert not any(x.requires_grad for x in (query, key, value))
        assert key.stride(3) == value.stride(3) == 0
        key, value = key[..., 0, :], value[..., 0, :]
    parts = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    assert parts[1].max_seqlen == R
    out = attend_by_sequences(
        query[0].reshape(query.shape[1], -1, query.shape[-1]),
        key[0],
        value[0],
        *(part.seqstart for part in parts),
        parts[0].max_seqlen,
        scale,
        torch.nan,
    )
    return out.view(query.shape)


ADAPTERS = {
    "varlen": (varlen.varlen_attention, "varlen", stand_in_of_varlen_attn),
    "flash_attn": (varlen.flash_attn_attention, "flash_attn", _flash_attn_2),
    "flash_attn_4": (varlen.flash_attn_attention, "flash_attn_4", _flash_attn_4),
    "xformers": (varlen.xformers_attention, "xformers", _memory_efficient_attention),
}


def make_inputs(layout, heads=4, kv_heads=2, layouts=("contiguous", "contiguous")):
    shapes = {
        "q": (*layout.media_start.shape, heads, 8),
        "k": (layout.media_total, R, kv_heads, 8),
        "v": (layout.media_total, R, kv_heads, 8),
    }
    return [
        random_tensor(shape, torch.float64, seed=seed, layout=layouts[name != "q"]).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    ]
