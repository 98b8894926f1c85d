"""What only a GPU shows of whole models: Triton's kernels in them, CUDA graphs, and syncs."""

import pytest
import torch

pytest.importorskip("transformers")

from model_cases import IMAGE, flamingo, open_gates  # noqa: E402

import flamingo_fast as ff  # noqa: E402
from flamingo_fast.models import generation  # noqa: E402
from flamingo_fast.models.sampling import Sampling, Stops  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.get_default_device().type != "cuda",
    reason="needs a GPU and TEST_DEVICE=cuda",
)

KINDS = ["gated_xattn_dense", "vanilla_xattn", "grafting"]


def _inputs():
    ids = torch.tensor([[0, 5, IMAGE, 7, 8, 9], [5, IMAGE, 7, IMAGE, 10, 11]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    return {"input_ids": ids, "images": torch.randn(3, 3, 8, 8), "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_loss_and_gradients(family, kind):
    model, inputs = open_gates(flamingo(family, kind)).train(), _inputs()

    def gradients(impl):
        model.zero_grad()
        with ff.use_impl(impl):
            loss = model(**inputs, num_media=[1, 2], labels=inputs["input_ids"]).loss
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    for found, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        error = (found - expected).norm()
        assert error <= 1e-3 * expected.norm() + 1e-6


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "chinchilla"])
def test_generation_as_a_graph(family, kind, beams):
    model, inputs = open_gates(flamingo(family, kind)), _inputs()
    options = {"num_media": [1, 2], "max_new_tokens": 20, "stop_token_ids": (), "num_beams": beams}
    plain, graph = (
        model.generate(**inputs, static_cache=each, **options) for each in (False, True)
    )
    assert torch.equal(plain.sequences, graph.sequences)


@torch.no_grad()
def test_no_sampled_token_waits_for_the_gpu():
    model, inputs = open_gates(flamingo("llama")), _inputs()
    cache, logits = generation._prefill(
        model, inputs["input_ids"], inputs["images"], None, inputs["attention_mask"],
        num_media=[1, 2],
    )  # fmt: skip
    decoder = generation.Decoder(model, cache, room=20)
    decoder(torch.tensor([5, 6]))
    stops = Stops([4], [], None, 4, logits.device)
    sampling = Sampling(0.8, 5, 0.9, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generation._generate(decoder, logits, stops, 15, sampling, None, inputs["input_ids"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
