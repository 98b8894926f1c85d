"""Which media packed query rows attend to, a word of 64 media at a time.

A tile of keys is of one medium, so that a mask is a bit for each row, never one for each score:
rows that do not attend are taken out where a softmax subtracts its maximum, by an infinite one. The
query heads that share a key/value head are packed along the rows of a sample: packed row m is head
m % GROUP of token m // GROUP.
"""

import triton
import triton.language as tl


@triton.jit
def load_sample(CU_MEDIA, sample, media_total):
    """First medium of a sample and their number, in bounds whatever the layout holds."""
    first = tl.minimum(tl.maximum(tl.load(CU_MEDIA + sample), 0), media_total)
    end = tl.minimum(tl.load(CU_MEDIA + sample + 1), media_total)
    return first, tl.maximum(end - first, 0)


@triton.jit
def load_intervals(MEDIA_START, MEDIA_END, rows, mask_m, num_media, DENSE: tl.constexpr):
    """(start, end, is_dense) of rows of the batch; is_dense: attends to all tokens of all media."""
    start = tl.load(MEDIA_START + rows, mask=mask_m, other=0)
    end = tl.load(MEDIA_END + rows, mask=mask_m, other=0)
    is_dense = mask_m
    if DENSE:
        past_last = (start == num_media) & (end == num_media)
        is_dense = mask_m & (start >= end) & (past_last == 0)
        start = tl.where(is_dense, 0, start)
        end = tl.where(is_dense, num_media, end)
    return tl.maximum(start, 0), tl.minimum(end, num_media), is_dense


@triton.jit
def _lowest_bits(count):
    """int64 with the `count` lowest bits set."""
    shift = tl.minimum(tl.maximum(count, 0), 63).to(tl.int64)
    one = tl.full(shift.shape, 1, tl.int64)
    return tl.where(count >= 64, -1, (one << shift) - 1)


@triton.jit
def load_word(MEDIA_BITS, rows, mask_m, start, end, is_dense, word, num_words, DENSE: tl.constexpr):
    """Bit m of a row: whether it attends to medium 64 * word + m of its sample."""
    attended = _lowest_bits(end - word * 64) & ~_lowest_bits(start - word * 64)
    if MEDIA_BITS is not None:
        offsets = rows.to(tl.int64) * num_words + tl.minimum(word, num_words - 1)
        bits = tl.load(MEDIA_BITS + offsets, mask=mask_m, other=0)
        if DENSE:
            bits = tl.where(is_dense, -1, bits)
        attended &= bits
    return attended


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def index_of_lowest_bit(word):
    """0 of no bits."""
    power = (word & (0 - word)).to(tl.float32)
    exponent = (power.to(tl.int32, bitcast=True) >> 23) & 255
    return tl.maximum(exponent - 127, 0)


@triton.jit
def num_valid_keys(MEDIA_SEQLENS, medium, mask, all_keys, NUM_KEYS: tl.constexpr):
    """Valid keys of media; all of them where `all_keys`."""
    valid = tl.load(MEDIA_SEQLENS + medium, mask=mask, other=0)
    valid = tl.minimum(tl.maximum(valid, 0), NUM_KEYS)
    return tl.where(mask & all_keys, NUM_KEYS, valid)


@triton.jit
def media_of_block(
    MEDIA_SEQLENS,
    attended,
    first_medium,
    num_media,
    first_key,
    all_keys,
    SPLIT_KEYS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(media, num_tiles): those of a word that any row of a block attends to, and tiles of keys.

    Of each medium SPLIT_KEYS keys from first_key on. Media without valid keys there are left out.
    """
    media = tl.reduce(attended, 0, _or)
    offs_w = tl.arange(0, 64)
    valid = tl.full((64,), NUM_KEYS, tl.int32)
    if MEDIA_SEQLENS is not None:
        valid = num_valid_keys(
            MEDIA_SEQLENS, first_medium + offs_w, offs_w < num_media, all_keys, NUM_KEYS
        )
    valid = tl.minimum(valid - first_key, SPLIT_KEYS)
    bit = tl.full((64,), 1, tl.int64) << offs_w.to(tl.int64)
    wanted = (valid > 0) & ((media & bit) != 0)
    num_tiles = tl.sum(tl.where(wanted, (valid + BLOCK_N - 1) // BLOCK_N, 0))
    return tl.sum(tl.where(wanted, bit, 0)), num_tiles


@triton.jit
def load_tile_medium(
    MEDIA_SEQLENS,
    media,
    first_medium,
    media_total,
    first_key,
    all_keys,
    SPLIT_KEYS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
):
    """(bit, medium, number of keys from first_key on) of the first of `media`."""
    bit = index_of_lowest_bit(media)
    medium = tl.minimum(first_medium + bit, media_total - 1)
    keys = NUM_KEYS
    if MEDIA_SEQLENS is not None:
        keys = num_valid_keys(MEDIA_SEQLENS, medium, True, all_keys, NUM_KEYS)
    return bit, medium, tl.minimum(keys - first_key, SPLIT_KEYS)


@triton.jit
def next_tile(media, key, keys, BLOCK_N: tl.constexpr):
    """The media that are left and the key that the next tile starts with."""
    key += BLOCK_N
    done = key >= keys
    return tl.where(done, media & (media - 1), media), tl.where(done, 0, key)
