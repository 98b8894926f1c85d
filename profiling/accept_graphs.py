"""CUDA graphs of ops, of decoding and of a training step: what replays do is what calls do."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import flamingo_fast as ff
from flamingo_fast.bench import attention, latent, ops, several_media
from flamingo_fast.layout import MediaLayout
from flamingo_fast.modules import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.profiling.accept_context import Context, synchronize
from flamingo_fast.profiling.accept_parity import Legs, Subject, subjects

_OPS = (*ops.BENCHMARKS, attention.NAME, several_media.ALL_PREVIOUS, latent.NAME)
_STEPS = 4
_IMAGE, _VOCAB = 3, 64

Call = Callable[[], Sequence[torch.Tensor]]


def record(call: Call, device: torch.device) -> tuple[Sequence[torch.Tensor], Callable[[], None]]:
    """A CUDA graph of `call`: its outputs, and what computes them again in the same memory.

    On a CPU the call itself is what computes them again.
    """
    if device.type != "cuda":
        outputs = [each.clone() for each in call()]

        def call_again() -> None:
            for output, new in zip(outputs, call(), strict=True):
                output.copy_(new)

        return outputs, call_again
    # Kernels are compiled, and libraries have their memory, before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = list(call())
    return outputs, graph.replay


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside, what waits for the GPU raises."""
    synchronize(device)
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_op(subject: Subject) -> str:
    """Forward and backward wait for nothing, and a graph of them computes what calls do."""
    legs = Legs(subject)
    names: list[str] = []

    def call() -> Sequence[torch.Tensor]:
        found = legs.ours("triton")
        names[:] = found
        return list(found.values())

    call()
    with no_waiting(subject.device):
        call()
    outputs, replay = record(call, subject.device)
    with torch.no_grad():
        for leaf in legs.leaves.values():
            leaf.copy_(leaf.flip(0) * 0.5)
    replay()
    _check_equal(names, outputs, call())
    return f"{', '.join(names)} are bit-equal after other inputs"


def _check_equal(
    names: Sequence[str], got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> None:
    pairs = zip(names, got, expected, strict=True)
    if others := [name for name, one, other in pairs if not torch.equal(one, other)]:
        raise AssertionError(f"a replay computes something else: {', '.join(others)}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model whose training step is captured."""

    dim: int = 256
    heads: int = 4
    dim_head: int = 64
    latents: int = 64
    batch: int = 2
    seqlen: int = 128
    features: int = 64


TINY = Sizes(dim=32, heads=2, dim_head=16, latents=4, batch=1, seqlen=12, features=6)


class _Net(nn.Module):
    """Text between images: a resampler, and gated blocks over embeddings, with a loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        heads: dict[str, Any] = {"dim_head": sizes.dim_head, "heads": sizes.heads}
        self.embedding = nn.Embedding(_VOCAB, sizes.dim)
        self.resampler = PerceiverResampler(
            dim=sizes.dim, depth=1, num_latents=sizes.latents, **heads
        )
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(dim=sizes.dim, dim_visual=sizes.dim, **heads) for _ in range(2)
        )
        self.head = nn.Linear(sizes.dim, _VOCAB, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.5)

    def forward(
        self, ids: torch.Tensor, features: torch.Tensor, layout: MediaLayout
    ) -> torch.Tensor:
        x, media = self.embedding(ids), self.resampler(features)
        for block in self.blocks:
            x = block(x, media, layout=layout)
        return linear_cross_entropy(x, self.head.weight, None, ids)


class Training:
    """A model and its optimiser, the same at each start; `step` returns the loss."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = _Net(sizes).to(device)
        ids = torch.randint(_IMAGE + 1, _VOCAB, (sizes.batch, sizes.seqlen))
        ids[:, :: sizes.seqlen // 2] = _IMAGE
        media = int((ids[0] == _IMAGE).sum())
        shape = (sizes.batch, media, 1, sizes.features, sizes.dim)
        self.inputs = ids.to(device), torch.randn(shape).to(device)
        # As a model does, outside of what is captured: the number of media is a host's.
        self.layout = MediaLayout.from_media_locations(self.inputs[0] == _IMAGE, media)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-2, capturable=device.type == "cuda"
        )
        self._start = [each.detach().clone() for each in self.model.parameters()]

    def step(self) -> list[torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(*self.inputs, self.layout)
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]

    @torch.no_grad()
    def restart(self) -> None:
        """Weights and moments as at the start, in the same memory."""
        for parameter, start in zip(self.model.parameters(), self._start, strict=True):
            parameter.copy_(start)
            for moment in self.optimizer.state[parameter].values():
                moment.zero_()


def check_training(sizes: Sizes, device: torch.device) -> str:
    """Losses of steps that are a graph's are those of calls, and fall."""
    with ff.use_impl("triton"):
        called = Training(sizes, device)
        expected = [called.step()[0].item() for _ in range(_STEPS)]
        training = Training(sizes, device)
        (loss,), replay = record(training.step, device)
        training.restart()
        losses = []
        for _ in range(_STEPS):
            replay()
            losses.append(loss.item())
    text = f"losses {_numbers(losses)} of a graph, {_numbers(expected)} of calls"
    # Products may have another order of their terms in a graph, and steps make more of it.
    if any(
        abs(one - other) > 1e-3 * abs(other) for one, other in zip(losses, expected, strict=True)
    ):
        raise AssertionError(text)
    if not losses[-1] < 0.9 * losses[0]:
        raise AssertionError(f"the loss does not fall: {text}")
    return text


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


class _Quarters(nn.Module):
    """Features of an image of 8 x 8 pixels, in place of a vision encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(nn.functional.unfold(x, 4, stride=4).mT)


def check_decoding(device: torch.device, beams: int, tokens: int) -> str:
    """A graph of a token's step generates what calls do; needs transformers' caches."""
    from flamingo_fast.models.config import (
        ConditioningConfig,
        FlamingoConfig,
        LanguageModelConfig,
        ResamplerConfig,
    )
    from flamingo_fast.models.flamingo import Flamingo
    from flamingo_fast.models.vision import VisionEncoder

    torch.manual_seed(0)
    config = FlamingoConfig(
        image_token_id=_IMAGE,
        resampler=ResamplerConfig(dim=32, depth=1, heads=2, dim_head=16, num_latents=4),
        conditioning=ConditioningConfig(heads=2, dim_head=16),
        lm=LanguageModelConfig(vocab_size=_VOCAB, dim=64, depth=2, heads=2, dim_head=32),
    )
    encoder = VisionEncoder.from_module(_Quarters(), 12)
    model = Flamingo(config, vision_encoder=encoder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            # Of small random weights all tokens are about as likely.
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    ids = torch.tensor([[4, 5, _IMAGE, 7, 8, 9], [5, _IMAGE, 7, _IMAGE, 10, 11]])
    images = torch.randn(3, 3, 8, 8)
    model = model.to(device)
    # Padding on the left of the first row.
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    found = [
        model.generate(
            ids.to(device),
            images.to(device),
            attention_mask=mask.to(device),
            num_media=[1, 2],
            max_new_tokens=tokens,
            stop_token_ids=(),
            num_beams=beams,
            static_cache=is_static,
        ).sequences
        for is_static in (False, True)
    ]
    if not torch.equal(*found):
        raise AssertionError(f"other tokens: {found[1].tolist()}, expected {found[0].tolist()}")
    return f"{found[0].shape[1]} tokens of 2 rows are the same"


def graphs(context: Context) -> None:
    """The training step, decoding, then ops."""
    device = context.device
    sizes = Sizes() if context.on_gpu else TINY
    context.attempt("training step", functools.partial(check_training, sizes, device))
    for beams in (1, 3):
        tokens = 20 if context.on_gpu else 5
        context.attempt(
            f"decoding, {beams} beams", functools.partial(check_decoding, device, beams, tokens)
        )
    names = _OPS if context.on_gpu else _OPS[-3:]
    for subject in subjects(device, quick=True, names=names, dtypes=("bf16",)):
        context.attempt(str(subject), functools.partial(check_op, subject))
    if not context.on_gpu:
        context.not_exercised("capture and replay of graphs, and what waits for a GPU")
