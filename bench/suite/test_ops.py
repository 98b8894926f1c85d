"""What `flamingo-fast bench` times, for `pytest bench/suite --benchmark-only`."""

import functools

import pytest
import torch

from flamingo_fast.bench import records
from flamingo_fast.bench.correctness import is_only_rounding, problems
from flamingo_fast.bench.plan import BASELINE, BENCHMARKS, make_plan
from flamingo_fast.bench.registry import Benchmark, Case, Provider, Shape, Unavailable, shape_name

PLANS = (make_plan(), make_plan(growth=True))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Cases vary slowest, so each is made once. Some shapes of growth are among the others.
PARAMETERS = {
    f"{benchmark.name}-{shape_name(shape)}-{dtype}-{mode}-{provider.name}": (
        benchmark,
        shape,
        dtype,
        mode,
        provider,
    )
    for plan in PLANS
    for benchmark, shape, dtype in plan.cases
    for mode in plan.modes
    for provider in benchmark.providers
    if provider.name in plan.providers
}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> None:
    records.set_threads()


@functools.lru_cache(maxsize=1)
def _case(name: str, shape: Shape, dtype: str) -> Case:
    return Case(BENCHMARKS[name], shape, dtype, DEVICE)


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "mode", "provider"), PARAMETERS.values(), ids=PARAMETERS
)
def test_op(
    benchmark, op: Benchmark, shape: Shape, dtype: str, mode: str, provider: Provider
) -> None:
    case = _case(op.name, shape, dtype)
    try:
        function = provider.build(case, mode)
    except Unavailable as reason:
        pytest.skip(str(reason))
    if found := problems(case, function, mode):
        assert provider.name == BASELINE and is_only_rounding(case, function, mode), found
    call = case.call(function, mode)

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {mode}"
    benchmark.extra_info["useful_bytes"] = case.work(mode).bytes
    benchmark(run)
