"""What `flamingo-fast bench` can measure, by name: each suite gives parts of one report."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flamingo_fast.bench import (
    attention,
    end_to_end,
    growth,
    latent,
    memory,
    modules,
    packed_training,
    patching,
    patching_models,
    plan,
    plot,
    report,
    run,
    several_media,
    whole_model,
)
from flamingo_fast.bench.registry import DTYPES
from flamingo_fast.bench.section import Figure, Ratio, Section
from flamingo_fast.bench.settings import RAISED, Progress, Settings, Suite
from flamingo_fast.bench.table3_suite import check_table3, measure_table3, seconds_of_table3
from flamingo_fast.errors import one_line

# Of a headline, over all of its cases: rounds next to each other are more alike than runs are.
_PASSES = 7
_DECODE = "GatedCrossAttentionBlock_decode"
_MODULES = tuple(name for name in modules.BENCHMARKS if name != _DECODE)


def _names_of(suite: str) -> tuple[str, ...]:
    others = (*_MODULES, _DECODE)
    names = {"modules": _MODULES, "decode": (_DECODE,)}
    return names.get(suite) or tuple(name for name in plan.BENCHMARKS if name not in others)


def _plan(settings: Settings, suite: str) -> plan.Plan | None:
    """None: the user chose others than its ops.

    Raises:
        ValueError: see `plan.make_plan`.
    """
    names = _names_of(suite)
    options: dict[str, Any] = {
        "dtypes": settings.dtypes,
        "modes": settings.modes,
        "providers": settings.providers,
        "quick": settings.quick,
    }
    if settings.op_shapes:
        plans = [
            plan.make_plan(ops=[op], shapes=[shape], left_out=plan.COMPILED, **options)
            for op, shape in settings.op_shapes
            if op in names
        ]
        return dataclasses.replace(plan.joined(plans), passes=_PASSES) if plans else None
    # Of all ops' names and shapes, a mistake is found out whatever the suite.
    chosen = plan.make_plan(ops=settings.ops, shapes=settings.shapes, **options)
    cases = tuple(case for case in chosen.cases if case[0].name in names)
    return dataclasses.replace(chosen, cases=cases) if cases else None


def _growth_plan(settings: Settings) -> plan.Plan:
    return plan.make_plan(
        ops=settings.ops,
        shapes=settings.shapes,
        dtypes=settings.dtypes,
        modes=settings.modes,
        providers=settings.providers,
        quick=settings.quick,
        growth=True,
    )


def _timed(settings: Settings, progress: Progress, chosen: plan.Plan, name: str) -> run.Results:
    total, done = len(chosen.cases) * chosen.passes + len(chosen.benchmarks) + 1, 0

    def tell(text: str) -> None:
        nonlocal done
        progress(f"{name}: {text}", min(done / total, 1.0))
        done += 1

    return run.run(chosen, settings.device, tell)


def section_of(name: str, title: str, results: run.Results) -> Section:
    """Of a run of ops."""
    found = Section(name, title, is_interrupted=results.is_interrupted)
    found.tables = report.tables(results)
    found.notes, found.failures = list(results.notes), list(results.failures)
    found.measurements = results.measurements
    found.not_measured = [
        (f"{provider} ({', '.join(ops)})", reason)
        for (provider, reason), ops in results.unavailable.items()
    ]
    found.ratios = [
        Ratio.of_pairs(f"{case} {mode}", "x vs eager", pairs, _level(f"{case} {mode}"))
        for (case, mode, provider), pairs in results.pairs.items()
        if provider == "ours"
    ]
    return found


def _level(case: str) -> str:
    for level, (op, shape) in {"kernel": KERNEL, "block": BLOCK}.items():
        if case == f"{op} {shape} {CHAIN_MODE}":
            return level
    return ""


def _ops(suite: str, title: str) -> Callable[[Settings, Progress], Iterator[Section]]:
    def measure(settings: Settings, progress: Progress) -> Iterator[Section]:
        chosen = _plan(settings, suite)
        if chosen is None:
            return
        results = _timed(settings, progress, chosen, suite)
        section = section_of(suite, title, results)
        if drawn := plot.plot(results):
            section.figures.append(Figure.of(suite, "How near each comes to copying", drawn))
        yield section

    return measure


def _ops_seconds(suite: str) -> Callable[[Settings], float]:
    def seconds(settings: Settings) -> float:
        chosen = _plan(settings, suite)
        each = 1.0 if settings.quick else 15.0 if settings.op_shapes == () else 5.0
        return each * len(chosen.cases) * len(chosen.modes) if chosen else 0.0

    return seconds


def _growth(settings: Settings, progress: Progress) -> Iterator[Section]:
    chosen = _growth_plan(settings)
    results = _timed(settings, progress, chosen, "growth")
    section = section_of("growth", "Growth", results)
    # Of a curve no single ratio stands for it.
    section.ratios = []
    section.tables = [each for each in section.tables if each.title != report.MEASURED]
    section.tables.insert(0, growth.table(results))
    for benchmark in chosen.benchmarks:
        if drawn := plot.plot_growth(results, benchmark.name):
            name = f"growth_{benchmark.name}"
            section.figures.append(Figure.of(name, benchmark.name, drawn))
    yield section


def _memory(settings: Settings, progress: Progress) -> Iterator[Section]:
    section = Section("memory", "Memory")
    found = memory.Results()
    dtypes = settings.dtypes or ("fp32",)
    try:
        memory.run(settings.device, dtypes, found, quick=settings.quick, progress=progress)
    except KeyboardInterrupt:
        section.is_interrupted = True
    except RAISED as error:
        found.failures.append(one_line(error))
    section.tables, section.failures = [memory.table(found)], found.failures
    section.not_measured = found.not_measured
    yield section


def _model(settings: Settings, progress: Progress) -> Iterator[Section]:
    section = Section("model", "Whole models")
    shots = (1, 4) if settings.quick else end_to_end.SHOTS
    done = 0

    def tell(text: str) -> None:
        nonlocal done
        progress(text, min(done / (2 + len(shots)), 1.0))
        done += 1

    found = end_to_end.Results()
    rounds = 9 if settings.quick else 15
    try:
        end_to_end.run(settings.device, found, shots=shots, rounds=rounds, progress=tell)
    except ImportError as error:
        section.not_measured.append(("OpenFlamingo's classes", str(error)))
    except KeyboardInterrupt:
        section.is_interrupted = True
    except RAISED as error:
        found.failures.append(one_line(error))
    section.tables, section.failures = [end_to_end.table(found)], found.failures
    section.ratios = [
        Ratio.of_pairs(
            f"mini Flamingo, {each.name}",
            "x vs OpenFlamingo's",
            each.speedups,
            "model" if each.is_training else "",
        )
        for each in found.measured
    ]
    section.sentences = end_to_end.sentences(found)
    yield section
    if settings.preset is not None and not section.is_interrupted:
        dtype = DTYPES[(settings.dtypes or ("bf16",))[0]]
        steps = whole_model.run(settings.preset, dtype, settings.device)
        whole = Section("preset", f"{settings.preset} with random weights")
        whole.tables = [whole_model.table(settings.preset, dtype, steps)]
        yield whole


def _packing(settings: Settings, progress: Progress) -> Iterator[Section]:
    progress("packing", 0.0)
    section = Section("packing", "Packed pairs")
    section.tables = [packed_training.table(packed_training.run(settings.device))]
    yield section


def _patch(settings: Settings, progress: Progress) -> Iterator[Section]:
    chosen = patching_models.selected(settings.cases, settings.quick)
    dtypes = settings.dtypes or ("fp32", "bf16")
    total, done = sum(1 + len(cases) for _, cases in chosen) * len(dtypes), 0

    def tell(text: str) -> None:
        nonlocal done
        progress(f"patch: {text}", min(done / total, 1.0))
        done += 1

    results = patching.run(chosen, dtypes, settings.device, quick=settings.quick, progress=tell)
    section = Section("patch", "Peers' models, patched", is_interrupted=results.is_interrupted)
    section.tables = [patching.table(results)]
    section.failures, section.notes = results.failures, results.notes
    for each in results.measured:
        section.measurements += each.measurements()
        name = f"{each.peer}.{each.case.name} {each.dtype}"
        pairs = [before / after for before, after in zip(*each.seconds, strict=True)]
        section.ratios.append(Ratio.of_pairs(name, "x after patch", pairs))
    yield section


def sections(suite: Suite, settings: Settings, progress: Progress) -> Iterator[Section]:
    """A suite's; of what it raises there is a last one, as what comes after is worth its time."""
    try:
        yield from suite.run(settings, progress)
    except KeyboardInterrupt:
        yield Section(suite.name, suite.name, is_interrupted=True)
    except ImportError as error:
        yield Section(suite.name, suite.name, not_measured=[(suite.name, str(error))])
    except RAISED as error:
        yield Section(suite.name, suite.name, failures=[one_line(error)])


def _headline(settings: Settings, progress: Progress) -> Iterator[Section]:
    """One case of each family, those of the other suites."""
    parts = _headline_parts(settings)
    total, done = sum(part.seconds(each) for part, each in parts), 0.0
    for part, each in parts:
        share = part.seconds(each) / total

        def tell(text: str, fraction: float, done: float = done, share: float = share) -> None:
            progress(text, done + share * fraction)

        for section in sections(part, each, tell):
            yield section
            if section.is_interrupted:
                return
        done += share


# A kernel, the block around it and a model around that, of alike sizes: see `runner`'s Amdahl.
KERNEL = (attention.NAME, "4x256x5x8x64x64")
BLOCK = ("GatedCrossAttentionBlock", "4x256x5x1024x1024")
CHAIN_MODE = "fp32 fwd_bwd"
_HEADLINE_OPS = (
    KERNEL,
    (several_media.MLLAMA, "1x256x1x8x2x128x4x401"),
    (latent.NAME, "4x64x256x8x8x64x256"),
    ("gated_residual_layer_norm", "2048x2048"),
    BLOCK,
    ("PerceiverResampler", "1x1x8x256x512x2"),
    (_DECODE, "1x1x32x1024x1024"),
)


def _headline_parts(settings: Settings) -> list[tuple[Suite, Settings]]:
    base = dataclasses.replace(
        settings, dtypes=settings.dtypes or ("fp32",), op_shapes=_HEADLINE_OPS, preset=None
    )
    growing = dataclasses.replace(
        base, ops=(attention.NAME,), providers=("ours",), modes=("fwd",), op_shapes=()
    )
    return [
        (SUITES["ops"], base),
        (SUITES["modules"], base),
        (SUITES["decode"], base),
        (SUITES["growth"], growing),
        (SUITES["memory"], base),
        (SUITES["model"], dataclasses.replace(base, quick=True)),
        (
            SUITES["patch"],
            dataclasses.replace(base, quick=True, cases=("open_flamingo.decode_16",)),
        ),
    ]


def _check_dtypes(settings: Settings) -> None:
    plan.check_dtypes(settings.dtypes)


def _check_patch(settings: Settings) -> None:
    _check_dtypes(settings)
    patching_models.selected(settings.cases, settings.quick)


_OP_OPTIONS = ("ops", "shapes", "dtypes", "modes", "providers")

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "ops",
            "each op against PyTorch's and others'",
            _ops("ops", "Ops"),
            _ops_seconds("ops"),
            lambda settings: _plan(settings, "ops"),
            _OP_OPTIONS,
        ),
        Suite(
            "modules",
            "modules against OpenFlamingo's and flamingo-pytorch's",
            _ops("modules", "Modules"),
            _ops_seconds("modules"),
            lambda settings: _plan(settings, "modules"),
            _OP_OPTIONS,
        ),
        Suite(
            "decode",
            "one token's step through a block",
            _ops("decode", "Decoding"),
            _ops_seconds("decode"),
            lambda settings: _plan(settings, "decode"),
            _OP_OPTIONS,
        ),
        Suite(
            "model",
            "a mini Flamingo against OpenFlamingo's classes: a training step, decoding",
            _model,
            lambda settings: 30.0 if settings.quick else 90.0,
            _check_dtypes,
            ("preset", "dtypes"),
        ),
        Suite(
            "memory",
            "what calls hold, and what they keep for the backward",
            _memory,
            lambda settings: 10.0,
            _check_dtypes,
            ("dtypes",),
        ),
        Suite(
            "growth",
            "time and memory against images, text, frames, batch and shots",
            _growth,
            lambda settings: 12.0 * len(_growth_plan(settings).cases),
            _growth_plan,
            _OP_OPTIONS,
        ),
        Suite(
            "patch",
            "peers' whole models before and after patch",
            _patch,
            lambda settings: (
                (25.0 if settings.quick else 90.0)
                * sum(len(c) for _, c in patching_models.selected(settings.cases, settings.quick))
                * len(settings.dtypes or ("fp32", "bf16"))
            ),
            _check_patch,
            ("cases", "dtypes"),
        ),
        Suite(
            "packing",
            "training on image-text pairs, several in a row or one",
            _packing,
            lambda settings: 60.0,
            _check_dtypes,
        ),
        Suite(
            "table3",
            "the paper's table 3: measured step times beside printed and predicted ones",
            measure_table3,
            seconds_of_table3,
            check_table3,
            ("scale", "rows", "pairs", "impl", "data", "resume"),
        ),
        Suite(
            "headline",
            "one case of each of the others but table3",
            _headline,
            lambda settings: sum(part.seconds(each) for part, each in _headline_parts(settings)),
            _check_dtypes,
            ("dtypes",),
        ),
    )
}
ALL = tuple(name for name in SUITES if name != "headline")


def check(names: Sequence[str], settings: Settings) -> None:
    """Whether these suites can be run so.

    Raises:
        ValueError: a suite that there is not; settings that one of them can't run with, that none
            of them minds, or that leave nothing to measure.
    """
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite: expected some of {', '.join((*SUITES, 'all'))}; got {name!r}")
    minded = {option for name in names for option in SUITES[name].options}
    defaults = Settings(settings.device)
    for option in dict.fromkeys(each for suite in SUITES.values() for each in suite.options):
        if option not in minded and getattr(settings, option) != getattr(defaults, option):
            of = [suite.name for suite in SUITES.values() if option in suite.options]
            raise ValueError(
                f"{option}: expected one of the suites {', '.join(of)} with it; got "
                f"{', '.join(names)}"
            )
    for name in names:
        SUITES[name].check(settings)
    if not any(SUITES[name].seconds(settings) for name in names):
        raise ValueError(f"suite: {', '.join(names)} have nothing to measure with these options")
