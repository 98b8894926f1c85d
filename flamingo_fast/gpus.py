"""What GPUs do at best, by their data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks, dense: GB/s, and TFLOP/s of vector units (fp32) and matrix products.

    `device_names` is what PyTorch calls those whose matrix products are as fast; `bandwidths` has
    those of them whose memory is not.
    """

    name: str
    bandwidth: float
    vector: float
    matmul: dict[str, float]
    source: str
    device_names: tuple[str, ...] = ()
    bandwidths: dict[str, float] = dataclasses.field(default_factory=dict)

    def bandwidth_of(self, device_name: str) -> float:
        """GB/s of one of `device_names`."""
        return self.bandwidths.get(device_name, self.bandwidth)


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
        (
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100 80GB PCIe",
            "NVIDIA A100-PCIE-40GB",
        ),
        # The same data sheet, and that of 2020 of those with 40 GB.
        {
            "NVIDIA A100-SXM4-40GB": 1555,
            "NVIDIA A100 80GB PCIe": 1935,
            "NVIDIA A100-PCIE-40GB": 1555,
        },
    ),
    Gpu(
        "H100",
        3350,
        67,
        _matmul_peaks(67, 989),
        "NVIDIA H100 data sheet (2023), H100 SXM",
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        # NVIDIA H200 data sheet (2023).
        {"NVIDIA H200": 4800},
    ),
    Gpu(
        "B200",
        8000,
        80,
        _matmul_peaks(80, 2250),
        "NVIDIA Blackwell architecture technical brief (2024), HGX B200, one GPU",
        ("NVIDIA B200",),
    ),
    Gpu(
        "MI300X",
        5300,
        163.4,
        _matmul_peaks(163.4, 1307.4),
        "AMD Instinct MI300X data sheet (2023)",
        ("AMD Instinct MI300X",),
    ),
)
