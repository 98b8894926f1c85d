"""Peers' whole models before and after `patch`: the same results first, then how long both take.

Both are in one process and share their weights; they take turns, in random order, and ratios are
of pairs of calls in the same turn.
"""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flamingo_fast.bench import records
from flamingo_fast.bench.correctness import disagreements
from flamingo_fast.bench.patching_models import Case, Peer, Sizes, build, token_ids
from flamingo_fast.bench.records import Environment, Measurement
from flamingo_fast.bench.registry import DTYPES
from flamingo_fast.bench.tables import Table, digits
from flamingo_fast.bench.timing import MIN_ROUNDS, Quantiles, interleaved, paired_ratios
from flamingo_fast.errors import one_line
from flamingo_fast.patching import PatchReport, patch
from flamingo_fast.testing.compare import compare

Outcomes = dict[str, torch.Tensor]

_UNPATCHED, _PATCHED = "unpatched", "patched"
# Of fewer an interval of the median says little: of six its confidence is 97 %.
_QUICK_ROUNDS = 6
_BUDGET_S = 20.0
# Of fp32 gradients of a whole model, and of their largest elements. Of the millions of a ReLU's
# inputs a few are 0 but for rounding: whether one counts changes a row of its layer's gradients by
# what a token gives it, and all in layers before it.
_GRADIENT_TOLERANCE, _LARGEST_GRADIENT_TOLERANCE = 1e-2, 3e-2
# Elements that are compared at once: of logits in fp64, a few copies.
_BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one case in one dtype.

    Attributes:
        modules: how many were patched.
        seconds, cpu_seconds: unpatched and patched, by the wall clock and the process's, of all
            its threads; the i-th of both are from the same round.
    """

    peer: str
    case: Case
    dtype: str
    modules: int
    seconds: tuple[list[float], list[float]]
    cpu_seconds: tuple[list[float], list[float]]

    @property
    def speedup(self) -> Quantiles:
        return paired_ratios(*self.seconds)

    @property
    def cpu_speedup(self) -> Quantiles:
        return paired_ratios(*self.cpu_seconds)

    def measurements(self) -> Iterator[Measurement]:
        for provider, seconds in zip((_UNPATCHED, _PATCHED), self.seconds, strict=True):
            metrics = {("time", "ms"): Quantiles.of(1e3 * second for second in seconds)}
            if provider == _PATCHED:
                metrics["speedup", "x"] = self.speedup
                metrics["cpu_time_speedup", "x"] = self.cpu_speedup
            for (metric, unit), value in metrics.items():
                yield Measurement(
                    f"patch_{self.peer}",
                    provider,
                    self.case.name,
                    self.case.shape,
                    self.dtype,
                    metric,
                    unit,
                    value,
                )


@dataclasses.dataclass
class Results:
    """What came of a run.

    Attributes:
        about: sizes of the models, by name.
        failures: cases whose patched model computes something else, or raised; without numbers.
        notes: what was not measured, and why.
    """

    device: torch.device
    environment: Environment
    about: dict[str, str] = dataclasses.field(default_factory=dict)
    measured: list[Measured] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    is_interrupted: bool = False


def run(
    chosen: Sequence[tuple[Peer, Sequence[Case]]],
    dtypes: Sequence[str],
    device: torch.device,
    *,
    quick: bool = False,
    sizes: Sizes | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Results:
    """Measures these cases; `progress` is told what comes next.

    Arguments:
        quick: six rounds of a case, where there are 15 or more.
    """
    sizes = sizes or Sizes()
    results = Results(device, records.environment(device))
    try:
        for (peer, cases), dtype in itertools.product(chosen, dtypes):
            progress(f"{peer.name} {dtype}: building")
            _measure_peer(peer, cases, dtype, sizes, quick, results, progress)
    except KeyboardInterrupt:
        results.is_interrupted = True
    return results


def _measure_peer(
    peer: Peer,
    cases: Sequence[Case],
    dtype: str,
    sizes: Sizes,
    quick: bool,
    results: Results,
    progress: Callable[[str], None],
) -> None:
    try:
        unpatched = build(peer, sizes, DTYPES[dtype], results.device)
        patched = _sharing_copy(unpatched)
        modules = patch(patched)
    except ImportError as error:
        results.notes.append(f"{peer.name} was not measured: {error}")
        return
    # What PyTorch raises when memory runs out; and what a model may raise, patched or not.
    except Exception as error:
        results.failures.append(f"{peer.name} {dtype}: {one_line(error)}")
        return
    results.about[peer.name] = peer.about(sizes)
    if not modules.patched:
        results.notes.append(f"{peer.name} {dtype} was not measured: {_why_left(modules)}")
        return
    for case in (case.shrunk(sizes) for case in cases):
        name = f"{peer.name}.{case.name} {dtype}"
        progress(name)
        try:
            work = _Work(peer, case, sizes, DTYPES[dtype], results.device)
            if wrong := work.problems(unpatched, patched):
                results.failures.append(f"{name}: {'; '.join(wrong)}")
                continue
            seconds, cpu_seconds = work.times(unpatched, patched, quick)
        except Exception as error:
            results.failures.append(f"{name}: {one_line(error)}")
            continue
        number = len(modules.patched)
        results.measured.append(Measured(peer.name, case, dtype, number, seconds, cpu_seconds))


def calls(
    peer: Peer, case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], Outcomes]], list[str]]:
    """A case of a model, "unpatched" and "patched"; and in what they disagree.

    Of "decode" they are all of `generate`, the prompt's forward among it.

    Raises:
        ImportError: the model can't be had.
    """
    unpatched = build(peer, sizes, dtype, device)
    patched = _sharing_copy(unpatched)
    patch(patched)
    work = _Work(peer, case, sizes, dtype, device)
    wrong = work.problems(unpatched, patched)
    return work.calls(unpatched, patched), wrong


def one_call(
    peer: Peer,
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    patched: bool,
) -> tuple[nn.Module, Callable[[], Outcomes]]:
    """A model, patched or not, and a call of a case with it.

    Raises:
        ImportError: the model can't be had.
    """
    model = build(peer, sizes, dtype, device)
    if patched:
        patch(model)
    work = _Work(peer, case, sizes, dtype, device)
    return model, lambda: work.call(model, work.inputs)


def _sharing_copy(model: nn.Module) -> nn.Module:
    """Other modules, with the same parameters and buffers: as much memory as one model."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _why_left(modules: PatchReport) -> str:
    reasons = dict.fromkeys(entry.reason for entry in modules.left)
    return "nothing in it was patched" + "".join(f"; {reason}" for reason in reasons)


class _Clock:
    """Seconds by the wall clock and the process's, from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def start(self) -> None:
        self._wall, self._cpu = self._now()

    def stop(self) -> tuple[float, float]:
        wall, cpu = self._now()
        return wall - self._wall, cpu - self._cpu


class _Given:
    """Of `generate`: whatever the logits, these tokens; the clock starts when it has the first.

    So decoding is timed without what comes before, and what a 16-bit dtype rounds to another token
    changes nothing that follows.
    """

    def __init__(self, tokens: torch.Tensor, clock: _Clock) -> None:
        self.tokens, self.clock = iter(tokens.unbind(1)), clock
        self.is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            self.clock.start()
            self.is_first = False
        chosen = next(self.tokens)[:, None]
        return torch.full_like(scores, -float("inf")).scatter(1, chosen, 0.0)


class _Work:
    """One case: its inputs, and calls of a model with them."""

    def __init__(
        self, peer: Peer, case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._peer, self._case, self._dtype = peer, case, dtype
        self._clock = _Clock(device)
        self.inputs = self._on(device, peer.inputs(case, sizes, dtype))
        count = case.new_tokens + 1
        self._new_tokens = token_ids(dataclasses.replace(case, tokens=count, images=0), sizes).to(
            device
        )

    @staticmethod
    def _on(where: torch.device | torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those that are floating-point numbers, for a dtype."""
        found = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                needs_grad = value.requires_grad
                if isinstance(where, torch.device) or value.is_floating_point():
                    value = value.detach().to(where).requires_grad_(needs_grad)
            found[name] = value
        return found

    def call(self, model: nn.Module, inputs: dict[str, Any]) -> Outcomes:
        """The logits, or the loss, whose gradients are in the parameters then."""
        case = self._case
        if case.mode == "train":
            model.zero_grad(set_to_none=True)
            for value in inputs.values():
                if isinstance(value, torch.Tensor):
                    value.grad = None
            loss = self._peer.loss(model, inputs)
            loss.backward()
            return {"loss": loss.detach()}
        with torch.no_grad():
            if case.mode == "prefill":
                return {"logits": self._peer.forward(model, inputs)}
            generated = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=case.new_tokens + 1,
                do_sample=False,
                logits_processor=[_Given(self._new_tokens, self._clock)],
                output_logits=True,
                return_dict_in_generate=True,
            )
        return {"logits": torch.stack(generated.logits, 1)}

    def _outcomes(self, model: nn.Module, inputs: dict[str, Any]) -> Outcomes:
        """What `call` gives, and gradients; those of single numbers, gates, are one tensor."""
        found = self.call(model, inputs)
        if self._case.mode != "train":
            return found
        # One number, right to more than its terms' 16 bits by luck alone.
        found["loss"] = found["loss"].to(next(model.parameters()).dtype)
        leaves = {**dict(model.named_parameters()), **inputs}
        single = []
        for name, leaf in leaves.items():
            gradient = getattr(leaf, "grad", None)
            if gradient is not None and gradient.numel() == 1:
                single.append(gradient.reshape(()))
            elif gradient is not None:
                found[f"gradient of {name}"] = gradient
        if single:
            # A sum whose terms cancel is off by more than its own size tells.
            found["gradients of gates"] = torch.stack(single)
        model.zero_grad(set_to_none=True)
        return found

    def problems(self, unpatched: nn.Module, patched: nn.Module) -> list[str]:
        """How the patched model's results differ, a line for each tensor.

        In fp32 by the tolerance of the other benchmarks, gradients by their own; in 16 bits by the
        three-way rule, beside the same weights in fp32, as the error of a whole model may be larger
        than that.
        """
        for model in (unpatched, patched):
            model.train(self._case.mode == "train")
        theirs = self._outcomes(unpatched, self.inputs)
        ours = self._outcomes(patched, self.inputs)
        if ours.keys() != theirs.keys():
            return [f"other tensors: {sorted(ours.keys() ^ theirs.keys())}"]
        if self._dtype == torch.float32:
            gradients = {name: each for name, each in ours.items() if name.startswith("gradient")}
            others = {name: each for name, each in ours.items() if name not in gradients}
            return [
                *disagreements(others, theirs),
                *disagreements(gradients, theirs, _GRADIENT_TOLERANCE, _LARGEST_GRADIENT_TOLERANCE),
            ]
        exact = self._outcomes(
            copy.deepcopy(unpatched).float(), self._on(torch.float32, self.inputs)
        )
        return [
            str(found)
            for name in theirs
            for parts in zip(*(_blocks(each[name]) for each in (ours, theirs, exact)), strict=True)
            if not (found := compare(name, *parts)).is_close
        ]

    def calls(self, unpatched: nn.Module, patched: nn.Module) -> dict[str, Callable[[], Outcomes]]:
        return {
            _UNPATCHED: lambda: self.call(unpatched, self.inputs),
            _PATCHED: lambda: self.call(patched, self.inputs),
        }

    def times(
        self, unpatched: nn.Module, patched: nn.Module, quick: bool
    ) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
        """Of unpatched and patched, by the wall clock; and by the process's."""
        calls = self.calls(unpatched, patched)
        cpu_seconds: dict[Callable[[], object], list[float]] = {call: [] for call in calls.values()}
        steps = self._case.new_tokens or 1

        def sample(call: Callable[[], object]) -> float:
            self._clock.start()
            result = call()
            seconds, of_cpu = self._clock.stop()
            del result
            cpu_seconds[call].append(of_cpu / steps)
            return seconds / steps

        seconds = interleaved(
            calls,
            sample,
            budget_s=0.0 if quick else _BUDGET_S,
            fewest_rounds=_QUICK_ROUNDS if quick else MIN_ROUNDS,
        )
        unpatched.zero_grad(set_to_none=True)
        rounds = len(seconds[_PATCHED])
        of_cpu = (cpu_seconds[calls[name]][-rounds:] for name in (_UNPATCHED, _PATCHED))
        first, second = of_cpu
        return (seconds[_UNPATCHED], seconds[_PATCHED]), (first, second)


def _blocks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.flatten().split(_BLOCK)


def table(results: Results) -> Table:
    """A row for each case."""
    rows = []
    for each in results.measured:
        before, after = (1e3 * statistics.median(seconds) for seconds in each.seconds)
        low, *_, high = statistics.quantiles(
            (b / a for b, a in zip(*each.seconds, strict=True)), n=20, method="inclusive"
        )
        rows.append(
            [
                *(each.peer, each.case.name, each.case.shape, each.dtype, str(each.modules)),
                *(digits(before), digits(after), f"{each.speedup.p50:.2f}"),
                *(f"{low:.2f} - {high:.2f}", f"{each.cpu_speedup.p50:.2f}"),
                str(each.speedup.samples),
            ]
        )
    return Table(
        "Peers' models before and after patch",
        (
            *("model", "case", "shape", "dtype", "modules"),
            *("ms before", "ms after", "x", "5 - 95 %", "x, CPU time", "pairs"),
        ),
        rows,
        4,
        (
            "shape: rows x tokens (+ new ones) of text, and images of a row.",
            "modules: so many were patched.",
            "ms: of a forward (prefill), a new token (decode), a forward and a backward (train).",
            "x: median of the ratios of pairs of calls; above 1 the patched model is faster.",
            "x, CPU time: the same of the process's time, which other processes change less.",
            *(f"{name}: {about}." for name, about in results.about.items()),
        ),
    )
