"""What `patch` must not change, checked on any model: outputs, gradients, keys, and the way back.

A case is a model in fp32 with its gates open and a `call` that takes it: it returns (logits, loss)
and makes its own inputs in the model's dtype.
"""

import copy
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_fast.patching import PatchReport, patch, unpatch
from flamingo_fast.patching.rules import rule_of
from flamingo_fast.testing.compare import assert_close_to_oracle, compare

_FEW = 32
# Of the largest gradient, in fp64.
_VANISHING = 1e-12

Call = Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]


def open_gates(model: nn.Module) -> nn.Module:
    """Gates of modules start closed, where attention has neither effect nor gradient."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "gate" in name or "alpha" in name:
            if parameter.numel() == 1 or parameter.shape[:2] == (1, 1):
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.7 * values.sign() * (values.abs() + 0.5))
    return model


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """One number in which every element counts differently, for modules without a loss."""
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    weights = torch.linspace(-1, 1, out.numel(), dtype=wide.dtype).view(out.shape)
    return (wide * weights).mean().to(out.dtype)


def outcomes(model: nn.Module, call: Call) -> dict[str, torch.Tensor]:
    """Logits, loss, and the gradients of all parameters that have one."""
    model.zero_grad(set_to_none=True)
    logits, loss = call(model)
    found = {"logits": logits.detach().clone(), "loss": loss.detach().clone()}
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d {name}"] = parameter.grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def check_parity(
    model: nn.Module,
    call: Call,
    dtype: torch.dtype = torch.float32,
    same_call: Call | None = None,
    **options: Any,
) -> PatchReport:
    """The three-way rule for logits, loss and all gradients; bit-equal after `unpatch`.

    Arguments:
        model: in the mode, train or eval, that is to be checked; it is not changed.
        same_call: what the peer is given in place of `call`, where `options` ask for another
            meaning than its own and the peer has a way to say it.
        options: of `patch`.
    """
    ours = copy.deepcopy(model).to(dtype)
    oracle = outcomes(copy.deepcopy(ours).double(), same_call or call)
    keys = list(ours.state_dict())
    before = outcomes(ours, call)
    eager = before if same_call is None else outcomes(ours, same_call)
    report = patch(ours, **options)
    assert report.patched, str(report)
    assert list(ours.state_dict()) == keys
    after = outcomes(ours, call)
    check_close(after, eager, oracle)
    unpatch(ours)
    assert_same_bits(outcomes(ours, call), before)
    return report


def check_close(
    ours: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    oracle: Mapping[str, torch.Tensor],
) -> None:
    """The three-way rule for `outcomes` of a whole model.

    Errors of one layer are in the gradients of all before it, and of hundreds of tensors eager has
    some right by luck: the relative error that 9 in 10 stay below is the rounding band of each. In
    bf16 the gradients of many layers drift with the error of one sum.
    """
    assert ours.keys() == eager.keys()
    largest = max(float(each.abs().max()) for name, each in oracle.items() if name[:2] == "d ")
    # Zero in mathematics, as what a softmax gives to its only key or to a shift of all its scores:
    # fp64 has its own rounding there, whose size says nothing of what ours may have.
    vanishing = {name for name in oracle if 0 < oracle[name].abs().max() < _VANISHING * largest}
    errors = [
        float((each.double() - oracle[name]).norm() / oracle[name].norm())
        for name, each in eager.items()
        if each.numel() > 1 and oracle[name].any() and name not in vanishing
    ]
    usual = sorted(errors)[9 * len(errors) // 10]
    failed = []
    for name, each in ours.items():
        # One number that is a sum of many terms may cancel.
        is_sum = name in vanishing or (each.numel() == 1 and name != "loss")
        # All the error of a few may be in one.
        size = oracle[name].norm() if each.numel() <= _FEW else oracle[name].abs().max()
        scale = max(usual / torch.finfo(each.dtype).eps, 1) * (largest if is_sum else float(size))
        found = compare(name, each, eager[name], oracle[name], scale)
        if not dataclasses.replace(found, drift_ulp=0.0).ok:
            failed.append(str(found))
    assert not failed, "\n".join(["not close to the oracle:", *failed])


def check_bf16_without_gradients(
    model: nn.Module, forward: Callable[[nn.Module], torch.Tensor], **options: Any
) -> None:
    """Before and after patch, and in fp64, by the rule of tolerance; `model` is left alone."""
    ours = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        eager, oracle = forward(ours), forward(copy.deepcopy(ours).double())
        patch(ours, **options)
        fast = forward(ours)
    assert_close_to_oracle({"out": fast}, {"out": eager}, {"out": oracle})


def assert_same_bits(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"not bit-equal: {different}"


def check_generation(
    model: nn.Module,
    generate: Callable[[nn.Module], torch.Tensor],
    *,
    least_tokens: int = 4,
    **options: Any,
) -> PatchReport:
    """Token by token the same before and after `patch`, in fp32, and after `unpatch`.

    Arguments:
        generate: of a model, (B, tokens) ids, the prompt's among them or not.
        least_tokens: fewer different tokens would show nothing.
    """
    model.eval()
    before = generate(model)
    assert before.unique().numel() >= least_tokens, f"only {before.unique().tolist()}"
    report = patch(model, **options)
    assert report.patched, str(report)
    after = generate(model)
    unpatch(model)
    assert torch.equal(after, before), f"{after.tolist()}\n{before.tolist()}"
    assert torch.equal(generate(model), before)
    return report


def check_saved_and_copied(model: nn.Module, call: Call, **options: Any) -> None:
    """A patched model's state dict, its copy and its pickle are those of the model."""
    model.eval()
    plain = copy.deepcopy(model)
    report = patch(model, **options)
    assert report.patched, str(report)
    with torch.no_grad():
        logits, _ = call(model)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(call(copy.deepcopy(model))[0], logits)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(call(torch.load(file, weights_only=False))[0], logits)
        torch.testing.assert_close(call(plain)[0], logits, rtol=1e-3, atol=1e-4)
    unpatch(model)


class _Draws(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.devices.add(out.device.type)
        return out


def check_probes_draw_on_the_cpu(model: nn.Module) -> None:
    """`patch` gives that generator its state back, and no other."""
    model = copy.deepcopy(model).to("meta")
    with _Draws() as draws:
        for module in model.modules():
            if (rule := rule_of(module)) is not None and rule.probes is not None:
                assert list(rule.probes(module)), rule.name
    assert draws.devices == {"cpu"}
