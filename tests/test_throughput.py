"""What a batch is worth: tokens, images, operations as PyTorch counts them; the device's peak."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")
pytest.importorskip("transformers")

from model_cases import IMAGE, VOCAB, hf_model, tiny_config  # noqa: E402

from flamingo_fast import use_impl  # noqa: E402
from flamingo_fast.gpus import GPUS  # noqa: E402
from flamingo_fast.models.config import VisionConfig  # noqa: E402
from flamingo_fast.models.flamingo import Flamingo  # noqa: E402
from flamingo_fast.models.work import Document, LanguageModelSizes, pass_flops  # noqa: E402
from flamingo_fast.training.batch import Batch  # noqa: E402
from flamingo_fast.training.throughput import (  # noqa: E402
    Amount,
    WorkCounter,
    documents_of,
    peak_flops,
    utilisation,
)

CONFIG = tiny_config(vision=VisionConfig("vit_mini", 28), eoc_token_id=None)


def model_of(family: str | None = None, **parts) -> Flamingo:
    lang_model = None if family is None else hf_model(family)
    return Flamingo(dataclasses.replace(CONFIG, **parts), lang_model=lang_model)


def batch_of(rows: int, tokens: int, media: int = 1, frames: int = 1) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(5, VOCAB, (rows, tokens))
    ids[:, :media] = IMAGE
    pixels = torch.randn(rows * media, frames, 3, 28, 28) if media else None
    return Batch(ids, ids.clone(), None, None, [media] * rows, None, pixels, None)


def packed(lengths: list[int], num_media: list[int], padding: int) -> Batch:
    """One row, with so much padding at its end."""
    ids = torch.cat(
        [batch_of(1, n, k).input_ids[0] for n, k in zip(lengths, num_media, strict=True)]
    )
    labels = ids.clone()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    labels[starts[:-1]] = -100
    ids = torch.cat([ids, torch.zeros(padding, dtype=torch.int64)])[None]
    labels = torch.cat([labels, torch.full((padding,), -100)])[None]
    boundaries = torch.tensor([*starts, starts[-1] + padding], dtype=torch.int32)
    pixels = torch.randn(sum(num_media), 1, 3, 28, 28)
    return Batch(ids, labels, None, boundaries, [*num_media, 0], None, pixels, None)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "gated_xattn_dense") for family in ("gpt_neox", "qwen2", "qwen3")),
        *itertools.product(
            ("gpt2", "opt", "llama"), ("gated_xattn_dense", "vanilla_xattn", "grafting")
        ),
    ],
)
def test_operations_with_a_language_model_of_transformers_are_those_pytorch_counts(family, kind):
    conditioning = dataclasses.replace(CONFIG.conditioning, kind=kind, first=1)
    model = model_of(family, conditioning=conditioning).train()
    batch = batch_of(1, 24)
    with (
        use_impl("reference"),
        # Fused attention counts the scores that its backward computes again.
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(batch.input_ids, videos=batch.pixels[:, None], labels=batch.labels).loss.backward()
    # Rotary angles are a product, too.
    assert WorkCounter(model)(batch).flops == pytest.approx(counter.get_total_flops(), rel=0.0001)


def test_a_language_model_of_our_own_has_the_same_sizes_by_config_and_by_model():
    model = model_of()
    assert LanguageModelSizes.of_model(model.lang_model) == LanguageModelSizes.of_config(CONFIG.lm)


def test_packed_documents_are_worth_what_they_are_alone_and_padding_nothing():
    model = model_of("llama")
    count = WorkCounter(model)
    alone = sum((count(batch_of(1, n, k)) for n, k in ((7, 1), (12, 2), (5, 0))), Amount())
    assert count(packed([7, 12, 5], [1, 2, 0], padding=8)) == alone
    assert (alone.tokens, alone.images) == (24, 3)
    assert documents_of(packed([7, 5], [1, 0], padding=0)) == [Document(7, (1,)), Document(5)]


def test_padding_of_rows_is_worth_nothing():
    count = WorkCounter(model_of())
    batch = batch_of(2, 16)
    batch.attention_mask = (torch.arange(16) < torch.tensor([[16], [9]])).long()
    assert documents_of(batch) == [Document(16, (1,)), Document(9, (1,))]
    expected = pass_flops(CONFIG, [Document(16, (1,)), Document(9, (1,))]).total
    assert count(batch) == Amount(25, 2, expected)


def test_features_save_the_vision_encoder_and_frames_are_images():
    count = WorkCounter(model_of())
    batch = batch_of(2, 16, frames=3)
    amount = count(batch)
    assert amount.images == 6
    features = [torch.zeros(3, 5, 64)] * 2
    with_features = dataclasses.replace(batch, pixels=None, features=features)
    vision = pass_flops(CONFIG, documents_of(batch)).vision
    assert vision > 0
    assert count(with_features) == dataclasses.replace(amount, flops=amount.flops - vision)


def test_text_alone():
    batch = batch_of(2, 16, media=0)
    assert WorkCounter(model_of())(batch).images == 0
    flops = pass_flops(CONFIG, documents_of(batch))
    assert (flops.vision, flops.resampler) == (0, 0)
    assert flops.lm > 0


@pytest.mark.parametrize(
    ("num_media", "message"),
    [([1], "expected 2 counts"), ([1, 2], "expected a sum of 2, got 3")],
)
def test_wrong_counts_of_media_are_refused(num_media, message):
    batch = dataclasses.replace(batch_of(2, 16), num_media=num_media)
    with pytest.raises(ValueError, match=message):
        WorkCounter(model_of())(batch)


def test_a_known_gpus_peak_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    assert peak_flops(torch.device("cuda"), torch.float32) == 67e12
    names = [name for gpu in GPUS for name in gpu.device_names]
    assert len(names) == len(set(names))


def test_precisions_that_the_old_flag_has_no_name_for():
    """PyTorch raises where `allow_tf32` is read after this."""
    script = (
        "import torch\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "from flamingo_fast.training.throughput import peak_flops\n"
        "assert peak_flops(torch.device('cpu'), torch.float32) > 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_cpus_peak_is_measured_once_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    device = torch.device("cpu")
    peak = peak_flops(device, torch.float32)
    assert peak > 1e8
    assert peak_flops(device, torch.float32) == peak
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        peak_flops(device, torch.float64)


def test_utilisation():
    assert utilisation(10**12, 2.0, 2e12) == 0.25
    with pytest.raises(ValueError, match="expected more than 0, got 0"):
        utilisation(1, 0, 1)
