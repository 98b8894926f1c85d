"""The gate before timing: a provider that computes something else gets no number."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from flamingo_fast.bench.registry import Case, Floor, Function
from flamingo_fast.errors import one_line

# Of the reference's RMS and of its largest value: a few times what rounding after every step of an
# eager composition costs. A missing term or one wrong row costs far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problems(case: Case, function: Function, mode: str) -> list[str]:
    """What is wrong with the results of `function`: a line for each tensor, or what it raised."""
    if isinstance(function, Floor):
        return []
    try:
        actual = case.results(function, mode)
    # Whatever a provider throws is one more way of being wrong; the others are still measured.
    except Exception as error:
        return [one_line(error)]
    return disagreements(actual, case.expected)


def is_only_rounding(case: Case, function: Function, mode: str) -> bool:
    """Whether `function`, which has problems in a 16-bit dtype, has none in fp32.

    For the baseline alone. PyTorch's LayerNorm on a CPU adds up bf16 gradients of weight and bias
    in bf16 and is off by a quarter after 2048 rows, yet it is what users run.
    """
    if case.dtype == "fp32":
        return False
    return not problems(Case(case.benchmark, case.shape, "fp32", case.device), function, mode)


def disagreements(
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: float | None = None,
    largest: float | None = None,
) -> list[str]:
    """One line for each tensor of `actual` that is not the one of that name in `expected`.

    Arguments:
        tolerance: by default `TOLERANCE` of its dtype.
        largest: of the largest error; by default the same.
    """
    found = (
        (name, _disagreement(tensor, expected[name], tolerance, largest))
        for name, tensor in actual.items()
    )
    return [f"{name}: {line}" for name, line in found if line]


def _disagreement(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float | None,
    largest: float | None,
) -> str | None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return (
            f"{tuple(actual.shape)} {actual.dtype}, "
            f"expected {tuple(expected.shape)} {expected.dtype}"
        )
    pairs = zip(_blocks(actual.detach()), _blocks(expected), strict=True)
    errors = _norms(a - e for a, e in pairs)
    if not all(map(math.isfinite, errors)):
        return "not finite"
    if tolerance is None:
        tolerance = TOLERANCE[expected.dtype]
    # The RMS alone overlooks one wrong row of thousands, the largest alone a small bias.
    allowed = (tolerance, tolerance if largest is None else largest)
    for kind, share, error, norm in zip(
        ("RMS", "largest"), allowed, errors, _norms(_blocks(expected)), strict=True
    ):
        if error > share * norm:
            return f"{kind} error {error:.3g}, allowed {share * norm:.3g}"
    return None


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor` in fp32, in blocks that fit a cache: on a CPU new pages cost more than the sums."""
    return (block.float() for block in tensor.flatten().split(2**18))


def _norms(blocks: Iterable[torch.Tensor]) -> tuple[float, float]:
    """RMS and largest absolute value of the elements of all blocks, at least one."""
    numel, norms, largest = 0, [], []
    for block in blocks:
        numel += block.numel()
        norms.append(torch.linalg.vector_norm(block))
        largest.append(torch.linalg.vector_norm(block, ord=float("inf")))
    rms = torch.linalg.vector_norm(torch.stack(norms)) / numel**0.5
    return rms.item(), torch.stack(largest).max().item()
