"""`patch` together with what else is done to models: LoRA, hooks, compilation, copies, Liger."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from fresh_venv import ROOT
from patch_cases import assert_same_bits, outcomes
from patch_models import (
    FAMILIES,
    WRAPPED,
    Family,
    assert_close,
    patched_names,
    recompute,
)
from torch import nn

from flamingo_fast.patching import patch, unpatch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    chosen = FAMILIES[request.param]
    if not chosen.is_installed():
        pytest.skip(f"{chosen.name} is not installed")
    return chosen


def patched_model(family: Family) -> nn.Module:
    model = family.model()
    assert patch(model).patched
    return model


def add_lora(model: nn.Module, family: Family) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=list(family.projections), init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora(family: Family, first: str) -> None:
    plain = add_lora(family.model(), family)
    expected = outcomes(plain, family.call)
    if first == "patch":
        ours = add_lora(patched_model(family), family)
    else:
        ours = add_lora(family.model(), family)
        patch(ours)
    assert patched_names(ours) == patched_names(patched_model(family))
    got = outcomes(ours, family.call)
    assert all("lora_" in name for name in got if name[:2] == "d ")
    assert_close(got, expected)
    with torch.no_grad(), ours.disable_adapter():
        torch.testing.assert_close(family.call(ours)[0], family.call(family.model())[0])
    merged = ours.merge_and_unload()
    assert patched_names(merged) == patched_names(patched_model(family))
    with torch.no_grad():
        torch.testing.assert_close(family.call(merged)[0], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::flamingo_fast.patching.PatchWarning")
@pytest.mark.filterwarnings("ignore:(For backward hooks|Full backward hook):UserWarning")
def test_hooks_of_every_module_see_what_they_did_before(family: Family) -> None:
    model = family.model()
    seen: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        seen[name] = seen.get(name, 0) + 1

    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(count, name))
        module.register_full_backward_hook(functools.partial(count, f"d {name}"))
    expected = outcomes(model, family.call)
    before = dict(seen)
    seen.clear()
    patch(model)
    assert_close(outcomes(model, family.call), expected)
    assert seen == before


def _scaled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What others put on an instance, as Liger does: here it gives something else."""
    return 1.2 * type(module).forward(module, *args, **kwargs)


def _scale(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if "Norm" in type(module).__name__ or isinstance(module, (nn.Linear, nn.GELU, nn.Tanh)):
            module.forward = MethodType(_scaled, module)
    return model


@pytest.mark.parametrize("first", ["patch", "theirs"])
def test_forwards_that_others_put_on_children_are_called(family: Family, first: str) -> None:
    expected = outcomes(_scale(family.model()).double(), family.call)
    ours = family.model().double()
    if first == "theirs":
        _scale(ours)
    patch(ours)
    _scale(ours)
    assert_close(outcomes(ours, family.call), expected)
    unpatch(ours)
    assert_same_bits(outcomes(ours, family.call), expected)


def test_offloaded_by_accelerate(family: Family) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = family.call(family.model())[0]
    model = patched_model(family)
    # transformers' Mllama takes its images to where the weights lie, which is nowhere then.
    part = model.model.language_model if family.name == "mllama" else model
    accelerate.cpu_offload(part, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in part.parameters())
    torch.testing.assert_close(family.call(model)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["patch", "recompute"])
def test_recomputed_in_backward(family: Family, first: str) -> None:
    """Activations of each layer; OpenFlamingo's in wrappers of torch, as its own training has."""
    expected = outcomes(family.model().train(), family.call)
    model = family.model().train()
    if first == "patch":
        patch(model)
    recompute(model)
    if first == "recompute":
        patch(model)
    got = outcomes(model, family.call)
    assert_close({name.replace(f"{WRAPPED}.", ""): each for name, each in got.items()}, expected)


@pytest.mark.matrix
def test_compiled(family: Family) -> None:
    if family.name == "idefics" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4's Idefics breaks the graph in each of its layers")
    model = family.model()
    expected = outcomes(model, family.call)
    patch(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(outcomes(model, lambda _: family.call(compiled)), expected)
    # As without the patch.
    assert not torch._dynamo.utils.counters["graph_break"]


def test_autocast(family: Family) -> None:
    def call(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return family.call(model)

    model = family.model()
    oracle = outcomes(copy.deepcopy(model).double(), family.call)
    eager = outcomes(model, call)
    patch(model)
    got = outcomes(model, call)
    assert {name: each.dtype for name, each in got.items()} == {
        name: each.dtype for name, each in eager.items()
    }
    rms = lambda x: float(x.double().square().mean().sqrt())
    largest = max(rms(each) for name, each in oracle.items() if name[:2] == "d ")
    for name, each in oracle.items():
        band = 2**-8 * (largest if name[:2] == "d " else max(rms(each), 1))
        assert rms(got[name] - each) <= 2 * (rms(eager[name] - each) + band), name


def test_functional_call_and_its_gradient(family: Family) -> None:
    model = family.model()
    expected = outcomes(model, family.call)
    patch(model)
    parameters = {name: each.detach() + 0 for name, each in model.named_parameters()}
    for each in model.parameters():
        each.data.zero_()

    def loss_of(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        called = lambda **inputs: torch.func.functional_call(model, parameters, (), inputs)
        called.parameters = parameters.values
        logits, loss = family.call(called)
        return loss, logits

    gradients, (loss, logits) = torch.func.grad_and_value(loss_of, has_aux=True)(parameters)
    got = {"logits": logits, "loss": loss} | {f"d {name}": each for name, each in gradients.items()}
    assert_close({name: got[name] for name in expected}, expected)


def test_copies_for_averages(family: Family) -> None:
    model = patched_model(family)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = family.call(model)[0]
    for each in model.parameters():
        each.data.mul_(2)
    assert torch.equal(family.call(average.module)[0], before)
    average.update_parameters(model)
    average.update_parameters(model)
    assert patched_names(average.module) == patched_names(model)
    assert not torch.allclose(family.call(average.module)[0], before)


def test_with_the_patch_of_liger() -> None:
    """In a process of its own: Liger changes classes for good, some of them PyTorch's."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_mllama  # noqa: F401
    except ImportError as error:
        pytest.skip(str(error))
    program = Path(__file__).with_name("liger_cases.py")
    result = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
