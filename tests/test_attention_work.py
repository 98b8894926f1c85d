"""What the one-medium kernels move and multiply, as the guard counts it, and their schedule."""

import functools
import heapq
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flamingo_fast as ff
from flamingo_fast.bench import attention, work
from flamingo_fast.kernels.launch import Launch, Target, recording
from flamingo_fast.layout import MediaLayout
from flamingo_fast.testing.guard import LaunchRecord, guard

pytestmark = pytest.mark.matrix

HEAD_DIM = NUM_KEYS = 64
BF16_BYTES = 2
SLOTS = 264  # Two blocks on each of the 132 multiprocessors of an H100.


def random_layout(batch: int, seqlen: int, media: int, seed: int) -> MediaLayout:
    generator = torch.Generator().manual_seed(seed)
    locations = torch.zeros(batch, seqlen, dtype=torch.bool)
    for row in locations:
        row[torch.randperm(seqlen, generator=generator)[:media]] = True
    return MediaLayout.from_media_locations(locations, media)


def is_split(layout: MediaLayout) -> bool:
    return bool((layout.split_media[:, 0] >= 0).any())


def first_layout(sizes: tuple[int, int, int], split: bool) -> MediaLayout:
    layouts = (random_layout(*sizes, seed) for seed in itertools.count())
    return next(layout for layout in layouts if is_split(layout) == split)


def run(
    layout: MediaLayout, heads: int, kv_heads: int, mode: str, watched: Callable[[], Any]
) -> Any:
    """What `watched`, a context, saw of the kernels that `mode` is about."""
    query = (layout.batch_size, layout.seqlen, heads, HEAD_DIM)
    keys = (layout.media_total, NUM_KEYS, kv_heads, HEAD_DIM)
    tensors = [torch.randn(shape, dtype=torch.bfloat16) for shape in (query, keys, keys)]
    wanted = {"fwd": [], "bwd_dq": tensors[:1]}.get(mode, tensors)
    for tensor in wanted:
        tensor.requires_grad_()
    with watched() as forward:
        out = ff.masked_cross_attention(*tensors, layout, impl="triton")
    if mode.startswith("fwd"):
        return forward
    with watched() as backward:
        torch.autograd.grad(out, wanted, torch.randn_like(out))
    return backward


def counted(layout: MediaLayout, heads: int, kv_heads: int, mode: str) -> LaunchRecord:
    return run(layout, heads, kv_heads, mode, guard).total()


def launched(layout: MediaLayout, heads: int, kv_heads: int, mode: str) -> list[Launch]:
    on_a_gpu = functools.partial(recording, Target("sm_90", 132))
    return run(layout, heads, kv_heads, mode, on_a_gpu)


def block_m(layout: MediaLayout, heads: int, kv_heads: int, mode: str) -> int:
    """Of the launch itself: the formula must not repeat how it is chosen."""
    return launched(layout, heads, kv_heads, mode)[0].constexprs["BLOCK_M"]


def compulsory(layout: MediaLayout, heads: int, mode: str) -> work.Work:
    media = layout.media_total // layout.batch_size
    shape = (layout.batch_size, layout.seqlen, media, heads, HEAD_DIM, NUM_KEYS)
    return work.masked_cross_attention(shape, BF16_BYTES, mode)


def kernel_work(layout: MediaLayout, heads: int, kv_heads: int, mode: str) -> work.Work:
    return work.masked_cross_attention_kernel_work(
        layout,
        heads,
        kv_heads,
        HEAD_DIM,
        NUM_KEYS,
        BF16_BYTES,
        mode,
        block_m(layout, heads, kv_heads, mode),
    )


def read_again(layout: MediaLayout, kv_heads: int) -> int:
    """Bytes that the items of split media load again of K and V, and that caches may serve."""
    items = int((layout.work_items[:, 0] >= 0).sum())
    return (items - layout.media_total) * 2 * NUM_KEYS * HEAD_DIM * BF16_BYTES * kv_heads


SIZES = [(1, 2048, 32), (8, 256, 5)]


@pytest.mark.parametrize("mode", ["fwd_lse", "bwd"])
@pytest.mark.parametrize("split", [False, True], ids=["unsplit", "split"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bytes_and_products(sizes, split, mode):
    """At random positions, where the mean medium has 62 or 43 rows."""
    layout = first_layout(sizes, split)
    measured, formula = counted(layout, 1, 1, mode), kernel_work(layout, 1, 1, mode)
    measured_bytes = measured.bytes_loaded + measured.bytes_stored
    once = compulsory(layout, 1, mode)
    if not split:
        assert measured_bytes <= 1.10 * once.bytes
    assert measured.bytes_loaded == pytest.approx(formula.loaded, rel=0.02)
    assert measured.bytes_stored == pytest.approx(formula.stored, rel=0.02)
    sectors = measured.sectors_loaded + measured.sectors_stored
    assert sectors == pytest.approx(formula.bytes - read_again(layout, 1), rel=0.02)
    assert measured.dot_flops == pytest.approx(formula.matmul_flops, rel=0.01)
    attending = int(layout.attends().sum()) / layout.attends().numel()
    assert measured.dot_flops <= 1.6 * attending * once.matmul_flops


@pytest.mark.parametrize("mode", ["fwd", "fwd_lse", "bwd", "bwd_dq"])
def test_bytes_and_products_of_shared_key_heads(mode):
    """Four query heads of a key head are rows of one tile, and K and V are read once for them."""
    layout = random_layout(1, 320, 4, seed=0)
    measured, formula = counted(layout, 4, 1, mode), kernel_work(layout, 4, 1, mode)
    assert measured.bytes_loaded == pytest.approx(formula.loaded, rel=0.02)
    assert measured.bytes_stored == pytest.approx(formula.stored, rel=0.02)
    assert measured.dot_flops == formula.matmul_flops


def test_frozen_keys_and_values_cost_no_gradient_bytes():
    layout = first_layout((1, 2048, 32), split=True)
    measured = counted(layout, 1, 1, "bwd_dq")
    assert measured.bytes_stored == layout.seqlen * HEAD_DIM * BF16_BYTES
    assert measured.dot_flops == kernel_work(layout, 1, 1, "bwd_dq").matmul_flops


def test_compulsory_bytes_by_hand():
    """2 samples of 3 tokens, 5 media of 7 tokens, of which 3 are read; 4 heads of 16 elements."""
    q, kv, lse = 2 * 3 * 4 * 16 * 2, 2 * (2 * 5 * 7 * 4 * 16 * 2), 2 * 3 * 4 * 4
    read = kv * 3 // 5
    moved = {
        "fwd": (q + read, q),
        "fwd_lse": (q + read, q + lse),
        "bwd": (2 * q + read + lse, q + kv),
        "bwd_dq": (2 * q + read + lse, q),
        "fwd_bwd": (3 * q + 2 * read + lse, 2 * q + kv + lse),
    }
    pairs = 2 * 3 * 4 * 7
    dots = {"fwd": 2, "fwd_lse": 2, "bwd": 5, "bwd_dq": 3, "fwd_bwd": 7}
    for mode, (loaded, stored) in moved.items():
        found = work.masked_cross_attention((2, 3, 5, 4, 16, 7), 2, mode)
        assert (found.loaded, found.stored) == (loaded, stored), mode
        assert found.matmul_flops == pairs * dots[mode] * 2 * 16, mode


@pytest.mark.parametrize("mode", ["fwd_lse", "bwd", "bwd_dq"])
def test_kernels_are_configured_from_shapes_alone(mode):
    """One medium that has all rows, media that share them, and tokens that attend to nothing."""
    layouts = [random_layout(1, 512, 4, seed) for seed in range(3)]
    for last in (0, 3, 508):
        locations = torch.zeros(1, 512, dtype=torch.bool)
        locations[0, last : last + 4] = True
        layouts.append(MediaLayout.from_media_locations(locations, 4))
    configs = []
    for layout in layouts:
        launches = launched(layout, 2, 2, mode)
        configs.append([(each.grid, each.constexprs, each.options) for each in launches])
    assert all(config == configs[0] for config in configs[1:])
    assert len(configs[0]) == {"fwd_lse": 1, "bwd": 2, "bwd_dq": 1}[mode]


# The schedule of (1, 2048, 32) with 8 heads, modelled: a program takes as long as it has bytes.

HEADS = 8


def makespan_over_mean(costs: list[int]) -> float:
    """Programs start in their order, each in the slot that is free first."""
    slots = [0] * SLOTS
    for cost in costs:
        heapq.heapreplace(slots, slots[0] + cost)
    return max(slots) / statistics.fmean(slots)


def item_costs(layout: MediaLayout, mode: str, tile: int) -> list[int]:
    items = work.one_medium_item_work(
        layout, HEADS, HEADS, HEAD_DIM, NUM_KEYS, BF16_BYTES, mode, tile
    )
    return [item.bytes for item in items for _ in range(HEADS)]


def unsplit_costs(layout: MediaLayout, mode: str) -> list[int]:
    """Each medium with all its rows in one program, longest first."""
    token_bytes = {"fwd_lse": 2 * HEAD_DIM * BF16_BYTES + 4, "bwd": 3 * HEAD_DIM * BF16_BYTES + 4}
    medium_bytes = 2 * NUM_KEYS * HEAD_DIM * BF16_BYTES * (2 if mode == "bwd" else 1)
    rows = layout.media_start[layout.attends()].bincount(minlength=layout.media_total)
    costs = (rows * token_bytes[mode] + medium_bytes).tolist()
    return sorted((cost for cost in costs for _ in range(HEADS)), reverse=True)


@pytest.mark.parametrize("mode", ["fwd_lse", "bwd"])
def test_the_schedule_is_balanced(mode):
    layouts = [random_layout(1, 2048, 32, seed) for seed in range(100)]
    tile = block_m(layouts[0], HEADS, HEADS, mode)
    once = compulsory(layouts[0], HEADS, mode).bytes
    products, unsplit = [], []
    for layout in layouts:
        moved = kernel_bytes(layout, mode, tile)
        products.append(moved / once * makespan_over_mean(item_costs(layout, mode, tile)))
        unsplit.append(makespan_over_mean(unsplit_costs(layout, mode)))
    assert max(products) <= 2.2
    # Without chunks the longest medium alone takes longer than that.
    worst = sorted(range(len(layouts)), key=unsplit.__getitem__)[-10:]
    assert all(unsplit[index] > products[index] for index in worst)
    assert max(unsplit) > 2.2


def kernel_bytes(layout: MediaLayout, mode: str, tile: int) -> int:
    return work.masked_cross_attention_kernel_work(
        layout, HEADS, HEADS, HEAD_DIM, NUM_KEYS, BF16_BYTES, mode, tile
    ).bytes


def test_benchmark_layouts():
    """Positions are the same in every run, even ones apart alike; one token attends to the last."""
    shape = (2, 64, 4, 1, 16, 16)
    device = torch.device("cpu")
    assert attention.media_layout(shape, device) == attention.media_layout(shape, device)
    even = attention.media_layout(shape, device, even=True)
    for medium in range(1, 5):
        assert (even.media_end == medium).sum(1).tolist() == [16, 16]
    token = attention.media_layout((1, 1, 32, 8, 64, 64), device)
    assert (token.media_start.item(), token.media_end.item()) == (31, 32)
