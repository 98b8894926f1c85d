"""What a training step is worth: tokens, images, and operations against the device's peak.

Model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the operations that the model needs
for what it was given, over those that the device could have done meanwhile. Work that an
implementation adds, such as activations that are computed again, doesn't count, nor does padding.
"""

import dataclasses
import functools
import time

import torch

from flamingo_fast.gpus import GPUS
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.work import Document, LanguageModelSizes, pass_flops
from flamingo_fast.training.batch import IGNORED, Batch

_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of the matrices that tell a device's peak where no data sheet does.
_SIDE_ON_GPU, _SIDE_ON_CPU = 8192, 1024
_MEASURE_S = 0.3


@dataclasses.dataclass(frozen=True)
class Amount:
    """What is in batches, of the ranks that were counted.

    Attributes:
        tokens: without padding.
        images: frames of videos among them.
        flops: of the forward and the backward, 2 for each multiply-add, see `models.work`.
    """

    tokens: int = 0
    images: int = 0
    flops: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.tokens + other.tokens, self.images + other.images, self.flops + other.flops
        )


class WorkCounter:
    """Counts what a model does with a batch.

    The vision encoder is the one that the model's config names, at its image size. With a language
    model of transformers the count is of its linear layers and of full attention within documents.

    Arguments:
        model: on any device, "meta" too. Weights may be sharded as DTensors.

    Raises:
        ConfigError: no encoder that timm knows.
        ImportError: timm is not installed.
    """

    def __init__(self, model: Flamingo) -> None:
        self._config = model.config
        self._lang_model = LanguageModelSizes.of_model(model.lang_model)
        # An encoder's work is counted once, which takes a second or more for large ones.
        self._count([], has_features=False)

    def __call__(self, batch: Batch) -> Amount:
        """Of the rows in it, which are this rank's; they are best on the CPU still.

        Raises:
            ValueError: num_media that is not of the rows, or of the documents where they are
                packed; media that are not as many.
        """
        documents = documents_of(batch)
        return Amount(
            tokens=sum(each.tokens for each in documents),
            images=sum(sum(each.frames) for each in documents),
            flops=self._count(documents, batch.features is not None),
        )

    def _count(self, documents: list[Document], has_features: bool) -> int:
        flops = pass_flops(
            self._config, documents, lang_model=self._lang_model, has_features=has_features
        )
        return flops.total


def documents_of(batch: Batch) -> list[Document]:
    """The documents of a batch by their sizes, without padding.

    Raises:
        ValueError: as `WorkCounter` does.
    """
    num_rows, length = batch.input_ids.shape
    if batch.cu_seqlens is not None:
        lengths = batch.cu_seqlens.diff().tolist()
        # Padding at the end of a row is a document without media of which nothing is predicted.
        # So may a text be that is one token long; it is as good as none.
        is_predicted = torch.zeros(num_rows * length + 1, dtype=torch.int64)
        is_predicted[1:] = (batch.labels.flatten() != IGNORED).cpu().cumsum(0)
        boundaries = batch.cu_seqlens.long()
        predicted = is_predicted[boundaries].diff().tolist()
    elif batch.attention_mask is not None:
        lengths = batch.attention_mask.sum(1).tolist()
        predicted = lengths
    else:
        lengths = predicted = [length] * num_rows
    if len(batch.num_media) != len(lengths):
        raise ValueError(
            f"num_media: expected {len(lengths)} counts, as many as rows or packed documents; got "
            f"{len(batch.num_media)}"
        )
    frames = _frames_of(batch)
    if len(frames) != sum(batch.num_media):
        raise ValueError(f"num_media: expected a sum of {len(frames)}, got {sum(batch.num_media)}")
    documents, start = [], 0
    for tokens, num_predicted, num_media in zip(lengths, predicted, batch.num_media, strict=True):
        if num_media or num_predicted:
            media = tuple(frames[start : start + num_media])
            documents.append(Document(tokens, media))
        start += num_media
    return documents


def _frames_of(batch: Batch) -> list[int]:
    media = batch.pixels if batch.features is None else batch.features
    return [] if media is None else [len(each) for each in media]


def utilisation(flops: int, seconds: float, peak: float) -> float:
    """Model-FLOPs utilisation, from 0 to 1.

    Arguments:
        flops: of a rank's batches; where ranks share layers (tensor parallelism), of its part.
        seconds: that they took.
        peak: of the rank's device, see `peak_flops`.

    Raises:
        ValueError: no time, or no peak.
    """
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"seconds, peak: expected more than 0, got {seconds}, {peak}")
    return flops / (seconds * peak)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of matrix products at best: the data sheet's of a known GPU.

    That of other devices, such as a CPU with the threads that PyTorch has, is measured, once, by
    products of large matrices, which takes half a second.

    Arguments:
        dtype: float32, float16 or bfloat16. Products of float32 are IEEE's, not TF32.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    uses_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device.type == "cuda" and not uses_tf32:
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS:
            if name in gpu.device_names:
                return gpu.matmul[_DTYPE_NAMES[dtype]] * 1e12
    return _measured_peak(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """`threads` is what it depends on; the fastest of several products counts."""
    on_gpu = device.type == "cuda"
    side = _SIDE_ON_GPU if on_gpu else _SIDE_ON_CPU
    # A generator of its own, since it may run in a training that is to be repeated exactly.
    generator = torch.Generator(device).manual_seed(0)
    # Not constants: on a GPU those draw less power and so run at a higher clock.
    matrix = torch.randn(side, side, device=device, generator=generator).to(dtype)
    best, deadline = float("inf"), time.perf_counter() + _MEASURE_S
    while True:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if on_gpu:
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return 2 * side**3 / best
