"""What a profiling session runs, by name: a training step, decoding, an op, a peer's model.

train[:SCALE]                 a step of table 3's baseline, at scale mini unless said otherwise
table3:ROW[:SCALE]            a step of another of its rows
decode[:SCALE]                a prompt of its interleaved data, and 8 new tokens after it
OP[:SHAPE[:DTYPE[:MODE]]]     of the bench registry, such as
                              masked_cross_attention:4x256x5x8x64x64:bf16:fwd
PEER.CASE[:unpatched[:DTYPE]] of `flamingo-fast bench patch`, such as open_flamingo.prefill_16
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flamingo_fast.bench import patching, patching_models, plan
from flamingo_fast.bench.registry import DTYPES, MODES, Case, shape_name
from flamingo_fast.bench.table3_scales import SCALES
from flamingo_fast.bench.table3_steps import Step, precision_of, synthetic_batch
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import generate
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.ranges import span

_NEW_TOKENS = 8
FORMS = "train[:SCALE], table3:ROW[:SCALE], decode[:SCALE], OP[:SHAPE[:DTYPE[:MODE]]], PEER.CASE"


class TargetError(ValueError):
    """A name that is no target; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is run.

    Attributes:
        name: in full, with what was left to us.
        step: one call of it.
        model: whose parts are to be named; None of an op.
        case, mode: of an op, from the bench registry.
    """

    name: str
    step: Callable[[], object]
    model: nn.Module | None = None
    case: Case | None = None
    mode: str = ""

    def work(self) -> list[dict[str, Any]]:
        """What each of our kernels does in a step; [] of models: their launches differ."""
        if self.case is None:
            return []
        from flamingo_fast.profiling.kernel_work import work_of_case

        return work_of_case(self.case, self.mode)


def check_target(name: str) -> None:
    """Without building it.

    Raises:
        TargetError: it is none.
    """
    _parsed(name)


def build_target(name: str, device: torch.device) -> Target:
    """Random weights and inputs, the same in every run.

    Raises:
        TargetError: it is none.
        ImportError: something that it needs is not installed.
    """
    return _parsed(name)(device)


_Build = Callable[[torch.device], Target]


def _parsed(name: str) -> _Build:
    kind, *options = name.split(":")
    if kind in ("train", "table3", "decode"):
        return _parsed_model(name, kind, options)
    if "." in kind:
        return _parsed_peer(name, kind, options)
    return _parsed_op(name, kind, options)


def _parsed_model(name: str, kind: str, options: list[str]) -> _Build:
    row = "baseline"
    if kind == "table3":
        if not options:
            raise TargetError(f"target {name!r}: expected table3:ROW[:SCALE]")
        row, *options = options
    scale, *rest = options or ["mini"]
    _expect(name, "row", row, table3_configs())
    _expect(name, "scale", scale, SCALES)
    if rest:
        raise TargetError(f"target {name!r}: expected nothing after the scale, got {rest[0]!r}")
    if kind == "decode":
        return lambda device: _decode(f"decode:{scale}", scale, device)
    full = f"train:{scale}" if kind == "train" else f"table3:{row}:{scale}"
    return lambda device: _train(full, row, scale, device)


def _train(name: str, row: str, scale: str, device: torch.device) -> Target:
    step = Step(SCALES[scale].config(table3_configs()[row]), SCALES[scale], device)
    return Target(name, step, step.train_step.model)


def _decode(name: str, scale_name: str, device: torch.device) -> Target:
    scale = SCALES[scale_name]
    config = scale.config(table3_configs()["baseline"])
    dtype = torch.float32 if precision_of(scale, device) == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    model = Flamingo(config, device=device, dtype=dtype).eval()
    prompt = dataclasses.replace(scale.passes(config)["m3w"], samples=1)
    batch = synthetic_batch(config, prompt, device)

    def step() -> object:
        with torch.no_grad(), span("generate"):
            return generate(
                model,
                batch.input_ids,
                videos=batch.pixels,
                num_media=batch.num_media,
                max_new_tokens=_NEW_TOKENS,
                stop_token_ids=(),
            )

    return Target(name, step, model)


def _parsed_op(name: str, op: str, options: list[str]) -> _Build:
    if op not in plan.BENCHMARKS:
        raise TargetError(f"target {name!r}: expected {FORMS}; ops: {', '.join(plan.BENCHMARKS)}")
    benchmark = plan.BENCHMARKS[op]
    defaults = [shape_name(benchmark.shapes[0]), "", "fwd_bwd"]
    if len(options) > len(defaults):
        raise TargetError(f"target {name!r}: expected OP[:SHAPE[:DTYPE[:MODE]]]")
    shape, dtype, mode = (*options, *defaults[len(options) :])
    if dtype:
        _expect(name, "dtype", dtype, DTYPES)
    _expect(name, "mode", mode, MODES)
    try:
        (chosen,) = plan.make_plan(ops=[op], shapes=[shape], dtypes=[dtype or "fp32"]).cases
    except ValueError as error:
        raise TargetError(f"target {name!r}: {error}") from None

    def build(device: torch.device) -> Target:
        precision = dtype or ("bf16" if device.type == "cuda" else "fp32")
        case = Case(benchmark, chosen[1], precision, device)
        full = f"{op}:{shape}:{precision}:{mode}"
        call = case.call(case.benchmark.ours, mode)
        return Target(full, call, case=case, mode=mode)

    return build


def _parsed_peer(name: str, peer_case: str, options: list[str]) -> _Build:
    try:
        ((peer, cases),) = patching_models.selected((peer_case,), quick=False)
    except ValueError as error:
        raise TargetError(f"target {name!r}: {error}") from None
    version, dtype, *rest = (*options, *("patched", "fp32")[len(options) :])
    _expect(name, "version", version, ("patched", "unpatched"))
    _expect(name, "dtype", dtype, DTYPES)
    if rest:
        raise TargetError(f"target {name!r}: expected PEER.CASE[:unpatched[:DTYPE]]")

    def build(device: torch.device) -> Target:
        case = cases[0]
        full = f"{peer_case}:{version}:{dtype}"
        model, step = patching.one_call(
            peer, case, patching_models.Sizes(), DTYPES[dtype], device, patched=version == "patched"
        )
        return Target(full, step, model)

    return build


def _expect(name: str, what: str, value: str, known: Any) -> None:
    if value not in known:
        raise TargetError(
            f"target {name!r}: expected a {what} of {', '.join(known)}; got {value!r}"
        )
