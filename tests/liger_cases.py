"""Liger's patch of Mllama before and after ours, and of the classes; a program, see its last lines.

Liger's kernels run in Triton's interpreter.
"""

import collections
import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from patch_cases import outcomes
from patch_models import FAMILIES, assert_close
from torch import nn
from triton.language.extra import libdevice
from triton.runtime import interpreter

from flamingo_fast.patching import PatchReport, patch, unpatch

MLLAMA = FAMILIES["mllama"]
LIGERS = ("LigerRMSNorm", "LigerSwiGLUMLP", "LigerLayerNorm")
calls: collections.Counter[str] = collections.Counter()


def liger() -> ModuleType:
    return importlib.import_module("liger_kernel.transformers")


def complete_interpreter() -> None:
    """It has no scalars of type float, and none of the functions of CUDA's library.

    Before Liger is imported, whose modules take these functions.
    """
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if type(value) is float:
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    interpreter._implicit_cvt = with_floats
    libdevice.rsqrt = lambda x: tl.rsqrt(x)


def count_calls(cls: type[nn.Module]) -> None:
    forward = cls.forward

    @functools.wraps(forward)
    def counted(self: nn.Module, *args: Any) -> Any:
        calls[cls.__name__] += 1
        return forward(self, *args)

    cls.forward = counted


def apply(model: nn.Module | None = None) -> None:
    liger().apply_liger_kernel_to_mllama(fused_linear_cross_entropy=False, model=model)


def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    calls.clear()
    return MLLAMA.call(model, slice(0, 1))


def check_left(report: PatchReport) -> None:
    left = {entry.rule for entry in report.left}
    assert left == {"mllama.rms_norm"}, str(report)
    for entry in report.left:
        assert entry.reason.endswith("LigerRMSNorm.forward"), entry.reason
        assert entry.name.endswith(("layernorm", "language_model.norm")), entry.name
    rules = {entry.rule for entry in report.patched}
    assert {"mllama.cross_layer", "mllama.text_model", "mllama.vision_layer"} < rules, rules


def check_order(
    model: nn.Module, first: str, expected: dict[str, torch.Tensor], counts: dict[str, int]
) -> None:
    if first == "patch":
        patch(model)
        apply(model)
        report = patch(model, dry_run=True)
    else:
        apply(model)
        report = patch(model)
    check_left(report)
    assert_close(outcomes(model, call), expected)
    assert dict(calls) == counts, (calls, counts)
    unpatch(model)
    assert torch.equal(call(model)[0], expected["logits"])


def check_classes() -> None:
    """Liger for models that are made later, whose modules are of its classes."""
    apply()
    assert nn.LayerNorm is liger().LigerLayerNorm
    model = MLLAMA.model()
    expected, counts = call(model)[0], dict(calls)
    report = patch(model)
    assert {"mllama.cross_layer", "mllama.vision_layer"} <= {each.rule for each in report.patched}
    torch.testing.assert_close(call(model)[0], expected, rtol=1e-4, atol=1e-5)
    assert dict(calls) == counts, (calls, counts)


def main() -> None:
    complete_interpreter()
    for name in LIGERS:
        count_calls(getattr(liger(), name))
    # Even with a model, Liger changes the classes of those that are made later.
    models = [MLLAMA.model() for _ in range(3)]
    apply(models[0])
    expected = outcomes(models[0], call)
    counts = dict(calls)
    assert all(counts[name] for name in LIGERS), counts
    check_order(models[1], "patch", expected, counts)
    check_order(models[2], "liger", expected, counts)
    check_classes()


if __name__ == "__main__":
    main()
