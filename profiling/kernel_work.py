"""Bytes and operations of each kernel launch, in closed form, and of all of a benchmark's case."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flamingo_fast.bench.registry import Case
from flamingo_fast.kernels.launch import Target, target_of
from flamingo_fast.profiling import attention_work, rowwise_work
from flamingo_fast.profiling.launches import Call, calls_of, launches_of
from flamingo_fast.profiling.rowwise_work import LaunchWork
from flamingo_fast.testing.occupancy import ARCHITECTURES

# A new kernel needs a formula here.
FORMULAS: dict[str, Callable[[Call], LaunchWork]] = {
    "_squared_relu_fwd_kernel": rowwise_work.squared_relu_fwd,
    "_squared_relu_bwd_kernel": rowwise_work.squared_relu_bwd,
    "_gated_residual_fwd_kernel": rowwise_work.gated_residual_fwd,
    "_gated_residual_bwd_kernel": rowwise_work.gated_residual_bwd,
    "_norm_fwd_kernel": rowwise_work.norm_fwd,
    "_norm_bwd_kernel": rowwise_work.norm_bwd,
    "_norm_bwd_columns_kernel": rowwise_work.norm_bwd_columns,
    "_sum_partials_kernel": rowwise_work.sum_partials,
    "_one_medium_fwd_kernel": attention_work.one_medium_fwd,
    "_one_medium_bwd_kernel": attention_work.one_medium_bwd,
    "_sum_split_media_kernel": attention_work.sum_split_media,
    "_several_media_fwd_kernel": attention_work.several_media_fwd,
    "_several_media_dq_kernel": attention_work.several_media_dq,
    "_several_media_dkv_kernel": attention_work.several_media_dkv,
    "_combine_splits_kernel": attention_work.combine_splits,
    "_latent_fwd_kernel": attention_work.latent_fwd,
    "_latent_bwd_kernel": attention_work.latent_bwd,
    "_latent_dkv_kernel": attention_work.latent_dkv,
    "_sum_splits_kernel": attention_work.sum_splits,
}


def work_of_call(call: Call) -> LaunchWork:
    """What one launch does.

    Raises:
        KeyError: a kernel without a formula, by name.
    """
    return FORMULAS[call.kernel](call)


def work_of_calls(calls: Iterable[Call], dtype: str) -> list[dict[str, Any]]:
    """Useful work by kernel, in the order of their first calls.

    A kernel's dict: its name, "calls", "dtype", and of all calls together "bytes", "vector_flops"
    and "matmul_flops".
    """
    by_kernel: dict[str, dict[str, Any]] = {}
    for call in calls:
        useful = work_of_call(call).useful
        empty = {"kernel": call.kernel, "calls": 0, "dtype": dtype}
        empty |= {"bytes": 0, "vector_flops": 0, "matmul_flops": 0}
        total = by_kernel.setdefault(call.kernel, empty)
        total["calls"] += 1
        for name in ("bytes", "vector_flops", "matmul_flops"):
            total[name] += getattr(useful, name)
    return list(by_kernel.values())


def work_of_case(case: Case, mode: str, target: Target | None = None) -> list[dict[str, Any]]:
    """What our kernels do in one call of a case: see `work_of_calls`. Nothing runs.

    Arguments:
        mode: "fwd" or "fwd_bwd".
        target: what launches are configured for; by default the case's GPU, and on a CPU an H100.

    Returns:
        [] for an op that has no kernel of ours.
    """
    if target is None:
        target = Target("sm_90", ARCHITECTURES["sm_90"].num_sms)
        if case.device.type == "cuda":
            tensors = (each for each in case.inputs.values() if isinstance(each, torch.Tensor))
            target = target_of(next(tensors))
    launches = launches_of(case.benchmark, case.shape, case.dtype, mode, target)
    return work_of_calls(calls_of(launches), case.dtype)
