"""The three-way rule: ours and same-precision eager PyTorch, both against an fp64 oracle."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

# Mean error towards or away from zero, in units in the last place, that rounding to nearest never
# reaches on many elements; truncation has -0.5.
_MAX_DRIFT_ULP = 0.2
_ENOUGH_FOR_DRIFT = 256
# Of the largest element. Where a CPU's BLAS has one order of terms in a forward, another in its
# backward, the worst of many elements, also of PyTorch's own flash kernel, comes to about 10.
_MAX_FP32_ROUNDINGS = 16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of one tensor against its oracle, absolute; the limits are what ours may reach."""

    name: str
    max_error: float
    max_limit: float
    rms_error: float
    rms_limit: float
    drift_ulp: float
    finite: bool

    @property
    def ok(self) -> bool:
        return self.is_close and abs(self.drift_ulp) <= _MAX_DRIFT_ULP

    @property
    def is_close(self) -> bool:
        """Drift aside: the gradients of many layers in bf16 all have that of the same sum."""
        return self.finite and self.max_error <= self.max_limit and self.rms_error <= self.rms_limit

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.max_error:.3g} (limit {self.max_limit:.3g}), "
            f"RMS {self.rms_error:.3g} (limit {self.rms_limit:.3g}), "
            f"drift {self.drift_ulp:+.2f} ulp (limit {_MAX_DRIFT_ULP}), "
            f"{'finite' if self.finite else 'NOT FINITE'}"
        )


def _drift_ulp(ours: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype) -> float:
    """Mean error away from zero, in ulps clipped to 2; 0 if too few elements can tell."""
    countable = oracle.abs() > torch.finfo(dtype).tiny
    if dtype in (torch.float32, torch.float64) or countable.sum() < _ENOUGH_FOR_DRIFT:
        return 0.0
    ours, oracle = ours[countable], oracle[countable]
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(oracle.abs())))
    drift = ((ours - oracle) * oracle.sign() / ulp).clamp(-2, 2).mean()
    return drift.item()


def compare(
    name: str,
    ours: torch.Tensor,
    eager: torch.Tensor,
    oracle: torch.Tensor,
    scale: float | None = None,
) -> Comparison:
    """Measures `ours` and `eager` against `oracle`; shapes must agree.

    The limit is 2 * (eager's error + a rounding band). The band is one machine epsilon of ours'
    dtype times `scale`, by default the largest (for RMS: the RMS) value of the oracle. A single
    sum whose terms cancel needs a scale of its own: eager may be right by luck. So may its largest
    error be small in fp32: a single element may have `_MAX_FP32_ROUNDINGS`, all together not.
    """
    if eager.dtype != ours.dtype:
        raise AssertionError(f"{name}: ours is {ours.dtype}, eager {eager.dtype}")
    for other, tensor in (("eager", eager), ("oracle", oracle)):
        if tensor.shape != ours.shape:
            raise AssertionError(
                f"{name}: ours has shape {tuple(ours.shape)}, {other} {tuple(tensor.shape)}"
            )
    dtype = ours.dtype
    eps = torch.finfo(dtype).eps
    ours, eager, oracle = (tensor.detach().double() for tensor in (ours, eager, oracle))
    if ours.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, True)

    def rms(tensor: torch.Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    largest = oracle.abs().max().item()
    max_limit = 2 * ((eager - oracle).abs().max().item() + eps * (scale or largest))
    if dtype == torch.float32:
        max_limit = max(max_limit, _MAX_FP32_ROUNDINGS * eps * largest)
    return Comparison(
        name,
        max_error=(ours - oracle).abs().max().item(),
        max_limit=max_limit,
        rms_error=rms(ours - oracle),
        rms_limit=2 * (rms(eager - oracle) + eps * (scale or rms(oracle))),
        drift_ulp=_drift_ulp(ours, oracle, dtype),
        finite=bool(ours.isfinite().all()),
    )


def assert_close_to_oracle(
    ours: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    oracle: Mapping[str, torch.Tensor],
    scales: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """The three-way rule for every named tensor; returns the measurements.

    Arguments:
        scales: of tensors whose rounding band does not follow from their size; see `compare`.

    Raises:
        AssertionError: names every tensor that fails, with its errors and limits.
    """
    if not ours.keys() == eager.keys() == oracle.keys():
        raise AssertionError(
            f"different tensors: ours {list(ours)}, eager {list(eager)}, oracle {list(oracle)}"
        )
    scales = scales or {}
    comparisons = [
        compare(name, ours[name], eager[name], oracle[name], scales.get(name)) for name in ours
    ]
    failed = [comparison for comparison in comparisons if not comparison.ok]
    if failed:
        raise AssertionError("\n".join(["not close to the oracle:", *map(str, failed)]))
    return comparisons


def assert_relative_error(
    name: str, ours: torch.Tensor, oracle: torch.Tensor, limit: float
) -> None:
    """Every element within `limit` of a nonzero oracle, relatively: for functions that may cancel.

    Raises:
        AssertionError: names the worst element.
    """
    error = (ours.double() / oracle.double() - 1).abs().nan_to_num(nan=float("inf"))
    worst = int(error.argmax())
    if error.flatten()[worst] > limit:
        raise AssertionError(
            f"{name}: relative error {error.flatten()[worst]:.3g} (limit {limit:.3g}) at element "
            f"{worst}: {ours.flatten()[worst]:.9g} instead of {oracle.flatten()[worst]:.9g}"
        )


def outputs_and_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Mapping[str, torch.Tensor | None],
    output_names: Sequence[str],
    output_gradients: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Runs function(*inputs) and its backward; all outputs and gradients by name.

    Arguments:
        inputs: None and tensors without requires_grad get no gradient; strides are kept.
        output_gradients: one an output, as fp64; None for an output that is not used.
        dtype: what to convert inputs to first (fp64 for an oracle); None leaves them.
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None:
            leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            leaves[name] = leaf.requires_grad_(tensor.requires_grad)
    outputs = function(*(leaves.get(name) for name in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, output_gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    differentiable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(
        [output for output, _ in used],
        list(differentiable.values()),
        [gradient for _, gradient in used],
        allow_unused=True,
    )
    result = {name: output.detach() for name, output in zip(output_names, outputs, strict=True)}
    for (name, leaf), gradient in zip(differentiable.items(), gradients, strict=True):
        result[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return result
