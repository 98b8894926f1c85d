"""A mini Flamingo out of our classes and out of OpenFlamingo's, with the same weights.

One training step (forward, backward, AdamW) and decoding after more and more images, interleaved,
after losses, gradients and logits agreed. The language model is the same code of transformers.
"""

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.bench.correctness import disagreements
from flamingo_fast.bench.patching_models import (
    Case,
    Patches,
    Sizes,
    llama_config,
    open_flamingo,
    open_flamingo_inputs,
    open_gates,
    token_ids,
)
from flamingo_fast.bench.run import peak_bytes
from flamingo_fast.bench.tables import Table, digits
from flamingo_fast.bench.timing import Interval, Sampler, device_clock, interleaved, wall_clock
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import Decoder
from flamingo_fast.models.open_flamingo import load_open_flamingo, open_flamingo_config
from flamingo_fast.models.vision import VisionEncoder

SIZES = Sizes(hidden=512, layers=8, heads=8, intermediate=1408, vocab=8000, features=512, image=112)
TRAIN = Case("train", "train", 4, 256, 5)
SHOTS = (1, 4, 8, 16, 32)
_NEW_TOKENS = 8
_ROUNDS = 9
NAMES = OURS, THEIRS = "ours", "open_flamingo"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One case of both models.

    Attributes:
        seconds: of a step, or of a new token; the i-th of both are from the same round.
        tokens: of text, in that time.
        peak_bytes: that a call holds beside what was there before; None: not measured.
    """

    name: str
    about: str
    seconds: tuple[Sequence[float], Sequence[float]]
    tokens: int
    is_training: bool = False
    peak_bytes: tuple[int, int] | None = None

    @property
    def speedups(self) -> list[float]:
        """How many times faster ours is, by rounds."""
        ours, theirs = self.seconds
        return [their / our for our, their in zip(ours, theirs, strict=True)]


@dataclasses.dataclass
class Results:
    """What came of a run; of a case that disagrees there is a failure and no number.

    Attributes:
        sizes: of the models; `run` sets them.
    """

    measured: list[Measured] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    sizes: Sizes = SIZES


def build_pair(sizes: Sizes, device: torch.device) -> tuple[Flamingo, nn.Module]:
    """Ours and OpenFlamingo's, fp32, with open gates; what OpenFlamingo trains is trained in both.

    Raises:
        ImportError: OpenFlamingo or transformers is not installed.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = open_gates(open_flamingo(sizes)).to(device)
    lang_model = AutoModelForCausalLM.from_config(llama_config(sizes))
    config = open_flamingo_config(
        lang_model, sizes.features, image_token_id=sizes.image_id, eoc_token_id=sizes.eoc_id
    )
    encoder = VisionEncoder.from_module(Patches(sizes.features, pooled=True), sizes.features)
    ours = Flamingo(config, lang_model=lang_model, vision_encoder=encoder)
    ours.lang_model.get_input_embeddings().requires_grad_(True)
    load_open_flamingo(ours, theirs.state_dict())
    return ours.to(device), theirs


def run(
    device: torch.device,
    results: Results,
    *,
    shots: Sequence[int] = SHOTS,
    sizes: Sizes = SIZES,
    train: Case = TRAIN,
    rounds: int = _ROUNDS,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Measures a training step and, after each number of images, a new token, into `results`.

    Raises:
        ImportError: as `build_pair`.
    """
    progress("end to end: building")
    results.sizes = sizes
    ours, theirs = build_pair(sizes, device)
    clock = device_clock(device)
    progress("end to end: training step")
    _train(ours, theirs, train, sizes, clock, rounds, results)
    for model in (ours, theirs):
        model.eval()
    for images in shots:
        progress(f"end to end: decoding after {images} images")
        _decode(ours, theirs, images, sizes, rounds, results)


def train_calls(
    sizes: Sizes, case: Case, device: torch.device
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """A training step of both models, and in what they disagree.

    Raises:
        ImportError: as `build_pair`.
    """
    ours, theirs = build_pair(sizes, device)
    return _train_calls(ours, theirs, case, sizes)


def _train_calls(
    ours: Flamingo, theirs: nn.Module, case: Case, sizes: Sizes
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    device = next(theirs.parameters()).device
    inputs = {
        name: each.to(device)
        for name, each in open_flamingo_inputs(case, sizes, torch.float32).items()
    }
    labels = inputs["lang_x"].masked_fill(inputs["lang_x"] == sizes.image_id, -100)
    losses: dict[str, Callable[[], torch.Tensor]] = {
        OURS: lambda: ours(inputs["lang_x"], videos=inputs["vision_x"], labels=labels).loss,
        THEIRS: lambda: theirs(**inputs, labels=labels).loss,
    }
    models: dict[str, nn.Module] = {OURS: ours, THEIRS: theirs}
    outcomes = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        model.train()
        loss = losses[name]()
        loss.backward()
        outcomes[name] = {"loss": loss.detach()}
        trained = [each for each in model.parameters() if each.requires_grad]
        # A rate at which both stay the same model.
        optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)

        def step(
            loss: Callable[[], torch.Tensor] = losses[name],
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        calls[name] = step
    outcomes[OURS] |= _gradients(ours, {n: each.grad for n, each in ours.named_parameters()})
    outcomes[THEIRS] |= _gradients(ours, _under_our_names(theirs, ours))
    return calls, disagreements(outcomes[OURS], outcomes[THEIRS])


def _train(
    ours: Flamingo,
    theirs: nn.Module,
    case: Case,
    sizes: Sizes,
    clock: Sampler,
    rounds: int,
    results: Results,
) -> None:
    calls, wrong = _train_calls(ours, theirs, case, sizes)
    if wrong:
        results.failures.append(f"end to end, train: {'; '.join(wrong)}")
        return
    device = next(theirs.parameters()).device
    seconds = interleaved(calls, clock, budget_s=0.0, fewest_rounds=rounds)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    results.measured.append(
        Measured(
            "training step",
            f"{case.rows} rows of {case.tokens} tokens and {case.images} images",
            (seconds[OURS], seconds[THEIRS]),
            case.rows * case.tokens,
            True,
            (peaks[OURS], peaks[THEIRS]),
        )
    )
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)


def _under_our_names(theirs: nn.Module, ours: Flamingo) -> dict[str, torch.Tensor]:
    """Their gradients, as a checkpoint of their names is loaded."""
    holder = copy.deepcopy(ours)
    gradients = {n: each.grad for n, each in theirs.named_parameters() if each.grad is not None}
    load_open_flamingo(holder, gradients, strict=False)
    return {name: each.detach() for name, each in holder.named_parameters()}


def _gradients(ours: Flamingo, found: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Of what is trained, 0 where there is none; those of gates are one tensor, as terms of a
    single sum may cancel."""
    gradients = {}
    for name, each in ours.named_parameters():
        if each.requires_grad:
            gradient = found[name]
            gradients[f"gradient of {name}"] = (
                torch.zeros_like(each) if gradient is None else gradient
            )
    gates = [name for name, each in gradients.items() if each.numel() == 1]
    return {
        "gradients of gates": torch.cat([gradients.pop(name) for name in gates]),
        **gradients,
    }


@torch.no_grad()
def _decode(
    ours: Flamingo,
    theirs: Any,
    images: int,
    sizes: Sizes,
    rounds: int,
    results: Results,
) -> None:
    """A new token after `images` shots of 16 tokens; both decode the same given tokens."""
    device = next(ours.parameters()).device
    case = Case("decode", "decode", 1, 1 + 16 * images, images)
    inputs = {
        name: each.to(device)
        for name, each in open_flamingo_inputs(case, sizes, torch.float32).items()
    }
    ids, vision_x = inputs["lang_x"], inputs["vision_x"]
    new = token_ids(Case("new", "decode", 1, _NEW_TOKENS, 0), sizes).to(device)
    logits: dict[str, torch.Tensor] = {}

    def decode_ours() -> Callable[[], None]:
        cache = ours.new_cache(1)
        ours(ids, videos=vision_x, cache=cache, logits_to_keep=1)
        decoder = Decoder(ours, cache, room=_NEW_TOKENS)

        def tokens() -> None:
            logits[OURS] = torch.stack([decoder(each) for each in new.unbind(1)], 1)

        return tokens

    def decode_theirs() -> Callable[[], None]:
        theirs.uncache_media()
        theirs.cache_media(ids, vision_x)
        past = theirs(None, ids, use_cache=True, clear_conditioned_layers=False).past_key_values

        def tokens() -> None:
            kept, found = past, []
            for each in new.split(1, 1):
                out = theirs(
                    None,
                    each,
                    past_key_values=kept,
                    use_cache=True,
                    clear_conditioned_layers=False,
                )
                kept = out.past_key_values
                found.append(out.logits)
            logits[THEIRS] = torch.cat(found, 1)

        return tokens

    once = wall_clock(device, synchronize=True)
    starts = {OURS: decode_ours, THEIRS: decode_theirs}

    def sample(start: Callable[[], object]) -> float:
        # What comes before the new tokens is not timed; and once, as a cache grows with each.
        tokens: Any = start()
        return once(tokens) / _NEW_TOKENS

    for start in starts.values():
        sample(start)
    if wrong := disagreements({"logits": logits[OURS]}, {"logits": logits[THEIRS]}):
        results.failures.append(f"end to end, decode after {images} images: {'; '.join(wrong)}")
        theirs.uncache_media()
        return
    seconds = interleaved(starts, sample, budget_s=0.0, fewest_rounds=rounds)
    theirs.uncache_media()
    results.measured.append(
        Measured(
            f"decode, {images} shots",
            f"a token after {case.tokens} tokens and {images} images",
            (seconds[OURS], seconds[THEIRS]),
            1,
        )
    )


def table(results: Results) -> Table:
    """A row for each case."""
    rows = []
    for each in results.measured:
        ours, theirs = (statistics.median(seconds) for seconds in each.seconds)
        interval = Interval.of_median(each.speedups)
        peaks = [f"{peak / 1e6:.0f}" for peak in each.peak_bytes] if each.peak_bytes else ["", ""]
        rows.append(
            [
                each.name,
                each.about,
                *(digits(1e3 * seconds) for seconds in (theirs, ours)),
                f"{statistics.median(each.speedups):.2f}",
                f"{interval.low:.2f} - {interval.high:.2f}",
                *(digits(each.tokens / seconds) for seconds in (theirs, ours)),
                *reversed(peaks),
            ]
        )
    sizes = results.sizes
    return Table(
        "A mini Flamingo, ours and out of OpenFlamingo's classes",
        (
            *("case", "of", "ms theirs", "ms ours", "x", "interval"),
            *("tokens/s theirs", "tokens/s ours", "MB theirs", "MB ours"),
        ),
        rows,
        2,
        (
            f"Llama of {sizes.layers} layers, {sizes.hidden} wide, vocabulary {sizes.vocab}, a new "
            "layer before each; fp32, the same weights. A training step is a forward, a backward "
            "and AdamW's update. OpenFlamingo projects all images again for each new token.",
            "x: median of the ratios of rounds; MB: what a step holds beside weights and moments.",
        ),
    )


def sentences(results: Results) -> list[str]:
    """What it comes to."""
    found = []
    for each in results.measured:
        if each.is_training:
            assert each.peak_bytes is not None, "of a training step it is measured"
            ours, theirs = each.peak_bytes
            found.append(
                "A training step of a mini Flamingo takes "
                f"1 / {statistics.median(each.speedups):.2f} of the time of the same model out of "
                "OpenFlamingo's classes, and holds "
                f"{ours / theirs:.2f} of the memory."
            )
    if decoding := [each for each in results.measured if not each.is_training]:
        last = decoding[-1]
        found.append(
            f"A new token ({last.name}) takes 1 / {statistics.median(last.speedups):.2f} of theirs."
        )
    return found
