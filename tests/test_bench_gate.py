"""The benchmark's gate: what is wrong gets no number, and peers' providers are right."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import ATTENTION, CPU, attention_provider, bench, rows_of, small_shape

import flamingo_fast
from flamingo_fast.bench import attention, latent, pairs, plan, registry, several_media
from flamingo_fast.bench.correctness import disagreements, problems
from flamingo_fast.bench.registry import MODES, Benchmark, Case, Unavailable, plain
from flamingo_fast.testing import peers

# Gate


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", plan.BENCHMARKS.values(), ids=lambda b: b.name)
def test_eager_and_ours_pass_the_gate(op: Benchmark, dtype: str) -> None:
    case = Case(op, small_shape(op), dtype, CPU)
    for mode in MODES:
        assert problems(case, op.build_eager(case, False), mode) == []
        assert problems(case, op.ours, mode) == []


def wrong_value(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, 1.1 * y, gate)


def wrong_row(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    last = torch.arange(x.shape[0])[:, None] == x.shape[0] - 1
    return flamingo_fast.gated_residual(x, y.masked_fill(last, 0), gate)


def wrong_gradient(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate) + 0 * y.detach() + 0.1 * (gate - gate.detach())


def not_finite(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate) / torch.zeros(())


def wrong_dtype(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return flamingo_fast.gated_residual(x, y, gate).double()


def raising(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no reason")


@pytest.mark.parametrize(
    ("function", "mode", "problem"),
    [
        (wrong_value, "fwd", "out: RMS error"),
        (wrong_row, "fwd", "out: largest error"),
        (wrong_gradient, "fwd_bwd", "dgate: RMS error"),
        (not_finite, "fwd", "out: not finite"),
        (wrong_dtype, "fwd", "out: (4096, 64) torch.float64, expected (4096, 64) torch.bfloat16"),
        (raising, "fwd", "ZeroDivisionError: no reason"),
    ],
)
def test_the_gate_catches(function: Callable[..., Any], mode: str, problem: str) -> None:
    case = Case(plan.BENCHMARKS["gated_residual"], (4096, 64), "bf16", CPU)
    found = problems(case, function, mode)
    assert len(found) == 1 and found[0].startswith(problem)


def test_a_missing_output_is_caught() -> None:
    case = Case(plan.BENCHMARKS["gated_residual_rms_norm"], (4, 64), "fp32", CPU)
    found = problems(case, lambda *inputs: case.benchmark.ours(*inputs)[0], "fwd")
    assert found == ["ValueError: 1 tensors, expected residual, normed"]


def test_the_gate_leaves_its_inputs_alone() -> None:
    # dx is the incoming gradient itself, which must survive being compared.
    case = Case(plan.BENCHMARKS["gated_residual"], (4, 64), "fp32", CPU)
    call = case.call(case.benchmark.build_eager(case, False), "fwd_bwd")
    before = case.named(call())["dx"].clone()
    assert not disagreements(case.named(call()), case.expected)
    assert torch.equal(case.named(call())["dx"], before)


def replace_benchmark(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    wrong = dataclasses.replace(plan.BENCHMARKS["gated_residual"], **changes)
    monkeypatch.setattr(plan, "BENCHMARKS", {"gated_residual": wrong})


def wrong_unless_reference(*inputs: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    if impl == "reference":
        return flamingo_fast.gated_residual(*inputs, impl=impl)
    return wrong_value(*inputs)


def test_a_wrong_provider_gets_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_benchmark(monkeypatch, ours=wrong_unless_reference)
    result = bench("--quick", "--shape", "16x64", "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "FAILED: gated_residual 16x64 bf16 fwd, ours: out: RMS error" in result.output
    assert "## Failed" in (tmp_path / "report.md").read_text()
    providers = {r["provider"] for r in rows_of(tmp_path / "results.csv")}
    assert providers == {"torch", "eager"}


def test_nothing_is_compared_to_a_wrong_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_benchmark(monkeypatch, build_eager=plain(wrong_value))
    result = bench("--quick", "--shape", "16x64", "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert {r["provider"] for r in rows_of(tmp_path / "results.csv")} == {"torch"}
    assert not (tmp_path / "ops.png").exists()


def rounds_badly(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return wrong_value(x, y, gate) if x.dtype == torch.bfloat16 else x + gate.tanh() * y


def test_a_baseline_that_only_rounds_badly_is_measured_and_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_benchmark(monkeypatch, build_eager=plain(rounds_badly))
    args = ("--quick", "--shape", "16x64", "--mode", "fwd", "--dtype", "bf16")
    result = bench(*args, "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "Note: gated_residual 16x64 bf16 fwd, eager: out: RMS error" in result.output
    assert {r["provider"] for r in rows_of(tmp_path / "results.csv")} == {"torch", "eager", "ours"}


def test_running_out_of_memory_is_a_failure_without_a_traceback(tmp_path: Path) -> None:
    shape = "1000000000x1000000"
    args = ("--op", "squared_relu", "--quick", "--shape", shape, "--dtype", "fp32")
    result = bench(*args, "--mode", "fwd", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"FAILED: squared_relu {shape} fp32: " in result.output


@pytest.mark.parametrize(
    ("op", "shape", "provider"),
    [
        *(
            ("", shape, provider)
            for shape in ((2, 300, 3, 2, 16, 8), (1, 1, 5, 2, 16, 8))
            for provider in ("sdpa", "open_flamingo")
        ),
        ("_all_previous", (2, 300, 3, 2, 16, 8), "sdpa"),
        *(("_all_previous", (1, 1, 5, 2, 16, 8), name) for name in ("eager", "ours", "sdpa")),
        *((f"_{name}", (2, 50, 8, 2, 24, 8), "sdpa") for name in ("idefics", "random", "sparse")),
        ("_mllama", (2, 300, 3, 4, 2, 16, 2, 8), "sdpa"),
        *(("_mllama", (1, 1, 1, 4, 2, 16, 4, 5), name) for name in ("eager", "ours", "sdpa")),
        *(("_pairs", (5, 32, 2, 16, 8), provider) for provider in ("sdpa", "ours_padded")),
        *(("_pairs_layer", (5, 32, 2, 16, 8, 24), name) for name in ("eager", "sdpa")),
        ("_pairs_layer", (5, 32, 2, 16, 8, 24), "ours_padded"),
    ],
)
def test_attention_providers_pass_the_gate(op: str, shape: tuple[int, ...], provider: str) -> None:
    case = Case(plan.BENCHMARKS[ATTENTION.name + op], shape, "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider(provider, case, mode), mode) == []


@pytest.mark.parametrize(
    "op",
    [latent.NAME, *(ATTENTION.name + variant for variant in ("", "_even", "_idefics", "_pairs"))],
)
def test_libraries_that_need_a_gpu_say_so(op: str) -> None:
    benchmark = plan.BENCHMARKS[op]
    case = Case(benchmark, benchmark.tiny_shape, "bf16", CPU)
    for library in ("varlen", "flash_attn", "xformers"):
        with pytest.raises(Unavailable, match="its kernels need a GPU"):
            attention_provider(library, case, "fwd")


@pytest.mark.parametrize("shortest", [9, 20])
def test_sdpa_of_latents_passes_the_gate(shortest: int) -> None:
    case = Case(plan.BENCHMARKS[latent.NAME], (3, 6, 20, 4, 2, 16, shortest), "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider("sdpa", case, mode), mode) == []


@pytest.mark.parametrize("op", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
def test_flamingo_pytorch_passes_the_gate(op: str) -> None:
    case = Case(plan.BENCHMARKS[op], (2, 12, 3, 16, 16), "fp32", CPU)
    for mode in MODES:
        assert problems(case, attention_provider("flamingo_pytorch", case, mode), mode) == []
    case = Case(plan.BENCHMARKS[op], (2, 12, 3, 16, 24), "fp32", CPU)
    with pytest.raises(Unavailable, match="as wide as its text"):
        attention_provider("flamingo_pytorch", case, "fwd")


def test_the_gate_compares_the_tokens_of_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(plan.BENCHMARKS[pairs.NAME], (5, 64, 2, 16, 8), "fp32", CPU)
    padded = attention_provider("ours_padded", case, "fwd_bwd")
    with_next_image = dataclasses.replace(
        padded, function=lambda q, k, v, layout: padded.function(q, k, v.roll(1, 0), layout)
    )
    found = problems(case, with_next_image, "fwd_bwd")
    assert [line.partition(":")[0] for line in found] == ["out", "dq", "dk", "dv"]
    # Compiled it is the function inside, not what is around it.
    monkeypatch.setattr(registry, "require_inductor", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = attention_provider("compile", case, "fwd_bwd")
    assert problems(case, compiled, "fwd_bwd") == []


# Layouts of the attention benchmarks


def test_mllama_masks_are_those_of_its_processor() -> None:
    pytest.importorskip("transformers")
    for media in (1, 3):
        mask = several_media.tile_mask((2, 40, media, 1, 1, 1, 4, 1))
        ids = torch.zeros(2, 40, dtype=torch.int64)
        ids[:, mask[0, :, :, 0].argmax(0)] = 7
        theirs = peers.mllama_cross_attention_mask(ids.tolist(), 7, [[4] * media] * 2)
        assert torch.equal(mask, theirs)
        last = several_media.tile_mask((2, 1, media, 1, 1, 1, 4, 1))
        assert torch.equal(last, theirs[:, -1:])
    layout = several_media.mllama_layout((1, 40, 1, 1, 1, 1, 4, 5), CPU)
    assert layout.attends()[0].tolist() == [False] + 39 * [True]
    assert layout.media_seqlens.tolist() == [20]


def test_idefics_masks_are_those_of_its_processor() -> None:
    pytest.importorskip("transformers")
    mask = several_media.one_hot_mask((3, 90, 8))
    counts = mask.sum(2)
    # There is text before the first image, and between the end of a document and the next image.
    assert counts.unique().tolist() == [0, 1]
    assert (counts.diff(dim=1) < 0).any() and (counts.diff(dim=1) > 0).sum() > 3
    ids = torch.zeros(3, 90, dtype=torch.int64)
    ids[:, :-1][counts.diff(dim=1) < 0] = 2
    ids.scatter_(1, mask.int().argmax(1), 7)
    assert torch.equal(mask, peers.idefics_image_attention_mask(ids, 7, 2, 8).bool())


def test_masks_with_holes() -> None:
    shape = (2, 512, 8)
    random = several_media.random_mask(shape)
    assert random.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (random[:, 1:] == random[:, :-1]).float().mean() == pytest.approx(0.5, abs=0.02)
    sparse = several_media.sparse_mask((*shape, 1, 1, 1))
    last = attention.media_layout((*shape, 1, 1, 1), CPU).media_end
    for sample, token in itertools.product(range(2), range(0, 512, 7)):
        attended = sparse[sample, token].nonzero().flatten().tolist()
        count = int(last[sample, token])
        assert attended == sorted({0, count - 1} if count else ())


@pytest.mark.parametrize(("longest", "mean"), [(64, 20.5), (32, 12.4)])
def test_lengths_of_pairs(longest: int, mean: float) -> None:
    """Geometric, before what is longer is cut off."""
    lengths = pairs.text_lengths((512, longest))
    cut_mean = sum((1 - 1 / mean) ** count for count in range(longest))
    assert lengths.double().mean() == pytest.approx(cut_mean, rel=0.01)
    assert cut_mean == pytest.approx(mean, rel=0.1)
    assert (lengths.min(), lengths.max()) == (1, longest)
    of_the_longest = float((lengths == longest).double().mean())
    assert of_the_longest == pytest.approx((1 - 1 / mean) ** (longest - 1), abs=0.01)
    assert lengths.median() == pytest.approx(mean * math.log(2), abs=1)
    assert torch.equal(lengths, pairs.text_lengths((512, longest)))
    assert not torch.equal(lengths, lengths.sort().values)


def test_pairs_are_packed_and_padded() -> None:
    shape = (6, 32, 1, 16, 4)
    lengths = pairs.text_lengths(shape)
    packed, padded = pairs.packed_layout(shape, CPU), pairs.padded_layout(shape, CPU)
    expected = torch.arange(6).repeat_interleave(lengths)
    assert torch.equal(packed.media_start[0].long(), expected)
    assert torch.equal(packed.media_end[0].long(), expected + 1)
    assert (padded.media_start.shape, padded.max_media_per_token) == ((6, 32), 1)
    assert padded.attends().all()


def test_flex_attention_has_the_right_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: that takes seconds, and a compiler."""
    case = Case(ATTENTION, (2, 150, 3, 2, 16, 8), "fp32", CPU)
    monkeypatch.setattr(attention, "require_inductor", lambda device: None)
    with pytest.raises(Unavailable, match="no backward on a CPU"):
        attention_provider("flex_attention", case, "fwd_bwd")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    function = attention_provider("flex_attention", case, "fwd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert problems(case, function, "fwd") == []


@pytest.mark.parametrize("positions", ["random", "even"])
def test_the_blocked_reference_is_the_reference(positions: str) -> None:
    """300 tokens are two blocks, and a medium lies in both."""
    shape = (2, 300, 3, 2, 16, 8)
    layout = attention.media_layout(shape, CPU, even=positions == "even")
    assert layout.media_end[0, 255] == layout.media_end[0, 256] > 0
    q = torch.randn(2, 300, 2, 16, requires_grad=True)
    k, v = (torch.randn(2, 3, 8, 2, 16, requires_grad=True) for _ in range(2))
    results = []
    for function in (ATTENTION.ours, flamingo_fast.masked_cross_attention):
        out = function(q, k, v, layout, impl="reference")
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for blocked, whole in zip(*results, strict=True):
        torch.testing.assert_close(blocked, whole)


def test_dense_scores_too_many_for_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(ATTENTION, (1, 16, 2, 1, 16, 8), "fp32", CPU)
    monkeypatch.setattr(attention, "num_scores", lambda case: 8192 * 8192 * 16)
    for provider in ("eager", "compile", "sdpa", "open_flamingo"):
        with pytest.raises(Unavailable, match="1.1e\\+09 scores of all tokens and keys"):
            attention_provider(provider, case, "fwd")
    assert callable(attention_provider("ours", case, "fwd"))
