"""CUDA graphs of ops, of decoding and of a training step: what replays do is what calls do."""

import contextlib
import functools
import typing
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import flamingo_fast as ff
from flamingo_fast.bench import attention, latent, ops, several_media
from flamingo_fast.profiling.accept_context import Context, synchronize
from flamingo_fast.profiling.accept_parity import Legs, Subject, subjects

if typing.TYPE_CHECKING:
    from flamingo_fast.models.flamingo import Flamingo

_OPS = (*ops.BENCHMARKS, attention.NAME, several_media.ALL_PREVIOUS, latent.NAME)
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


class _Quarters(nn.Module):
    """Features of an image of 8 x 8 pixels, in place of a vision encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(nn.functional.unfold(x, 4, stride=4).mT)


def _make_model(dim: int, device: torch.device) -> "Flamingo":
    """A Flamingo of two gated blocks with open gates; needs transformers."""
    from flamingo_fast.models.config import (
        ConditioningConfig,
        FlamingoConfig,
        LanguageModelConfig,
        ResamplerConfig,
    )
    from flamingo_fast.models.flamingo import Flamingo
    from flamingo_fast.models.vision import VisionEncoder

    torch.manual_seed(0)
    dim_head = dim // 4
    config = FlamingoConfig(
        image_token_id=_IMAGE,
        resampler=ResamplerConfig(
            dim=dim // 2, depth=1, heads=2, dim_head=dim_head, num_latents=dim // 4
        ),
        conditioning=ConditioningConfig(heads=2, dim_head=dim_head),
        # Random and frozen it would leave the rest little to learn.
        lm=LanguageModelConfig(
            vocab_size=_VOCAB, dim=dim, depth=2, heads=2, dim_head=dim // 2, is_frozen=False
        ),
    )
    model = Flamingo(config, vision_encoder=VisionEncoder.from_module(_Quarters(), 12))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            # Of small random weights all tokens are about as likely.
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.6 * dim**-0.5)
    return model.to(device)


class Training:
    """Weights with fp32 masters, as `training.TrainStep` updates them; the same at each start.

    Its own step waits for the loss and the norm, to leave out an update that is not finite, and
    for the numbers of tokens: no graph has that. What lies between is here.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        from flamingo_fast.training.config import OptimizerConfig
        from flamingo_fast.training.optimizer import MasterWeights, make_optimizer

        self.model = _make_model(dim, device).to(dtype).train()
        ids = torch.randint(_IMAGE + 1, _VOCAB, (2, dim // 2))
        ids[:, :: ids.shape[1] // 2] = _IMAGE
        self.ids = ids.to(device)
        self.images = torch.randn(2, 2, 3, 8, 8).to(device, dtype)
        self.masters = MasterWeights(self.model)
        self.optimizer = make_optimizer(self.masters.weights, OptimizerConfig(lr=0.064 / dim))
        for group in self.optimizer.param_groups:
            group["capturable"] = device.type == "cuda"
        self._start = [each.detach().clone() for each in self.masters.weights.values()]

    def step(self) -> list[torch.Tensor]:
        """The loss."""
        from flamingo_fast.training.optimizer import clip, global_norm

        self.masters.clear_gradients()
        loss = self.model(self.ids, self.images, labels=self.ids, num_media=[2, 2]).loss
        loss.backward()
        gradients = self.masters.gradients()
        clip(gradients, global_norm(gradients), 1.0)
        self.optimizer.step()
        self.masters.copy_to_model()
        return [loss.detach()]

    @torch.no_grad()
    def restart(self) -> None:
        """Weights and moments as at the start, in the same memory."""
        for weight, start in zip(self.masters.weights.values(), self._start, strict=True):
            weight.copy_(start)
            for moment in self.optimizer.state[weight].values():
                moment.zero_()
        self.masters.copy_to_model()


# Width and steps on each kind of device.
TRAINING = {"cuda": (256, 4), "cpu": (64, 2)}
# Products may have another order of their terms in a graph, and steps make more of it.
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


def check_training(dim: int, dtype: torch.dtype, device: torch.device, steps: int) -> str:
    """Losses of steps that are a graph's are those of calls, and fall."""
    with ff.use_impl("triton"):
        called = Training(dim, dtype, device)
        called.step()
        called.restart()
        with no_waiting(device):
            calls = [called.step()[0] for _ in range(steps)]
        expected = [each.item() for each in calls]
        training = Training(dim, dtype, device)
        (loss,), replay = record(training.step, device)
        training.restart()
        losses = []
        for _ in range(steps):
            replay()
            losses.append(loss.item())
    text = f"losses {_numbers(losses)} of a graph, {_numbers(expected)} of calls"
    if any(
        abs(one - other) > _CLOSE[dtype] * abs(other)
        for one, other in zip(losses, expected, strict=True)
    ):
        raise AssertionError(text)
    if not losses[-1] < 0.9 * losses[0]:
        raise AssertionError(f"the loss does not fall: {text}")
    return text


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def check_decoding(device: torch.device, beams: int, tokens: int) -> str:
    """A graph of a token's step generates what calls do."""
    model = _make_model(64, device).eval()
    ids = torch.tensor([[4, 5, _IMAGE, 7, 8, 9], [5, _IMAGE, 7, _IMAGE, 10, 11]])
    images = torch.randn(3, 3, 8, 8)
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
    dim, steps = TRAINING[device.type]
    for dtype in _CLOSE:
        check = functools.partial(check_training, dim, dtype, device, steps)
        context.attempt(f"training step, {str(dtype).removeprefix('torch.')}", check)
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
