"""The benchmark's arithmetic: bytes, operations and memory; never how long something took."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_cases import CPU, attention_provider, small_shape
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flamingo_fast.bench import (
    attention,
    latent,
    pairs,
    plan,
    registry,
    roofline,
    several_media,
    several_media_work,
    work,
)
from flamingo_fast.bench import run as bench_run
from flamingo_fast.bench.registry import DTYPES, Case
from flamingo_fast.layout import MediaLayout

# Work


@pytest.mark.parametrize(
    ("formula", "mode", "loaded", "stored"),
    [
        # 3 rows of 5 bf16 elements: 30 bytes a tensor, 10 a parameter, 12 of fp32 a statistic.
        (work.squared_relu, "fwd", 30, 30),
        (work.squared_relu, "bwd", 60, 30),
        (work.gated_residual, "fwd", 60 + 2, 30),
        (work.gated_residual, "bwd", 60 + 2, 30 + 2),
        (work.norm, "fwd", 30 + 20, 30 + 24),
        (work.norm, "bwd", 60 + 24 + 10, 30 + 20),
        (work.gated_residual_norm, "fwd", 60 + 2 + 20, 60 + 24),
        (work.gated_residual_norm, "bwd", 120 + 2 + 24 + 10, 60 + 2 + 20),
        (work.gated_residual_norm, "fwd_bwd", 60 + 2 + 20 + 156, 60 + 24 + 82),
    ],
)
def test_bytes_by_hand(
    formula: Callable[..., work.Work], mode: str, loaded: int, stored: int
) -> None:
    found = formula((3, 5), 2, mode)
    assert (found.loaded, found.stored) == (loaded, stored)
    assert found.bytes == loaded + stored


def test_bytes_of_variants_by_hand() -> None:
    rms = work.norm((3, 5), 2, "bwd", rms=True)
    assert (rms.loaded, rms.stored) == (60 + 12 + 10, 30 + 10)
    twice = work.norm((3, 5), 2, "bwd", column_pass=True)
    assert twice.loaded == work.norm((3, 5), 2, "bwd").loaded + 60


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gated_residual_layer_norm"])
def test_norms_too_wide_for_one_pass_read_their_inputs_again(op: str) -> None:
    pytest.importorskip("triton")
    from flamingo_fast.kernels.norm_config import WIDEST_KEPT

    assert work.WIDEST_ONE_PASS == WIDEST_KEPT
    formula = plan.BENCHMARKS[op].work
    once = 4 if op.startswith("gated") else 2
    statistic = 4 if op == "rms_norm" else 8
    for width, elements in ((WIDEST_KEPT, once), (WIDEST_KEPT + 16, once + 2)):
        row = formula((2, width), 2, "bwd").loaded - formula((1, width), 2, "bwd").loaded
        assert row == elements * width * 2 + statistic


@pytest.mark.parametrize("mode", ["fwd_bdw", ""])
@pytest.mark.parametrize("op", plan.BENCHMARKS)
def test_a_mode_that_there_is_not_has_no_work(op: str, mode: str) -> None:
    benchmark = plan.BENCHMARKS[op]
    for formula in (benchmark.work, benchmark.eager_work):
        with pytest.raises(KeyError):
            formula(benchmark.tiny_shape, 2, mode)


def test_flops_by_hand() -> None:
    assert work.gated_residual((3, 5), 2, "fwd_bwd").vector_flops == 15 * (2 + 3)
    assert work.gated_residual_norm((3, 5), 2, "fwd").vector_flops == 15 * (2 + 7)


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Without the copies that an expanded tensor only seems to have."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride != 0)


class _CountBytes(TorchDispatchMode):
    """Bytes that kernels read and write when each touches every tensor once; views touch none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            # The tensors that `cat` puts together are in a list.
            tensors = pytree.tree_leaves((args, results))
            self.bytes += sum(_distinct_bytes(t) for t in tensors if isinstance(t, torch.Tensor))
        return results


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
# RMSNorm is one kernel on a GPU only; elsewhere PyTorch composes it.
@pytest.mark.parametrize(
    ("op", "shape", "tolerance"),
    [
        ("gated_residual", (256, 512), 0.01),
        ("gated_residual_layer_norm", (256, 512), 0.01),
        ("layer_norm", (256, 512), 0.01),
        ("squared_relu", (256, 512), 0.01),
        # Masks and copies of gradients, which the formula leaves out; one sample needs no others.
        ("masked_cross_attention", (1, 1024, 2, 8, 64, 64), 0.02),
        ("masked_cross_attention_all_previous", (1, 1024, 2, 8, 64, 64), 0.02),
        ("masked_cross_attention_idefics", (1, 512, 2, 16, 64, 64), 0.02),
        ("masked_cross_attention_mllama", (1, 256, 1, 16, 4, 64, 2, 64), 0.02),
        ("latent_attention", (1, 64, 1024, 8, 8, 64, 1024), 0.02),
        ("latent_attention", (1, 64, 1024, 8, 2, 64, 1024), 0.02),
    ],
)
def test_eager_bytes_are_those_of_pytorchs_kernels(
    op: str, shape: tuple[int, ...], tolerance: float, mode: str
) -> None:
    case = Case(plan.BENCHMARKS[op], shape, "fp32", CPU)
    benchmark, inputs = case.benchmark, case.inputs.values()
    leaves = [value for value in inputs if isinstance(value, torch.Tensor)]
    eager = benchmark.build_eager(case, False)
    with _CountBytes() as forward:
        outputs = eager(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.empty_like(out) for out in outputs]
    with _CountBytes() as backward:
        torch.autograd.grad(outputs, leaves, douts)
    counted = forward.bytes if mode == "fwd" else backward.bytes
    assert benchmark.eager_work(shape, 4, mode).bytes == pytest.approx(counted, rel=tolerance)


def test_predicted_time_by_hand() -> None:
    h100 = next(gpu for gpu in roofline.GPUS if gpu.name == "H100")
    memory_bound = work.gated_residual((2048, 4096), 2, "fwd")
    assert roofline.predicted_us(memory_bound, "bf16", h100) == pytest.approx(15.02, abs=0.01)
    compute_bound = work.Work(1, 1, 0, matmul_flops=989 * 10**12)
    assert roofline.predicted_us(compute_bound, "bf16", h100) == pytest.approx(1e6)


@pytest.mark.parametrize(
    "op", ["GatedCrossAttentionBlock", "GatedCrossAttentionBlock_decode", "PerceiverResampler"]
)
def test_the_floor_is_the_products_of_the_module(op: str) -> None:
    """Those that ours does, in FLOPs; of the resampler's first layer ours does latents once."""
    case = Case(plan.BENCHMARKS[op], small_shape(plan.BENCHMARKS[op]), "fp32", CPU)
    counts = {}
    for name in ("ours", "floor"):
        function = attention_provider(name, case, "fwd")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            case.call(function, "fwd")()
        flops = counter.get_flop_counts()["Global"]
        counts[name] = sum(flops.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert counts["ours"] <= counts["floor"] * 1.001
    if op != "PerceiverResampler":
        assert counts["ours"] == counts["floor"] > 0


# Work of the attention benchmarks


def _layouts_with_heads() -> dict[str, tuple[MediaLayout, int, int, bool]]:
    """Layout, query and key heads, whether tokens without a medium attend to everything."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 9, 4, generator=generator) < 0.3
    lengths = torch.tensor([5, 0, 3, 7, 1, 5, 5, 2])
    return {
        "holes": (MediaLayout.from_media_mask(mask, media_seqlens=lengths), 2, 2, False),
        "dense": (MediaLayout.from_media_mask(mask, media_seqlens=lengths), 4, 2, True),
        "all_previous": (
            attention.media_layout((2, 9, 4, 1, 1, 1), CPU, attend="all_previous"),
            *(2, 1, False),
        ),
        "packed": (pairs.packed_layout((4, 16), CPU), 2, 2, False),
        "unequal": (
            MediaLayout.from_media_locations(torch.eye(3, 7).bool(), [2, 0, 3]),
            *(2, 2, False),
        ),
    }


@pytest.mark.parametrize("name", ["holes", "dense", "all_previous", "packed", "unequal"])
def test_useful_work_counted_one_by_one(name: str) -> None:
    layout, heads, kv_heads, dense = _layouts_with_heads()[name]
    num_keys, head_dim, itemsize = 6, 16, 2
    cu_media = layout.cu_media.tolist()
    lengths = [num_keys] * layout.media_total
    if layout.media_seqlens is not None:
        lengths = [min(length, num_keys) for length in layout.media_seqlens.tolist()]
    scores, read = 0, set()
    for sample, row in enumerate(layout.to_mask().tolist()):
        first, last = cu_media[sample : sample + 2]
        for attended in row:
            keys = {
                (first + medium, key)
                for medium, attends in enumerate(attended)
                if attends
                for key in range(lengths[first + medium])
            }
            if dense and not keys:
                keys = set(itertools.product(range(first, last), range(num_keys)))
            read |= keys
            scores += len(keys) * heads
    row_bytes = layout.media_start.numel() * heads * head_dim * itemsize
    key_bytes = 2 * kv_heads * head_dim * itemsize
    read_bytes, all_bytes = len(read) * key_bytes, layout.media_total * num_keys * key_bytes
    lse = layout.media_start.numel() * heads * 4
    for mode, loaded, stored, products in (
        ("fwd", row_bytes + read_bytes, row_bytes, 2),
        ("bwd", 2 * row_bytes + read_bytes + lse, row_bytes + all_bytes, 5),
        (
            *("fwd_bwd", 3 * row_bytes + 2 * read_bytes + lse),
            *(2 * row_bytes + all_bytes + lse, 7),
        ),
    ):
        found = several_media_work.attention_of_layout(
            layout, heads, kv_heads, head_dim, num_keys, itemsize, mode, dense=dense
        )
        assert (found.loaded, found.stored) == (loaded, stored), mode
        assert found.matmul_flops == products * 2 * scores * head_dim, mode


def test_useful_work_of_one_medium_a_token_is_that_formula() -> None:
    shape = (2, 12, 3, 2, 16, 8)
    locations = torch.zeros(2, 12, dtype=torch.bool)
    locations[:, [0, 5, 8]] = True
    layout = MediaLayout.from_media_locations(locations, 3)
    for mode in ("fwd", "fwd_lse", "bwd", "fwd_bwd"):
        found = several_media_work.attention_of_layout(layout, 2, 2, 16, 8, 2, mode)
        assert found == work.masked_cross_attention(shape, 2, mode)


@pytest.mark.parametrize("shortest", [3, 9])
def test_useful_work_of_latents_is_that_of_a_layout(shortest: int) -> None:
    """Of one medium a sample, whose keys are the valid features and the latents."""
    shape = (4, 5, 9, 4, 2, 16, shortest)
    lengths = latent.media_seqlens(shape)
    assert lengths is None or (lengths.tolist(), shortest) == ([9, 7, 5, 3], 3)
    start = torch.zeros(4, 5, dtype=torch.int64)
    valid = None if lengths is None else lengths + 5
    layout = MediaLayout.from_intervals(start, start + 1, 1, 1, media_seqlens=valid)
    for mode in ("fwd", "fwd_lse", "bwd", "fwd_bwd"):
        expected = several_media_work.attention_of_layout(layout, 4, 2, 16, 14, 2, mode)
        assert latent.attention_work(shape, 2, mode) == expected


def test_useful_work_grows_with_attended_media() -> None:
    """In proportion where all before are attended to; with a sparse mask it stays."""
    few, many = ((1, 2048, media, 8, 64, 64) for media in (8, 64))
    ratios = []
    for op in (several_media.ALL_PREVIOUS, several_media.SPARSE):
        flops = [plan.BENCHMARKS[op].work(shape, 2, "fwd").matmul_flops for shape in (few, many)]
        ratios.append(flops[1] / flops[0])
    assert ratios[0] > 6
    assert ratios[1] < 1.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's allocations")
def test_peak_memory_counts_what_lives_at_once() -> None:
    kilobyte = torch.ones(256)

    def call() -> tuple[torch.Tensor, ...]:
        first = kilobyte.neg()
        second = first.neg()
        del first
        return (second.neg(),)

    assert bench_run.peak_bytes(call, CPU) == 2048


def test_saved_memory_is_what_is_kept_beside_the_inputs() -> None:
    case = registry.Case(plan.BENCHMARKS["squared_relu"], (4, 64), "fp32", CPU)
    assert bench_run.saved_bytes(case, lambda x: x.relu().square()) == 4 * 64 * 4
    assert bench_run.saved_bytes(case, case.benchmark.ours) == 0


def test_a_layout_is_an_input() -> None:
    benchmark = plan.BENCHMARKS["masked_cross_attention"]
    case = registry.Case(benchmark, benchmark.tiny_shape, "fp32", CPU)

    def keeps_the_layout(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        return q * layout.media_end[:, :, None, None]

    assert bench_run.saved_bytes(case, keeps_the_layout) == 0


def test_every_dtype_has_a_peak() -> None:
    for gpu in roofline.GPUS:
        assert set(gpu.matmul) == set(DTYPES)
