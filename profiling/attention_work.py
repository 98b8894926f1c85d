"""Work of one launch of the attention kernels.

What they execute is in `bench.work`, `bench.several_media_kernel_work` and
`bench.latent_kernel_work`; what of it is useful is counted here: keys and values that other work
items, blocks of rows or splits load again come from caches, and tiles have padding.
"""

import dataclasses
from typing import Any

import torch

from flamingo_fast.bench import latent_kernel_work, several_media_kernel_work
from flamingo_fast.bench.work import Work, one_medium_item_work
from flamingo_fast.layout import MediaLayout
from flamingo_fast.profiling.launches import Call
from flamingo_fast.profiling.rowwise_work import LaunchWork

# Operations of a score beside its products, as `bench.work` counts them: forward it is scaled, has
# the largest subtracted, is exponentiated, added up and rounded; for dS two more.
_FORWARD_FLOPS, _BACKWARD_FLOPS = 5, 7


def _attention(scores: int, dots: int, width: int, per_score: int) -> Work:
    return Work(0, 0, per_score * scores, dots * 2 * scores * width)


def _scores_of(flops: int, dots: int, width: int) -> int:
    return flops // (dots * 2 * width) if dots else 0


# One medium a token.


def _one_medium(call: Call, mode: str, dots: int, per_score: int) -> LaunchWork:
    """`mode` as `one_medium_item_work` has it; the schedule's own integers are counted here."""
    batch, seqlen, heads, head_dim = call["Q"].shape
    media_total, num_keys, kv_heads, _ = call["K"].shape
    group, itemsize = heads // kv_heads, call["Q"].element_size()
    items, lengths = call["WORK_ITEMS"], call["MEDIA_SEQLENS"]
    layout = _layout(call, work_items=items, media_total=media_total)
    total = Work(0, 0, 0)
    for work in one_medium_item_work(
        layout, heads, kv_heads, head_dim, num_keys, itemsize, mode, call["BLOCK_M"]
    ):
        total += work
    again = pairs = 0
    seen: set[int] = set()
    for medium, begin, end, _ in items.tolist():
        if medium < 0 or begin >= end:
            continue
        valid = num_keys if lengths is None else min(int(lengths[medium]), num_keys)
        pairs += (end - begin) * group * valid
        again += 2 * valid * head_dim * itemsize if medium in seen else 0
        seen.add(medium)
    executed = dataclasses.replace(
        total, vector_flops=per_score * _scores_of(total.matmul_flops, dots, call["BLOCK_D"])
    )
    useful = _attention(pairs, dots, head_dim, per_score)
    useful += Work(total.loaded - again, total.stored, 0)
    useful, executed = (work * kv_heads for work in (useful, executed))
    once, by_programs = (_integers(call, batch * seqlen * lanes) for lanes in (1, group))
    return LaunchWork(useful + Work(once, 0, 0), executed + Work(kv_heads * by_programs, 0, 0))


def _integers(call: Call, rows: int) -> int:
    """Bytes of the schedule: its items, and places of as many rows."""
    index = 0 if call["ROW_INDEX"] is None else 4 * rows
    lengths = 0
    if call["MEDIA_SEQLENS"] is not None:
        lengths = 4 * int((call["WORK_ITEMS"][:, 0] >= 0).sum())
    return call.num_bytes("WORK_ITEMS") + index + lengths


def one_medium_fwd(call: Call) -> LaunchWork:
    mode = "fwd_lse" if call["STORE_LSE"] else "fwd"
    return _one_medium(call, mode, 2, _FORWARD_FLOPS)


def one_medium_bwd(call: Call) -> LaunchWork:
    if not call["NEED_DKV"]:
        return _one_medium(call, "bwd_dq", 3, _BACKWARD_FLOPS)
    work = _one_medium(call, "bwd", 5, _BACKWARD_FLOPS)
    if call["NEED_DQ"]:
        return work
    dq = call.num_bytes("Q")
    return LaunchWork(_without_dq(work.useful, dq), _without_dq(work.executed, dq))


def _without_dq(work: Work, dq_bytes: int) -> Work:
    """Of five products one is dQ."""
    return dataclasses.replace(
        work, stored=work.stored - dq_bytes, matmul_flops=work.matmul_flops * 4 // 5
    )


def sum_split_media(call: Call) -> LaunchWork:
    numel = 2 * call["NUM_KEYS"] * call["HEAD_DIM"] * call["num_kv_heads"]
    work = Work(call.num_bytes("SPLIT_MEDIA"), 0, 0)
    for medium, first, end in call["SPLIT_MEDIA"].tolist():
        if medium >= 0:
            slots = end - first
            stored = numel * call["DKV"].element_size()
            work += Work(slots * numel * 4, stored, slots * numel)
    # Each program reads its entry.
    entries = 12 * call.programs - call.num_bytes("SPLIT_MEDIA")
    return LaunchWork(work, work + Work(entries, 0, 0))


# Several media a token.


def _layout(call: Call, **fields: Any) -> MediaLayout:
    """Of what a launch has of it; its work does not depend on the rest."""
    nothing = torch.zeros(0, dtype=torch.int32)
    known: dict[str, Any] = {
        "media_start": nothing,
        "media_end": nothing,
        "cu_media": nothing,
        "media_seqlens": call["MEDIA_SEQLENS"],
        "media_bits": None,
        "media_rows": nothing,
        "work_items": None,
        "split_media": None,
        "row_index": None,
        "max_media": 0,
        "max_media_per_token": 1,
        "is_packed": False,
        "tells_past_last": True,
    }
    return MediaLayout(**known | fields)


def _several(call: Call) -> several_media_kernel_work.Attention:
    heads, head_dim = call["Q"].shape[2:]
    media_total, num_keys, kv_heads, _ = call["K"].shape
    layout = _layout(
        call,
        media_start=call["MEDIA_START"],
        media_end=call["MEDIA_END"],
        media_bits=call["MEDIA_BITS"],
        cu_media=call["CU_MEDIA"],
        media_rows=call.arguments.get("MEDIA_ROWS"),
        media_total=media_total,
        max_media=int(call["CU_MEDIA"].diff().max()),
        max_media_per_token=media_total,
    )
    return several_media_kernel_work.Attention(
        layout, heads, kv_heads, head_dim, num_keys, call["Q"].element_size(), call["DENSE"]
    )


def _several_media(
    call: Call, executed: Work, dots: int, per_score: int, rows_loaded: int
) -> LaunchWork:
    """`rows_loaded`: bytes beside masks, keys and values."""
    attention = _several(call)
    pairs = keys = 0
    for sample in range(attention.layout.batch_size):
        attended, valid = attention.attended(sample), attention.valid_keys(sample)
        dense = attention.dense_rows(sample)
        silent = attended & dense[:, None]
        pairs += int(((attended & ~silent) * valid).sum()) + int(silent.sum()) * call["NUM_KEYS"]
        valid = torch.full_like(valid, call["NUM_KEYS"]) if bool(dense.any()) else valid
        keys += int(valid[attended.any(0)].sum())
    group, kv_heads = attention.group, attention.kv_heads
    scores = _scores_of(executed.matmul_flops, dots, call["BLOCK_D"])
    executed = dataclasses.replace(executed, vector_flops=per_score * scores)
    useful = _attention(pairs * group, dots, call["HEAD_DIM"], per_score) * kv_heads
    key_bytes = 2 * keys * attention.row_bytes * kv_heads
    masks = call.num_bytes("MEDIA_START", "MEDIA_END", "MEDIA_BITS", "CU_MEDIA", "MEDIA_SEQLENS")
    useful += Work(key_bytes + rows_loaded + masks, executed.stored, 0)
    return LaunchWork(useful, executed)


def several_media_fwd(call: Call) -> LaunchWork:
    attention, splits = _several(call), call.grid[1]
    both = several_media_kernel_work.forward_work(attention, call.arguments, splits)
    executed = _without_combining(both, call) if splits > 1 else both
    return _several_media(call, executed, 2, _FORWARD_FLOPS, call.num_bytes("Q"))


def several_media_dq(call: Call) -> LaunchWork:
    executed = several_media_kernel_work.dq_work(_several(call), call.arguments)
    names = ("DOUT", "OUT", "Q", "LSE") if call["NEED_DQ"] else ("DOUT", "OUT")
    dots = 3 if call["NEED_DQ"] else 0
    return _several_media(call, executed, dots, _BACKWARD_FLOPS, call.num_bytes(*names))


def several_media_dkv(call: Call) -> LaunchWork:
    """Of rows only those between the first and the last that attend to any medium."""
    executed = several_media_kernel_work.dkv_work(_several(call), call.arguments)
    rows = torch.zeros(call["batch"] * call["seqlen"], dtype=torch.bool)
    for begin, end in call["MEDIA_ROWS"].tolist():
        rows[begin:end] = True
    if call["DENSE"]:
        rows[:] = True
    of_rows = call.num_bytes("DOUT", "Q", "LSE", "DELTA") * int(rows.sum()) // max(len(rows), 1)
    loaded = of_rows + call.num_bytes("MEDIA_ROWS")
    return _several_media(call, executed, 4, _BACKWARD_FLOPS, loaded)


# What splits of keys leave to a second kernel.


def _combined(forward: Call) -> tuple[int, int]:
    """Bytes of the sums of splits, written and read again, and of what is made of them."""
    query, store_lse = forward["Q"], forward["STORE_LSE"]
    out = query.numel() * query.element_size() + (forward.num_bytes("LSE") if store_lse else 0)
    if forward.kernel == "_latent_fwd_kernel":
        total = latent_kernel_work.forward_work(
            _latent(forward), forward.arguments, forward.grid[1]
        )
    else:
        total = several_media_kernel_work.forward_work(
            _several(forward), forward.arguments, forward.grid[1]
        )
    return total.stored - out, out


def _without_combining(both: Work, call: Call) -> Work:
    sums, out = _combined(call)
    return dataclasses.replace(both, loaded=both.loaded - sums, stored=both.stored - out)


def combine_splits(call: Call) -> LaunchWork:
    forward = call.before
    assert forward is not None, "a forward in splits comes before"
    sums, out = _combined(forward)
    # Two operations of each number: scaled, and added.
    work = Work(sums, out, 2 * sums // 4)
    return LaunchWork(work, work)


def sum_splits(call: Call) -> LaunchWork:
    numel = call["numel"] * call["num_splits"]
    work = Work(4 * numel, call.num_bytes("DQ"), numel)
    return LaunchWork(work, work)


# A resampler.


def _latent(call: Call) -> latent_kernel_work.Attention:
    batch, latents, heads, head_dim = call["Q"].shape
    num_keys, kv_heads = call["K_MEDIA"].shape[1:3]
    lengths = call["MEDIA_SEQLENS"]
    return latent_kernel_work.Attention(
        batch,
        latents,
        num_keys,
        heads,
        kv_heads,
        head_dim,
        call["Q"].element_size(),
        None if lengths is None else tuple(lengths.tolist()),
    )


def _latent_work(
    call: Call, executed: Work, dots: tuple[int, int], per_score: int, rows_loaded: int
) -> LaunchWork:
    """`dots`: with media and with latents; of a source without any nothing is read."""
    attention = _latent(call)
    block_m, block_n = call["BLOCK_M"], call["BLOCK_N"]
    blocks = -(-attention.rows // block_m)
    useful, scores = Work(0, 0, 0), 0
    for valid in attention.valid_keys():
        for keys, products in zip((valid, attention.latents), dots, strict=True):
            if products:
                pairs = attention.rows * keys
                useful += _attention(pairs, products, attention.head_dim, per_score)
                scores += blocks * -(-keys // block_n) * block_m * block_n
    useful *= attention.kv_heads
    rows_loaded += call.num_bytes("MEDIA_SEQLENS")
    if dots[0]:
        valid = sum(attention.valid_keys())
        rows_loaded += 2 * valid * attention.row_bytes * attention.kv_heads
    if dots[1]:
        # A resampler's own latents are the same for all media.
        rows_loaded += call.num_bytes("K_LATENTS", "V_LATENTS")
    useful += Work(rows_loaded, executed.stored, 0)
    executed = dataclasses.replace(executed, vector_flops=per_score * scores * attention.kv_heads)
    return LaunchWork(useful, executed)


def latent_fwd(call: Call) -> LaunchWork:
    splits = call.grid[1]
    both = latent_kernel_work.forward_work(_latent(call), call.arguments, splits)
    executed = _without_combining(both, call) if splits > 1 else both
    return _latent_work(call, executed, (2, 2), _FORWARD_FLOPS, call.num_bytes("Q"))


def latent_bwd(call: Call) -> LaunchWork:
    attention, splits, need_dq = _latent(call), call.grid[1], call["NEED_DQ"]
    executed = latent_kernel_work.backward_work(attention, call.arguments, splits)
    if splits > 1 and need_dq:
        # dQ of each split is written in fp32; `_sum_splits_kernel` reads that and writes dQ.
        sums = splits * call["Q"].numel() * 4
        dq = call.num_bytes("Q")
        executed = dataclasses.replace(
            executed, loaded=executed.loaded - sums, stored=executed.stored - dq
        )
    needs = call["NEED_DMEDIA"], call["NEED_DLATENTS"]
    names = ("DOUT", "OUT", "Q", "LSE") if need_dq or any(needs) else ("DOUT", "OUT")
    media, latents = (2 + 2 * need + need_dq if need_dq or need else 0 for need in needs)
    loaded = call.num_bytes(*names)
    return _latent_work(call, executed, (media, latents), _BACKWARD_FLOPS, loaded)


def latent_dkv(call: Call) -> LaunchWork:
    executed = latent_kernel_work.dkv_work(_latent(call), call.arguments)
    dots = 4 * call["NEED_DMEDIA"], 4 * call["NEED_DLATENTS"]
    loaded = call.num_bytes("DOUT", "Q", "LSE", "DELTA")
    return _latent_work(call, executed, dots, _BACKWARD_FLOPS, loaded)
