"""Which media packed query rows attend to, a word of 64 media at a time.

A tile of keys is of one medium, so that a mask is a bit for each row, not one for each score: rows
that do not attend are taken out where a softmax subtracts its maximum, by an infinite one. Only
where media are too short for that do tiles cross them. The query heads that share a key/value head
are packed along the rows of a sample: packed row m is head m % GROUP of token m // GROUP.
"""

import triton
import triton.language as tl


@triton.jit
def load_sample(CU_MEDIA, sample, media_total):
    """First medium of a sample and their number, in bounds whatever the layout holds."""
    first = tl.minimum(tl.maximum(tl.load(CU_MEDIA + sample), 0), media_total)
    end = tl.minimum(tl.maximum(tl.load(CU_MEDIA + sample + 1), 0), media_total)
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
    return tl.maximum(start, 0), tl.minimum(tl.maximum(end, 0), num_media), is_dense


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
    CROSS_MEDIA: tl.constexpr,
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
    media = tl.sum(tl.where(wanted, bit, 0))
    if CROSS_MEDIA:
        # Fewer tiles than media of a word, or up to four a medium.
        first = tl.arange(0, 256) * BLOCK_N
        of_tile = _lowest_bits((first + (BLOCK_N + NUM_KEYS - 1)) // NUM_KEYS)
        of_tile &= ~_lowest_bits(first // NUM_KEYS)
        num_tiles = tl.sum(((media & of_tile) != 0).to(tl.int32))
    else:
        num_tiles = tl.sum(tl.where(wanted, (valid + BLOCK_N - 1) // BLOCK_N, 0))
    return media, num_tiles


@triton.jit
def first_tile(media, CROSS_MEDIA: tl.constexpr, NUM_KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile of a word's media begins, see `tile_columns`."""
    tile = 0
    if CROSS_MEDIA:
        tile = index_of_lowest_bit(media) * NUM_KEYS // BLOCK_N
    return tile


@triton.jit
def tile_columns(
    MEDIA_SEQLENS,
    media,
    tile,
    first_medium,
    media_total,
    first_key,
    all_keys,
    CROSS_MEDIA: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(bit, medium, key, mask_n, keys) of a tile's columns.

    Tiles are of one medium: `media` has those that are left of a word, and `tile` counts the keys
    of the first one from first_key on, of which there are `keys`. With CROSS_MEDIA, where media are
    too short to fill tiles, `tile` counts the tiles of a word's keys, all media one after the
    other; then bit and medium are those of each column.
    """
    offs_n = tl.arange(0, BLOCK_N)
    if CROSS_MEDIA:
        column = tile * BLOCK_N + offs_n
        bit = column // NUM_KEYS
        key = column - bit * NUM_KEYS
        mask_n = bit < 64
        bit = tl.minimum(bit, 63)
        mask_n &= ((media >> bit.to(tl.int64)) & 1) != 0
        medium = tl.minimum(first_medium + bit, media_total - 1)
        keys = NUM_KEYS
        if MEDIA_SEQLENS is not None:
            mask_n &= key < num_valid_keys(MEDIA_SEQLENS, medium, mask_n, all_keys, NUM_KEYS)
    else:
        bit = index_of_lowest_bit(media)
        medium = tl.minimum(first_medium + bit, media_total - 1)
        keys = NUM_KEYS
        if MEDIA_SEQLENS is not None:
            keys = num_valid_keys(MEDIA_SEQLENS, medium, True, all_keys, NUM_KEYS)
        keys = tl.minimum(keys - first_key, SPLIT_KEYS)
        key = first_key + tile + offs_n
        mask_n = tile + offs_n < keys
    return bit, medium, key, mask_n, keys


@triton.jit
def rows_and_keys(
    MEDIA_SEQLENS,
    attended,
    bit,
    medium,
    key,
    mask_n,
    is_dense,
    CROSS_MEDIA: tl.constexpr,
    DENSE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
):
    """(attends, allowed): rows that attend to some key of a tile, and which, (rows, BLOCK_N)."""
    allowed = mask_n[None, :]
    if CROSS_MEDIA:
        attended_n = (attended[:, None] >> bit[None, :].to(tl.int64)) & 1
        allowed &= attended_n != 0
        if MEDIA_SEQLENS is not None and DENSE:
            valid = num_valid_keys(MEDIA_SEQLENS, medium, mask_n, False, NUM_KEYS)
            allowed &= is_dense[:, None] | (key < valid)[None, :]
        attends = tl.max(allowed.to(tl.int32), 1) != 0
    else:
        attends = ((attended >> bit.to(tl.int64)) & 1) != 0
        if MEDIA_SEQLENS is not None and DENSE:
            # A block that has dense rows walks keys that are none to its others.
            valid = num_valid_keys(MEDIA_SEQLENS, medium, True, is_dense, NUM_KEYS)
            allowed &= key[None, :] < valid[:, None]
            attends &= tl.min(key, 0) < valid
    return attends, allowed


@triton.jit
def next_tile(
    media, tile, keys, CROSS_MEDIA: tl.constexpr, NUM_KEYS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The media that are left, and the next tile."""
    if CROSS_MEDIA:
        media &= ~_lowest_bits((tile + 1) * BLOCK_N // NUM_KEYS)
        tile = tl.maximum(tile + 1, index_of_lowest_bit(media) * NUM_KEYS // BLOCK_N)
    else:
        tile += BLOCK_N
        done = tile >= keys
        media = tl.where(done, media & (media - 1), media)
        tile = tl.where(done, 0, tile)
    return media, tile
