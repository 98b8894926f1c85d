"""Predicted GPU times: useful work against data-sheet peaks. Nothing here is measured."""

import dataclasses

from flamingo_fast.bench.work import Work

ASSUMPTIONS = (
    "useful bytes / peak memory bandwidth, or operations / peak rate, whichever is longer",
    "100 % of the data-sheet peak; caches cold; no launch cost",
    "our kernel: each input read once and each output written once, partial sums left out",
    "eager: each PyTorch kernel of the composition reads its inputs and writes its outputs once",
)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks, dense: GB/s, and TFLOP/s of vector units (fp32) and matrix products."""

    name: str
    bandwidth: float
    vector: float
    matmul: dict[str, float]
    source: str


def _matmul_peaks(fp32: float, half: float) -> dict[str, float]:
    return {"fp32": fp32, "fp16": half, "bf16": half}


# fp32 products are IEEE, not TF32, as our kernels' are unless told otherwise.
GPUS = (
    Gpu(
        "A100",
        2039,
        19.5,
        _matmul_peaks(19.5, 312),
        "NVIDIA A100 data sheet (2021), A100 80GB SXM",
    ),
    Gpu("H100", 3350, 67, _matmul_peaks(67, 989), "NVIDIA H100 data sheet (2023), H100 SXM"),
    Gpu(
        "B200",
        8000,
        80,
        _matmul_peaks(80, 2250),
        "NVIDIA Blackwell architecture technical brief (2024), HGX B200, one GPU",
    ),
    Gpu(
        "MI300X",
        5300,
        163.4,
        _matmul_peaks(163.4, 1307.4),
        "AMD Instinct MI300X data sheet (2023)",
    ),
)


def predicted_us(work: Work, dtype: str, gpu: Gpu) -> float:
    """Microseconds that `work` takes at least on `gpu`."""
    return max(
        work.bytes / (gpu.bandwidth * 1e3),
        work.vector_flops / (gpu.vector * 1e6),
        work.matmul_flops / (gpu.matmul[dtype] * 1e6),
    )
