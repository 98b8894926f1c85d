"""What a launch does by formula, as counted, and how long it is predicted to take."""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import flamingo_fast as ff
import flamingo_fast.kernels
from flamingo_fast.bench import plan
from flamingo_fast.bench.registry import Case
from flamingo_fast.bench.roofline import GPUS
from flamingo_fast.bench.work import Work
from flamingo_fast.kernels.launch import INTERPRETER, Target, recording
from flamingo_fast.layout import MediaLayout
from flamingo_fast.profiling import roofline, roofline_cases
from flamingo_fast.profiling.counted import Counted, count
from flamingo_fast.profiling.kernel_work import FORMULAS, LaunchWork, work_of_call, work_of_case
from flamingo_fast.profiling.launches import calls_of, launches_of
from flamingo_fast.profiling.roofline import Prediction, Resources, Row, Waves, fill, predict
from flamingo_fast.profiling.roofline_cases import ROOFLINE_CASES, Launched, RooflineCase
from flamingo_fast.profiling.roofline_table import as_json, render
from flamingo_fast.testing.aot import PlannedCompile, Rules
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

CPU = torch.device("cpu")
H100 = Target("sm_90", 132)
FULL = {gpu.name: gpu for gpu in GPUS}["H100"]

# As many bytes as matter beside a sector, and what the interpreter does in a second.
LARGER = {
    "gated_residual": (16, 1024),
    "gated_residual_layer_norm": (16, 1024),
    "rms_norm": (16, 1024),
    "squared_relu": (16, 1024),
    "masked_cross_attention": (1, 256, 5, 1, 64, 64),
    "masked_cross_attention_pairs": (8, 64, 1, 64, 64),
    "masked_cross_attention_mllama": (1, 16, 2, 4, 2, 64, 1, 200),
    "masked_cross_attention_all_previous": (1, 128, 5, 1, 64, 64),
    "masked_cross_attention_sparse": (1, 128, 5, 1, 64, 64),
    "latent_attention": (2, 64, 200, 2, 1, 64, 100),
}


def kernels_of_the_package() -> set[str]:
    """Functions that a grid is started of: others that Triton compiles have other names."""
    path = flamingo_fast.kernels.__path__
    found = set()
    for module in pkgutil.iter_modules(path, "flamingo_fast.kernels."):
        names = vars(importlib.import_module(module.name))
        found |= {name for name in names if name.endswith("_kernel")}
    return found


def test_every_kernel_has_a_formula() -> None:
    assert kernels_of_the_package() == FORMULAS.keys()


def test_every_kernel_is_in_the_roofline() -> None:
    missing = set(FORMULAS)
    for case in ROOFLINE_CASES.values():
        if missing and case.dtype == "bf16":
            benchmark = plan.BENCHMARKS[case.op]
            launches = launches_of(benchmark, case.shape, case.dtype, "fwd_bwd", H100)
            missing -= {call.kernel for call in calls_of(launches)}
    assert not missing


def assert_counted_as_by_formula(counted: list[Counted], rel: float) -> None:
    for each in counted:
        assert each.bytes == pytest.approx(1, rel=rel), each
        assert each.flops in (1, None), each


@pytest.mark.parametrize("op", plan.BENCHMARKS)
def test_counted_at_tiny_shapes(op: str) -> None:
    """Several media: what a program loads of its sample is not in the formula; here it's much."""
    counted = count(RooflineCase(op, plan.BENCHMARKS[op].tiny_shape, "bf16"))
    several = any("several" in each.kernel for each in counted)
    assert_counted_as_by_formula(counted, rel=0.11 if several else 1e-9)


@pytest.mark.parametrize("op", LARGER)
def test_counted_where_it_matters(op: str) -> None:
    """Bytes of memory too: useful ones are all that is touched."""
    counted = count(RooflineCase(op, LARGER[op], "bf16"))
    assert_counted_as_by_formula(counted, rel=0.02)
    for each in counted:
        # The second step of a gradient of the gate's stores one number.
        if each.kernel not in ("_sum_partials_kernel", "_sum_split_media_kernel"):
            assert each.memory == pytest.approx(1, rel=0.02), each


@pytest.mark.parametrize("op", roofline_cases._MORE_SMALL_SHAPES)
def test_counted_where_other_kernels_start(op: str) -> None:
    tiny, *more = RooflineCase(op, (), "bf16").small()
    of_op = [case for case in more if case.op == op]
    assert of_op
    for case in of_op:
        counted = count(case)
        assert_counted_as_by_formula(counted, rel=0.01)
        assert {each.kernel for each in counted} - {each.kernel for each in count(tiny)}


def normal(*shape: int, wants_grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(wants_grad)


def attention(
    layout: MediaLayout, heads: int = 1, kv_heads: int = 1, frozen: str = ""
) -> Callable[[], torch.Tensor]:
    q = normal(layout.batch_size, layout.seqlen, heads, 64, wants_grad="q" not in frozen)
    keys = (layout.media_total, 64, kv_heads, 64)
    k, v = (normal(*keys, wants_grad="k" not in frozen) for _ in range(2))
    return lambda: ff.masked_cross_attention(q, k, v, layout, impl="triton")


def latent(frozen: str, lengths: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    q = normal(2, 16, 1, 32, wants_grad="q" not in frozen)
    media = [normal(2, 100, 1, 32, wants_grad="m" not in frozen) for _ in range(2)]
    latents = [normal(2, 16, 1, 32, wants_grad="l" not in frozen) for _ in range(2)]
    return lambda: ff.latent_attention(q, *media, *latents, media_seqlens=lengths, impl="triton")


def images(lengths: list[int] | None = None, seqlen: int = 128) -> MediaLayout:
    locations = torch.zeros(1, seqlen, dtype=torch.bool)
    locations[0, [5, 30, 64]] = True
    seqlens = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return MediaLayout.from_media_locations(locations, 3, media_seqlens=seqlens)


def in_any_order() -> MediaLayout:
    """Tokens go back to media, so that rows are sorted."""
    mask = torch.nn.functional.one_hot(torch.arange(96) * 7 % 3, 3).bool()[None]
    return MediaLayout.from_media_mask(mask, max_media_per_token=1)


def norm(width: int, *, vector_gate: bool = False, frozen: str = "") -> Callable[[], tuple]:
    x, y = normal(6, width, wants_grad="x" not in frozen), normal(6, width)
    gate = normal(width if vector_gate else 1)
    weight, bias = (normal(width, wants_grad="w" not in frozen) for _ in range(2))
    return lambda: ff.gated_residual_norm(x, y, gate, weight, bias, eps=1e-5, impl="triton")


OTHERS: dict[str, Callable[[], Callable[[], object]]] = {
    "frozen_queries": lambda: attention(images(), frozen="q"),
    "frozen_keys": lambda: attention(images(), frozen="k"),
    "shared_heads": lambda: attention(images(), heads=4),
    "short_media": lambda: attention(images([64, 0, 20])),
    "any_order": lambda: attention(in_any_order(), heads=4, kv_heads=2),
    "latent_frozen_queries": lambda: latent("q"),
    "latent_frozen_media": lambda: latent("m"),
    "latent_frozen_keys": lambda: latent("ml"),
    "latent_lengths": lambda: latent("", torch.tensor([100, 37])),
    "vector_gate": lambda: norm(512, vector_gate=True),
    "vector_gate_of_wide_rows": lambda: norm(4160, vector_gate=True),
    "frozen_parameters": lambda: norm(512, frozen="w"),
    "frozen_parameters_of_wide_rows": lambda: norm(4160, frozen="w"),
    "frozen_x": lambda: norm(512, frozen="x"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_formulas_of_what_no_benchmark_has(name: str) -> None:
    function = OTHERS[name]()

    def run() -> None:
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    with recording(INTERPRETER) as launches:
        run()
    with guard() as guarded:
        run()
    for call, measured in zip(calls_of(launches), guarded.launches, strict=True):
        work = work_of_call(call)
        assert call.kernel == measured.kernel
        lanes = measured.bytes_loaded + measured.bytes_stored
        assert work.executed.bytes == pytest.approx(lanes, rel=0.01), call.kernel
        assert work.executed.matmul_flops == measured.dot_flops, call.kernel
        assert work.useful.matmul_flops <= work.executed.matmul_flops
        sectors = measured.sectors_loaded + measured.sectors_stored
        assert work.useful.bytes <= 1.001 * sectors, call.kernel


def test_a_wrong_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(call: object) -> LaunchWork:
        work = right(call)
        return LaunchWork(work.useful, work.executed + work.executed)

    right: Callable[..., LaunchWork] = FORMULAS["_squared_relu_fwd_kernel"]
    monkeypatch.setitem(FORMULAS, "_squared_relu_fwd_kernel", twice)
    first, _ = count(RooflineCase("squared_relu", (1, 64), "bf16"))
    assert first.bytes == pytest.approx(0.5)


@pytest.mark.parametrize("op", ["masked_cross_attention", "masked_cross_attention_random"])
def test_layouts_have_their_values(op: str) -> None:
    """And large floats, which launches don't depend on, nobody's."""
    benchmark = plan.BENCHMARKS[op]
    shape = benchmark.quick_shape
    first, *_ = calls_of(launches_of(benchmark, shape, "fp32", "fwd", H100))
    layout = benchmark.make_inputs(shape, torch.float32, CPU)["layout"]
    if op == "masked_cross_attention":
        assert torch.equal(first["WORK_ITEMS"], layout.work_items)
    else:
        assert torch.equal(first["MEDIA_BITS"], layout.media_bits)
    assert not first["STORE_LSE"]
    assert first["Q"].shape == (shape[0], shape[1], shape[3], shape[4])


def work_of(op: str, shape: tuple[int, ...], mode: str) -> tuple[Case, dict[str, dict]]:
    case = Case(plan.BENCHMARKS[op], shape, "bf16", CPU)
    return case, {work["kernel"]: work for work in work_of_case(case, mode, H100)}


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_work_of_an_elementwise_case(mode: str) -> None:
    case, work = work_of("squared_relu", (64, 256), mode)
    assert len(work) == (1 if mode == "fwd" else 2)
    formula = case.work(mode)
    assert sum(each["bytes"] for each in work.values()) == formula.bytes
    assert sum(each["vector_flops"] for each in work.values()) == formula.vector_flops
    assert work["_squared_relu_fwd_kernel"] == {
        "kernel": "_squared_relu_fwd_kernel",
        "calls": 1,
        "dtype": "bf16",
        "bytes": 2 * 64 * 256 * 2,
        "vector_flops": 2 * 64 * 256,
        "matmul_flops": 0,
    }


def test_work_of_a_norm() -> None:
    """The registry's formula, and partial sums, written and read."""
    case, work = work_of("gated_residual_layer_norm", (64, 256), "fwd_bwd")
    # Programs of 8 rows: each has sums of weight, bias and gate.
    partials = 8 * (2 * 256 + 1) * 4
    found = sum(each["bytes"] for each in work.values())
    # The gate is loaded once more, for its gradient's second step.
    assert found == case.work("fwd_bwd").bytes + 2 * partials + 2


def test_work_of_attention() -> None:
    """The registry's formula and, for the backward, the output."""
    shape = (2, 64, 200, 4, 4, 64, 100)
    case, work = work_of("latent_attention", shape, "fwd_bwd")
    formula = case.work("fwd_bwd")
    out, lengths = 2 * 64 * 4 * 64 * 2, 2 * 2 * 4
    assert sum(each["bytes"] for each in work.values()) == formula.bytes + out + lengths
    assert sum(each["matmul_flops"] for each in work.values()) == formula.matmul_flops


def test_work_of_a_module_counts_calls() -> None:
    """A layer's two norms of latents and media, two of its feed-forward, and the last one."""
    _, work = work_of("PerceiverResampler", (1, 1, 1, 16, 16, 1), "fwd")
    assert work["_latent_fwd_kernel"]["calls"] == 1
    assert work["_norm_fwd_kernel"]["calls"] == 4


RESOURCES = Resources(registers=128, shared_bytes=48 * 1024, local_bytes=0, taken_from="compiled")


def test_waves_by_hand() -> None:
    """128 registers of 32 lanes: 4 warps in each quarter of 16384; 4 blocks of 49 of 228 KiB."""
    waves = fill("sm_90", 1040, 4, RESOURCES)
    assert (waves.blocks_per_sm, waves.warps_per_sm, waves.occupancy) == (4, 16, 0.25)
    assert waves.waves == pytest.approx(1040 / 528)
    # The busiest of 132 SMs has 8 blocks.
    assert waves.efficiency == pytest.approx(1040 / (8 * 132))


def test_waves_of_a_tail_and_of_less_than_one() -> None:
    tail = fill("sm_90", 133, 4, RESOURCES)
    assert tail.efficiency == pytest.approx(133 / 264)
    few = fill("sm_90", 33, 4, RESOURCES)
    assert (few.waves, few.efficiency) == (33 / 528, 0.25)


def test_what_does_not_fit() -> None:
    waves = fill("gfx942", 100, 4, Resources(64, 65 * 1024, 0, "compiled"))
    assert waves.blocks_per_sm == 0
    work = LaunchWork(Work(1, 1, 1), Work(1, 1, 1))
    mi300x = {gpu.name: gpu for gpu in GPUS}["MI300X"]
    assert predict(work, "bf16", mi300x, 100, waves) == Prediction(None, "does not fit", waves)


def prediction(loaded: int, vector: int, matmul: int, programs: int = 1320) -> Prediction:
    work = LaunchWork(Work(loaded, 0, 0), Work(9 * loaded, 0, vector, matmul))
    return predict(work, "bf16", FULL, programs, fill("sm_90", programs, 4, RESOURCES))


def test_bounds() -> None:
    """By hand: 3350 GB/s, 67 and 989 TFLOP/s. What caches serve costs nothing."""
    memory = prediction(335 * 10**6, 0, 0)
    assert (memory.bound, memory.us) == ("memory", pytest.approx(100))
    vector = prediction(0, 67 * 10**8, 0)
    assert (vector.bound, vector.us) == ("vector", pytest.approx(100))
    matrix = prediction(10**6, 10**6, 989 * 10**8)
    assert (matrix.bound, matrix.us) == ("matrix", pytest.approx(100))
    assert (prediction(1, 1, 1).bound, prediction(1, 1, 1).us) == ("launch", 2.0)


def test_bound_by_waves() -> None:
    """Of 132 SMs 33 have work: they do it at their own rate and draw their share of bandwidth."""
    few = prediction(335 * 10**6, 0, 0, programs=33)
    assert (few.bound, few.us) == ("waves", pytest.approx(400))
    # One block more than SMs doubles what they compute, not what they wait for.
    tail = prediction(0, 0, 989 * 10**8, programs=133)
    assert tail.us == pytest.approx(100 * 264 / 133)
    assert tail.bound == "matrix"
    assert prediction(335 * 10**6, 0, 0, programs=133).us == pytest.approx(100)


def row(us: float | None = 12.345, bound: str = "memory", op: str = "squared_relu") -> Row:
    work = LaunchWork(Work(1500, 500, 3_000_000), Work(1500, 500, 3_000_000))
    compile_plan = PlannedCompile("", "sm_90", "_squared_relu_fwd_kernel", 0, "", "", Rules())
    launched = Launched("_squared_relu_fwd_kernel", compile_plan, 10, 4, work, calls=3)
    waves = Waves(4, 16, 0.25, 0.5, 0.9)
    on = roofline.OnGpu(
        "H100", "sm_90", launched, RESOURCES, Prediction(us, bound, waves) if bound else None, "no"
    )
    counted = Counted("_squared_relu_fwd_kernel", "squared_relu/1x64/bf16", 1.0, 1.2, None)
    return Row(RooflineCase(op, (2048, 2048), "bf16"), launched.kernel, {"sm_90": on}, counted)


def test_table() -> None:
    rows = [row(), row(None, "does not fit"), row(bound=""), row(op="layer_norm")]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(rows, ("sm_90", "gfx942")))
    text = capture.get()
    assert "squared_relu_fwd x3" in text
    assert "2k" in text
    assert "3M" in text
    assert "12.3  0.50  25% memory" in text
    assert "does not fit" in text
    assert "layer_norm 2048x2048" in text
    assert "predicted, not measured" in text
    assert max(map(len, text.splitlines())) <= 200


def test_json() -> None:
    document = json.loads(json.dumps(as_json([row(), row(bound="")])))
    assert document["schema"] == 1
    first, failed = document["rows"]
    assert first["counted"]["at"] == "squared_relu/1x64/bf16"
    assert first["predicted"][0]["predicted_us"] == 12.345
    assert first["predicted"][0]["bytes"] == 2000
    assert failed["predicted"][0]["error"] == "no"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--roofline", "--target", "sm_89"], "expected some of sm_80, sm_90, sm_100, gfx942"),
        (["--roofline", "--case", "no_such"], "op/shape/dtype has 'no_such' in it"),
        (["--roofline", "--update"], "roofline: goes without --update"),
        (["--roofline", "--sass", "matmul", "sm_90"], "sass: goes without --roofline"),
    ],
)
def test_mistakes(options: list[str], message: str, command: Callable) -> None:
    code, _, err = command("kernels", *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.slow
def test_the_command(tmp_path: Path, command: Callable) -> None:
    """Of an op whose binaries goldens have, or that takes seconds to compile."""
    file = tmp_path / "roofline.json"
    options = ["--roofline", "--case", "squared_relu/8192x4096/bf16", "--json", str(file)]
    targets = ["--target", "gfx942", "--target", "sm_90"]
    code, out, _ = command("kernels", *options, *targets)
    assert code == 0 and "squared_relu_bwd" in out
    forward, backward = json.loads(file.read_text())["rows"]
    assert forward["kernel"] == "_squared_relu_fwd_kernel"
    h100, mi300x = forward["predicted"]
    assert (h100["target"], mi300x["target"]) == ("sm_90", "gfx942")
    # Two reads of 8192 x 4096 numbers and a write, at 3350 GB/s.
    moved = 8192 * 4096 * 2
    assert h100["predicted_us"] == pytest.approx(2 * moved / 3350e3)
    assert backward["predicted"][0]["predicted_us"] == pytest.approx(3 * moved / 3350e3)
    assert h100["programs"] == math.ceil(8192 * 4096 / 2048)
    assert forward["counted"]["bytes"] == 1


def test_formulas_take_what_other_targets_launch() -> None:
    """One pass or two, with and without splits, whatever the tiles."""
    benchmark = plan.BENCHMARKS["latent_attention"]
    for arch in roofline.TARGETS:
        for shape in benchmark.shapes:
            for call in calls_of(
                launches_of(benchmark, shape, "bf16", "fwd_bwd", Target(arch, 108))
            ):
                work = work_of_call(call)
                assert 0 < work.useful.bytes
                assert work.useful.matmul_flops <= work.executed.matmul_flops
