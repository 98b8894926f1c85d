"""Predicted GPU times: useful work against data-sheet peaks. Nothing here is measured."""

from flamingo_fast.bench.work import Work
from flamingo_fast.gpus import GPUS, Gpu

__all__ = ["ASSUMPTIONS", "GPUS", "predicted_us"]

ASSUMPTIONS = (
    "useful bytes / peak memory bandwidth, or operations / peak rate, whichever is longer",
    "100 % of the data-sheet peak; caches cold; no launch cost",
    "our kernel: each input read once and each output written once, partial sums left out",
    "eager: each PyTorch kernel of the composition reads its inputs and writes its outputs once",
)


def predicted_us(work: Work, dtype: str, gpu: Gpu) -> float:
    """Microseconds that `work` takes at least on `gpu`."""
    return max(
        work.bytes / (gpu.bandwidth * 1e3),
        work.vector_flops / (gpu.vector * 1e6),
        work.matmul_flops / (gpu.matmul[dtype] * 1e6),
    )
