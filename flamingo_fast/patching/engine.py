"""patch, unpatch, patched: which modules of a model get their fast forward."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from flamingo_fast.patching.options import Options
from flamingo_fast.patching.report import PatchReport, ReportEntry
from flamingo_fast.patching.rules import Rule, rule_of
from flamingo_fast.patching.sources import fingerprint
from flamingo_fast.patching.state import (
    attach,
    detach,
    replaced_forward,
    state_of,
    unpatched,
)

UNKNOWN = ("leave", "probe")

_Code = tuple[object, ...]


def patch(
    model: nn.Module,
    *,
    cross_attention: bool = True,
    resampler: bool = True,
    gated_residual: bool = True,
    norm: bool = True,
    media_kv_cache: bool = True,
    unattended: str | None = None,
    dry_run: bool = False,
    unknown: str = "leave",
) -> PatchReport:
    """Gives the modules of a peer's model that we know a faster forward, in place.

    Classes, parameters, state-dict keys, hooks and outputs stay what they are, a peer's quirks
    included; `unpatch` undoes it. It works before and after FSDP2, PEFT and Liger, and before the
    first call of what torch.compile made. A model that is patched already is patched anew.

    Arguments:
        model: with modules of OpenFlamingo, flamingo-pytorch, flamingo-mini, Otter, or of Idefics,
            Idefics2 or Mllama of transformers anywhere in it, or of code that copied or subclasses
            these.
        cross_attention, resampler, gated_residual, norm, media_kv_cache: what to make faster; see
            `Options`.
        unattended: what tokens get that attend to nothing. None: what the peer gives them, be it
            attention to all there is (transformers' Mllama). "zero": nothing from the attention.
            "zero_block": nothing at all, feed-forward included (Meta's Mllama, torchtune).
        dry_run: only report what would be patched.
        unknown: what becomes of modules whose source is no version that we know: "leave" them; or
            "probe": patch those whose forward agrees with ours on a few small random inputs.

    Returns:
        What was patched, what was left, and why.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    _check_model(model)
    if unknown not in UNKNOWN:
        raise ValueError(f"unknown: expected one of {', '.join(UNKNOWN)}; got {unknown!r}")
    options = Options(cross_attention, resampler, gated_residual, norm, media_kv_cache, unattended)
    if dry_run:
        with unpatched(model):
            entries, _ = _look_at(model, options, unknown)
    else:
        unpatch(model)
        entries, to_patch = _look_at(model, options, unknown)
        for module, rule in to_patch:
            attach(module, rule.name, options, rule.forward)
    return PatchReport(type(model).__name__, entries, options, dry_run)


def _look_at(
    model: nn.Module, options: Options, unknown: str
) -> tuple[tuple[ReportEntry, ...], list[tuple[nn.Module, Rule]]]:
    """What the report says of a model that is not patched, and what to patch by which rule."""
    matched = [
        (name, module, rule)
        for name, module in model.named_modules()
        if (rule := rule_of(module)) is not None
    ]
    probed: dict[_Code, str | None] = {}
    entries: dict[str, ReportEntry] = {}
    will_patch: set[int] = set()
    # What a module contains comes before it: it may depend on that.
    for name, module, rule in reversed(matched):
        source = fingerprint(rule.code(module))
        known = rule.known.get(source) if source is not None else None
        reason = _reason_to_leave(rule, module, options, will_patch)
        if reason is None and known is None:
            reason = _unknown(rule, module, options, source, unknown, probed, will_patch)
        if reason is None:
            will_patch.add(id(module))
        entries[name] = ReportEntry(
            name,
            type(module).__name__,
            rule.name,
            reason is None,
            reason or "",
            known or _name_of(source, reason is None),
            tuple(rule.notes(module, options) or ()) if reason is None else (),
        )
    to_patch = [(module, rule) for _, module, rule in matched if id(module) in will_patch]
    return tuple(entries[name] for name, _, _ in matched), to_patch


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def unpatch(model: nn.Module) -> None:
    """Gives all modules of the model their own forwards back; nothing else was changed."""
    for module in model.modules():
        if state_of(module) is not None:
            detach(module)


@contextlib.contextmanager
def patched(model: nn.Module, **options: object) -> Iterator[PatchReport]:
    """`patch` for a while: inside the model is patched, afterwards it is as it was.

    Arguments:
        model, options: those of `patch`.
    """
    _check_model(model)
    with unpatched(model):
        report = patch(model, **options)  # type: ignore[arg-type]
        try:
            yield report
        finally:
            unpatch(model)


def _name_of(source: str | None, was_probed: bool) -> str:
    if source is None:
        return "none to read"
    return f"{'probed' if was_probed else 'unknown'} ({source})"


def _reason_to_leave(
    rule: Rule, module: nn.Module, options: Options, will_patch: set[int]
) -> str | None:
    if not any(getattr(options, feature) for feature in rule.features):
        return " and ".join(f"{feature}=False" for feature in rule.features)
    if (other := replaced_forward(module)) is not None:
        return f"it has a forward of its own, {_code_name(other)}"
    return rule.refuses(module, options, lambda child: id(child) in will_patch)


def _code_name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _unknown(
    rule: Rule,
    module: nn.Module,
    options: Options,
    source: str | None,
    unknown: str,
    probed: dict[_Code, str | None],
    will_patch: set[int],
) -> str | None:
    versions = ", ".join(sorted(set(rule.known.values()))) or "none"
    reason = f"its source is none of those known ({versions})"
    if unknown == "leave" or rule.probes is None:
        return reason + ("; unknown='probe' tries it" if rule.probes is not None else "")
    key = _code_of(rule, module, source)
    if key not in probed:
        probed[key] = _probe(rule, module, options, will_patch)
    return probed[key] and f"{reason}; probed: {probed[key]}"


def _code_of(rule: Rule, module: nn.Module, source: str | None) -> _Code:
    """What modules have in common that one probe is enough for: all but weights.

    Settings, of modules in it too, select branches of the same source.
    """
    settings = tuple(
        (name, value)
        for each in module.modules()
        for name, value in vars(each).items()
        if name != "training" and isinstance(value, int | float | str | None)
    )
    return rule.name, type(module), source or id(module), settings


@torch.no_grad()
def _probe(rule: Rule, module: nn.Module, options: Options, will_patch: set[int]) -> str | None:
    """Why its own forward is not the fast one, as far as small calls show."""
    assert rule.probes is not None
    if any(type(each) is not nn.Parameter or each.is_meta for each in module.parameters()):
        return "its weights are sharded, quantised or on the meta device"
    exact = dataclasses.replace(options, unattended=None)
    modes = [(each, each.training) for each in module.modules()]
    # Its fast forward may count on those of modules in it.
    inner = [
        (each, found)
        for each in module.modules()
        if id(each) in will_patch and (found := rule_of(each)) is not None
    ]
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            for args, kwargs in rule.probes(module):
                ours = _patched_call([(module, rule), *inner], exact, args, kwargs)
                if difference := _difference(ours, module.forward(*args, **kwargs)):
                    return difference
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for each, training in modes:
            each.training = training
    return None


def _patched_call(
    modules: list[tuple[nn.Module, Rule]], options: Options, args: tuple, kwargs: dict
) -> Any:
    """What the first module's fast forward gives, with all of them patched meanwhile."""
    attached = []
    try:
        for module, rule in modules:
            attach(module, rule.name, options, rule.forward)
            attached.append(module)
        return modules[0][0].forward(*args, **kwargs)
    finally:
        for module in attached:
            detach(module)


def _difference(ours: Any, theirs: Any) -> str | None:
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    if len(ours) != len(theirs):
        return f"{len(ours)} results, not {len(theirs)}"
    for mine, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            continue
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return f"a result of {tuple(mine.shape)}, not {tuple(other.shape)}"
        error = (mine.double() - other.double()).abs().max()
        # Sums in another order; bugs are larger.
        limit = 200 * torch.finfo(other.dtype).eps * other.double().abs().max()
        if not error <= limit:
            return f"results differ by {float(error):.2g}"
    return None
