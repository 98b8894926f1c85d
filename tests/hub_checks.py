"""What Hugging Face's `kernels` makes of an exported repository: a program of its own.

Beside that library `flamingo_fast` itself is installed. Arguments: the repository. Prints a JSON
object with the traceback of each check, or null.
"""

# ruff: noqa: TID251
import copy
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# For the check of the kernels; the others are on a CPU, whose default is PyTorch.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.utils._pytree as pytree
from kernels._rust import Digest, DigestAlgorithm, Metadata
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import flamingo_fast
import kernels
from flamingo_fast.kernels import tuned
from flamingo_fast.modules import GatedResidual, GatedResidualNorm, SquaredReLU
from flamingo_fast.testing import peers
from kernels import Mode

REPOSITORY = Path(sys.argv[1])
helpers = peers.open_flamingo()

DIM, DIM_MEDIA = 24, 20
CLASSES = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "LlamaRMSNorm": LlamaRMSNorm,
    "GatedResidual": GatedResidual,
    "GatedResidualNorm": GatedResidualNorm,
    "SquaredReLU": SquaredReLU,
    "MaskedCrossAttention": helpers.MaskedCrossAttention,
    "GatedCrossAttentionBlock": helpers.GatedCrossAttentionBlock,
    "PerceiverAttention": helpers.PerceiverAttention,
}
for name, cls in CLASSES.items():
    kernels.replace_kernel_forward_from_hub(cls, name)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def locations() -> torch.Tensor:
    """Text before the first image; images side by side; none; more image tokens than images."""
    found = torch.zeros(3, 9, dtype=torch.bool)
    for row, places in enumerate([(2, 3), (), (0, 4, 7)]):
        found[row, list(places)] = True
    return found


def modules() -> Iterator[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Name of its layer, module and arguments."""
    rows = randn(3, 5, DIM), randn(3, 5, DIM)
    yield "LayerNorm", nn.LayerNorm(DIM), rows[:1]
    yield "LayerNorm", nn.LayerNorm((5, DIM)), rows[:1]
    yield "LayerNorm", nn.LayerNorm(DIM, elementwise_affine=False), rows[:1]
    yield "RMSNorm", nn.RMSNorm(DIM), rows[:1]
    yield "RMSNorm", nn.RMSNorm(DIM, eps=1e-3), rows[:1]
    yield "LlamaRMSNorm", LlamaRMSNorm(DIM), rows[:1]
    yield "GatedResidual", GatedResidual(), rows
    yield "GatedResidual", GatedResidual(DIM), rows
    yield "GatedResidualNorm", GatedResidualNorm(DIM), rows
    yield "GatedResidualNorm", GatedResidualNorm(DIM, norm="rms", vector_gate=True), rows
    yield "SquaredReLU", SquaredReLU(), rows[:1]
    text, media = randn(3, 9, DIM), randn(3, 2, 5, DIM_MEDIA)
    sizes = {"dim": DIM, "dim_head": 8, "heads": 3}
    for one in (True, False):
        options = {**sizes, "dim_visual": DIM_MEDIA, "only_attend_immediate_media": one}
        attention = helpers.MaskedCrossAttention(**options)
        yield "MaskedCrossAttention", attention, (text, media, locations())
        yield "MaskedCrossAttention", attention, (text[:, :2], media, locations(), True)
        block = helpers.GatedCrossAttentionBlock(**options)
        yield "GatedCrossAttentionBlock", block, (text, media, locations())
    latents = randn(3, 2, 4, DIM)
    yield "PerceiverAttention", helpers.PerceiverAttention(**sizes), (randn(3, 2, 7, DIM), latents)


def with_values(module: nn.Module) -> nn.Module:
    """In fp64, parameters random: gates open."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def kernelized(module: nn.Module, mode: Mode) -> nn.Module:
    """A copy; fails if any module that has a layer keeps its own forward."""
    module = copy.deepcopy(module)
    mapping = {
        name: {"cpu": {mode: kernels.LocalLayerRepository(REPOSITORY, layer_name=name)}}
        for name in CLASSES
    }
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(module, mode=mode, device="cpu", use_fallback=False)
    layers = kernels.get_local_kernel(REPOSITORY).layers
    for each in module.modules():
        for name, cls in CLASSES.items():
            if type(each) is cls:
                assert each.forward.__func__ is getattr(layers, name).forward, name
    return module


def outputs(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    out = module(*arguments)
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(
    module: nn.Module, arguments: tuple[Any, ...], call: Callable[..., Any] | None = None
) -> list[torch.Tensor]:
    """Outputs, and gradients of all arguments and parameters by all outputs."""
    arguments = tuple(
        each.clone().requires_grad_()
        if isinstance(each, torch.Tensor) and each.is_floating_point()
        else each
        for each in arguments
    )
    out = outputs(module if call is None else call, arguments)
    generator = torch.Generator().manual_seed(1)
    douts = [
        torch.randn(each.shape, dtype=torch.float64, generator=generator).to(each) for each in out
    ]
    wanted = [each for each in arguments if isinstance(each, torch.Tensor) and each.requires_grad]
    wanted += module.parameters()
    return [*out, *torch.autograd.grad(out, wanted, douts)]


def assert_close(ours: Any, theirs: Any, has_llama: bool = False, **options: Any) -> None:
    """Of fp64, though LlamaRMSNorm's own forward computes in fp32."""
    rtol, atol = (1e-5, 1e-5) if has_llama else (1e-9, 1e-10)
    torch.testing.assert_close(list(ours), list(theirs), rtol=rtol, atol=atol, **options)


def assert_close_in(name: str, ours: Any, theirs: Any) -> None:
    has_llama = name == "LlamaRMSNorm"
    assert_close(ours, theirs, has_llama, msg=lambda text: f"{name}: {text}")


def training() -> None:
    for name, module, arguments in modules():
        module = with_values(module).train()
        theirs = outputs_and_gradients(module, arguments)
        ours = outputs_and_gradients(kernelized(module, Mode.TRAINING), arguments)
        assert_close_in(name, ours, theirs)


def inference() -> None:
    for name, module, arguments in modules():
        module = with_values(module).eval()
        with torch.inference_mode():
            theirs = outputs(module, arguments)
            ours = outputs(kernelized(module, Mode.INFERENCE), arguments)
        assert_close_in(name, ours, theirs)


def autocast() -> None:
    """Norms return the dtypes that the modules return, with bf16 parameters and without."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, module, arguments in modules():
            if not name.endswith("Norm") or name.startswith("Gated"):
                continue
            module = with_values(module).float()
            x = arguments[0].to(dtype)
            ours = kernelized(module, Mode.INFERENCE)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(ours(x), module(x), rtol=2**-6, atol=2**-6)
            if name == "LlamaRMSNorm":
                torch.testing.assert_close(ours(x), module(x), rtol=2**-6, atol=2**-6)


class Model(nn.Module):
    """All layers in one, as torch.compile is given them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"dim": DIM, "dim_head": 8, "heads": 3}
        self.resampler = helpers.PerceiverAttention(**sizes)
        self.latents = nn.Parameter(torch.empty(4, DIM))
        self.block = helpers.GatedCrossAttentionBlock(**sizes, dim_visual=DIM)
        self.gated_norm = GatedResidualNorm(DIM)
        self.rms, self.llama = nn.RMSNorm(DIM), LlamaRMSNorm(DIM)
        self.gated, self.activation = GatedResidual(), SquaredReLU()

    def forward(self, x: torch.Tensor, features: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(*features.shape[:2], -1, -1)
        attended = self.block(x, self.resampler(features, latents), where)
        residual, normed = self.gated_norm(x, attended)
        return self.gated(residual, self.llama(self.activation(self.rms(normed))))


def compiled() -> None:
    model = with_values(Model())
    arguments = (randn(3, 9, DIM), randn(3, 2, 7, DIM), locations())
    for mode in (Mode.TRAINING, Mode.INFERENCE):
        ours = kernelized(model, mode | Mode.TORCH_COMPILE)
        call = torch.compile(ours, fullgraph=True, backend="aot_eager")
        if mode == Mode.TRAINING:
            theirs = outputs_and_gradients(model, arguments)
            assert_close(outputs_and_gradients(ours, arguments, call), theirs, has_llama=True)
        else:
            with torch.no_grad():
                assert_close(outputs(call, arguments), outputs(model, arguments), has_llama=True)


def beside_each_other() -> None:
    """The package and two copies, each with ops and a layout that PyTorch knows apart."""
    x, y, gate = randn(3, 8), randn(3, 8), randn(1)
    # Where PyTorch is one for CPUs alone, both are the same.
    copies = [kernels.get_local_kernel(REPOSITORY, backend=each) for each in ("cpu", None)]
    expected = flamingo_fast.gated_residual(x, y, gate)
    for package, namespace in (
        (flamingo_fast, "flamingo_fast"),
        *((each, each.__name__) for each in copies),
    ):
        torch.testing.assert_close(package.gated_residual(x, y, gate), expected)
        op = getattr(torch.ops, namespace).gated_residual_fwd
        torch.testing.assert_close(op(x, y, gate, "torch"), expected)
        layout = package.MediaLayout.from_media_locations(locations(), 2, "previous")
        spec = pytree.tree_structure(layout)
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    for each in copies:
        assert each.__name__ == each.gated_residual.__module__.partition(".")[0] != "flamingo_fast"
    assert copies[0].MediaLayout is not flamingo_fast.MediaLayout


def triton_kernels() -> None:
    """Each of the copy's kernels, interpreted, and the hashes that tuned configurations go by."""
    package = kernels.get_local_kernel(REPOSITORY)
    x, y, gate, weight = (randn(*shape).float() for shape in ((3, 8), (3, 8), (1,), (8,)))
    layout_of = package.MediaLayout.from_media_locations
    q, kv = randn(3, 9, 1, 16).float(), randn(3, 2, 5, 1, 16).float()
    latents, features = randn(2, 4, 1, 16).float(), randn(2, 7, 1, 16).float()

    def media(attend: str) -> Callable[..., Any]:
        layout = layout_of(locations(), 2, attend)
        return lambda q, k, v, impl: package.masked_cross_attention(q, k, v, layout, impl=impl)

    def gated_norm(*tensors: torch.Tensor, impl: str) -> Any:
        return package.gated_residual_norm(*tensors, eps=1e-5, impl=impl)

    def norm(x: torch.Tensor, weight: torch.Tensor, impl: str) -> Any:
        return package.rms_norm(x, weight, eps=1e-5, impl=impl)

    cases = (
        (package.gated_residual, (x, y, gate)),
        (package.squared_relu, (x,)),
        (gated_norm, (x, y, gate, weight)),
        (norm, (x, weight)),
        (media("previous"), (q, kv, kv.clone())),
        (media("all_previous"), (q, kv, kv.clone())),
        (package.latent_attention, (latents, features, features + 1, latents, latents + 1)),
    )
    for function, tensors in cases:

        class Call(nn.Module):
            def forward(self, *arguments: torch.Tensor) -> Any:
                return function(*arguments, impl=impl)  # noqa: B023

        found = []
        for impl in ("triton", "reference"):
            wide = impl == "reference"
            inputs = tuple(each.double() if wide else each for each in tensors)
            found.append([each.float() for each in outputs_and_gradients(Call(), inputs)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    used = f"{package.__name__}.kernels."
    assert f"{used}one_medium_backward" in sys.modules
    assert f"{used}several_media_backward" in sys.modules
    for module in ("one_medium_backward", "norm_forward", "latent_backward"):
        assert sys.modules[f"{used}tuned"]._source(module) == tuned._source(module)


def metadata() -> None:
    for variant in (REPOSITORY / "build").iterdir():
        found = Metadata.read_from_file(variant / "metadata.json")
        assert str(found.name) == "flamingo-fast" and found.id.isidentifier()
        assert str(found.backend.backend_type).lower() == variant.name.removeprefix("torch-")
        actual = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        assert found.digest is not None
        written = {name for name in actual.files if "__pycache__" not in name}
        assert set(found.digest.files) == written
        assert all(actual.files[name] == value for name, value in found.digest.files.items())


def readme() -> None:
    """Its example runs, in the repository."""
    text = (REPOSITORY / "README.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    os.chdir(REPOSITORY)
    names: dict[str, Any] = {}
    exec(program, names)
    layers = names["ops"].layers
    if not torch.cuda.is_available():
        assert names["model"][1].forward.__func__ is layers.RMSNorm.forward
    assert torch.equal(names["out"], names["x"])  # The gate is 0.


CHECKS = (
    *(training, inference, autocast, compiled),
    *(beside_each_other, triton_kernels, metadata, readme),
)


def main() -> None:
    torch.manual_seed(0)
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
