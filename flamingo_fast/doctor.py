"""What works on this machine: versions, devices, and each backend, tried, or why it can't be."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

import flamingo_fast
from flamingo_fast.errors import one_line
from flamingo_fast.ops.dispatch import why_not_triton

if TYPE_CHECKING:
    from rich.console import Group

Status = Literal["usable", "unavailable", "broken"]

_VERSIONED = ("triton", "numpy")


@dataclasses.dataclass(frozen=True)
class Backend:
    """`detail` says why `status` is not "usable", else the version or what was run."""

    name: str
    status: Status
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Versions of libraries (None: not installed), devices, and what can run on them."""

    versions: dict[str, str | None]
    devices: list[str]
    backends: list[Backend]

    @property
    def broken(self) -> list[Backend]:
        """Backends that are installed, have their device, and fail all the same."""
        return [backend for backend in self.backends if backend.status == "broken"]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "flamingo_fast": flamingo_fast.__version__,
        "python": platform.python_version(),
        # With the kind of build, which the metadata may leave out.
        "torch": str(torch.__version__),
    }
    return versions | {package: _version(package) for package in _VERSIONED}


def _devices() -> list[str]:
    devices = [
        f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} cores used"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors"
        )
    return devices


def _tried(name: str, run: Callable[[], str]) -> Backend:
    try:
        return Backend(name, "usable", run())
    # Whatever a backend throws is what its user needs to read.
    except Exception as error:
        return Backend(name, "broken", one_line(error))


def _run_op(impl: str, device: torch.device) -> str:
    x = torch.tensor([-1.0, 3.0], device=device)
    out = flamingo_fast.squared_relu(x, impl=impl).tolist()
    if out != [0.0, 9.0]:
        raise ArithmeticError(f"squared_relu([-1, 3]) gave {out}, expected [0, 9]")
    return f"squared_relu ran on {device}"


def _op_backend(name: str, impl: str, device: torch.device) -> Backend:
    if impl == "triton" and (reason := why_not_triton(device)):
        return Backend(name, "unavailable", reason)
    return _tried(name, lambda: _run_op(impl, device))


def _triton_gpu() -> Backend:
    name = "triton on a GPU"
    if not torch.cuda.is_available():
        return Backend(name, "unavailable", "torch sees no GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend(name, "unavailable", "TRITON_INTERPRET=1 is set")
    return _op_backend(name, "triton", torch.device("cuda"))


def _package(name: str, install: str, *, needs_gpu: bool) -> Backend:
    """Whether module `name` imports, and has the GPU that it needs."""
    if importlib.util.find_spec(name) is None:
        return Backend(name, "unavailable", f"not installed ({install})")

    def load() -> str:
        importlib.import_module(name)
        distribution = name.partition(".")[0]
        return f"{distribution} {_version(distribution)}"

    loaded = _tried(name, load)
    if loaded.status == "usable" and needs_gpu and not torch.cuda.is_available():
        return Backend(name, "unavailable", f"{loaded.detail}, but torch sees no GPU")
    return loaded


def examine() -> Report:
    """Tries every backend; imports what is installed and runs one small op of ours per `impl`."""
    cpu = torch.device("cpu")
    extra = "pip install 'flamingo_fast[{}]'".format
    backends = [
        _op_backend("reference", "reference", cpu),
        _op_backend("torch", "torch", cpu),
        _triton_gpu(),
        _op_backend("triton in its interpreter", "triton", cpu),
        _package("torch.nn.attention.varlen", "torch 2.11 or later has it", needs_gpu=True),
        _package(
            "flash_attn", "pip install flash-attn --no-build-isolation, with nvcc", needs_gpu=True
        ),
        _package("xformers", extra("gpu"), needs_gpu=True),
        _package("liger_kernel", "pip install liger-kernel", needs_gpu=True),
        _package("timm", extra("models"), needs_gpu=False),
        _package("transformers", extra("models"), needs_gpu=False),
        _package("matplotlib", extra("bench"), needs_gpu=False),
        _package("nvtx", extra("profile"), needs_gpu=False),
    ]
    return Report(_versions(), _devices(), backends)


_STYLES = {"usable": "green", "unavailable": "yellow", "broken": "bold red"}


def render(report: Report) -> "Group":
    """The report as tables for a terminal."""
    # `accept` examines machines without it.
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    versions = Table("package", "version", title="Versions", title_justify="left")
    for package, version in report.versions.items():
        versions.add_row(package, version or "not installed")
    devices = Table("device", title="Devices", title_justify="left")
    for device in report.devices:
        devices.add_row(device)
    backends = Table("backend", "status", "detail", title="Backends", title_justify="left")
    for backend in report.backends:
        style = _STYLES[backend.status]
        backends.add_row(backend.name, f"[{style}]{backend.status}[/]", escape(backend.detail))
    return Group(versions, devices, backends)
