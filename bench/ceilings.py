"""What the machine can do at best, measured in the same run: copy bandwidth and matmul rate."""

import dataclasses
import functools
from collections.abc import Iterable

import torch

from flamingo_fast.bench.records import Measurement
from flamingo_fast.bench.registry import DTYPES
from flamingo_fast.bench.timing import Quantiles, device_clock, interleaved


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """`copy` in GB/s of bytes read and written, `matmul` in TFLOP/s by dtype; 1 GB is 1e9 bytes."""

    copy: Quantiles
    matmul: dict[str, Quantiles]

    def measurements(self) -> list[Measurement]:
        copy = Measurement("copy", "torch", "fwd", "", "", "bandwidth", "GB/s", self.copy)
        return [copy] + [
            Measurement("matmul", "torch", "fwd", "", dtype, "rate", "TFLOP/s", rate)
            for dtype, rate in self.matmul.items()
        ]


def measure_ceilings(
    device: torch.device, dtypes: Iterable[str], *, budget_s: float, quick: bool = False
) -> Ceilings:
    """Copies a tensor into another, and multiplies two square matrices.

    fp32 products are IEEE unless torch.backends.cuda.matmul.allow_tf32 says otherwise.
    """
    on_gpu = device.type == "cuda"
    copy_bytes = 2**30 if on_gpu else 2**24 if quick else 2**27
    side = 8192 if on_gpu else 512 if quick else 1536
    clock = device_clock(device)
    source = torch.ones(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copies = interleaved({"copy": lambda: target.copy_(source)}, clock, budget_s=budget_s)["copy"]
    matmul = {}
    for dtype in dtypes:
        # Not constants: on a GPU those draw less power and so run at a higher clock.
        matrix = torch.randn(side, side, device=device).to(DTYPES[dtype])
        call = functools.partial(torch.mm, matrix, matrix)
        products = interleaved({"matmul": call}, clock, budget_s=budget_s)["matmul"]
        matmul[dtype] = Quantiles.of(2 * side**3 / 1e12 / second for second in products)
    return Ceilings(Quantiles.of(2 * copy_bytes / 1e9 / second for second in copies), matmul)
