"""Computes the tables of the documentation and writes them into its pages.

`python docs/make_tables.py` rewrites what is between `<!-- table NAME -->` and `<!-- end -->`;
with `--check` it changes nothing and exits with 1 if a page has other numbers.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flamingo_fast.bench import attention, latent, ops, several_media
from flamingo_fast.bench.registry import shape_name
from flamingo_fast.bench.tables import digits
from flamingo_fast.kernels.launch import Target
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.params import ParameterRow, preset_rows, table3_rows
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.work import DATASETS, step_flops
from flamingo_fast.patching import rules
from flamingo_fast.profiling.kernel_work import work_of_calls
from flamingo_fast.profiling.launches import calls_of, launches_of
from flamingo_fast.testing.occupancy import ARCHITECTURES
from flamingo_fast.training.config import ParallelConfig
from flamingo_fast.training.plan import Plan, plan

PAGES = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table (\S+)(?: ([^>]*?))? -->\n)(.*?)(<!-- end -->)", re.S)

BENCHMARKS = {
    **ops.BENCHMARKS,
    **attention.BENCHMARKS,
    **several_media.BENCHMARKS,
    **latent.BENCHMARKS,
}
BF16 = 2
_TARGET = Target("sm_90", ARCHITECTURES["sm_90"].num_sms)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else digits(value)


def work(*names: str) -> str:
    """Bytes and operations of ops in bf16, beside the plain composition's."""
    rows = []
    for name in names:
        benchmark = BENCHMARKS[name]
        # The first two, less of what is only for decoding.
        for shape in benchmark.shapes[:2]:
            for mode in ("fwd", "fwd_bwd"):
                ours = benchmark.work(shape, BF16, mode)
                eager = benchmark.eager_work(shape, BF16, mode)
                flops = ours.matmul_flops + ours.vector_flops
                rows.append(
                    (
                        f"`{name}` {shape_name(shape)}",
                        mode,
                        _number(ours.bytes / 1e6),
                        _number(eager.bytes / 1e6),
                        _number(ours.matmul_flops / 1e9),
                        _number(ours.vector_flops / 1e9),
                        _number(flops / ours.bytes),
                    )
                )
    header = ("op, shape", "mode", "MB", "MB, eager", "GFLOP, products", "GFLOP, others", "FLOP/B")
    return _table(header, rows)


def launches(*names: str) -> str:
    """What each kernel of a forward and backward does, of the first shape, on an H100."""
    rows = []
    for name in names:
        benchmark = BENCHMARKS[name]
        shape = benchmark.shapes[0]
        calls = calls_of(launches_of(benchmark, shape, "bf16", "fwd_bwd", _TARGET))
        for each in work_of_calls(calls, "bf16"):
            rows.append(
                (
                    f"`{name}` {shape_name(shape)}",
                    f"`{each['kernel']}`",
                    _number(each["bytes"] / 1e6),
                    _number(each["matmul_flops"] / 1e9),
                    _number(each["vector_flops"] / 1e9),
                )
            )
    return _table(("op, shape", "kernel", "MB", "GFLOP, products", "GFLOP, others"), rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _parameters(rows: Iterable[ParameterRow], what: Callable[[str], str]) -> str:
    header = ("model", "is", "vision", "resampler", "new layers", "language model", "total")
    return _table(
        (*header, "trained", "paper's total"),
        [
            (
                f"`{row.name}`",
                what(row.name),
                *(
                    _millions(getattr(row.counts, each))
                    for each in ("vision", "resampler", "conditioning", "lm", "total", "trainable")
                ),
                row.printed.get("total", ""),
            )
            for row in rows
        ],
    )


def presets() -> str:
    def sizes(name: str) -> str:
        config = FlamingoConfig.preset(name)
        return f"{config.lm.depth} layers of {config.lm.dim}, a block every {_every(config)}"

    return _parameters(preset_rows(), sizes)


def _every(config: FlamingoConfig) -> str:
    every = config.conditioning.every
    return "layer" if every == 1 else f"{every} layers"


def table3() -> str:
    """The rows of table 3, and those of table 10 and of v1's table 7."""
    configs = table3_configs()

    def changes(name: str) -> str:
        return _changes(configs["baseline"], configs[name]) or "the baseline"

    return _parameters(table3_rows(), changes)


def _changes(base: Any, config: Any, prefix: str = "") -> str:
    """Fields that are others than the baseline's."""
    found = []
    for field in dataclasses.fields(base):
        old, new = getattr(base, field.name), getattr(config, field.name)
        if old == new:
            continue
        if dataclasses.is_dataclass(old):
            found.append(_changes(old, new, f"{prefix}{field.name}."))
        elif isinstance(new, tuple):
            found.append(f"{prefix}{field.name}: {', '.join(map(str, new))}")
        else:
            value = f"{new:.4f}" if isinstance(new, float) else new
            found.append(f"{prefix}{field.name}: {value}")
    return "; ".join(found)


def patching() -> str:
    """All rules that there are."""
    return _table(
        ("rule", "options that it is for", "versions that were read and tested", "can be probed"),
        [
            (
                f"`{rule.name}`",
                ", ".join(f"`{each}`" for each in rule.features),
                ", ".join(dict.fromkeys(rule.known.values())),
                "yes" if rule.probes else "no",
            )
            for rule in rules._rules.values()
        ],
    ).replace("---:", "---")


_GB = 1e9


def _where(each: Plan) -> str:
    parallel = each.parallel
    ranks = each.gpus // parallel.tensor_parallel
    sharded = "FSDP" if parallel.fsdp and ranks > 1 else "whole models"
    shared = f", {parallel.tensor_parallel} GPUs a layer"
    return sharded + (shared if parallel.tensor_parallel > 1 else "")


def plan_sizes() -> str:
    """What fits where."""
    rows = []
    for name, gpus, options, micro in (
        ("flamingo-3b", 1, {}, 8),
        ("flamingo-9b", 1, {}, 8),
        ("flamingo-80b", 1, {}, 1),
        ("flamingo-3b", 8, {}, 8),
        ("flamingo-9b", 8, {}, 8),
        ("flamingo-80b", 8, {}, 8),
        ("flamingo-80b", 8, {"tensor_parallel": 8}, 8),
        ("flamingo-3b", 64, {"fsdp": False}, 1),
        ("flamingo-9b", 64, {"fsdp": False}, 1),
        ("flamingo-80b", 64, {}, 1),
        ("flamingo-80b", 1024, {"tensor_parallel": 16}, 1),
    ):
        parallel = ParallelConfig(activation_checkpointing=True, **options)
        each = plan(FlamingoConfig.preset(name), gpus, parallel, micro_batch_size=micro)
        memory = each.memory
        rows.append(
            (
                f"`{name}`",
                gpus,
                _where(each),
                micro,
                *(
                    _number(value / _GB)
                    for value in (
                        memory.frozen,
                        memory.weights,
                        memory.gradients + memory.moments,
                        memory.in_flight,
                        memory.activations + memory.logits,
                        memory.total,
                    )
                ),
                "yes" if each.fits else "no",
            )
        )
    header = ("preset", "GPUs", "shared by", "rows of a forward", "frozen", "weights")
    header += ("gradients, moments", "in flight", "activations, logits", "all", "in 80 GB")
    return _table(header, rows)


def plan_80b() -> str:
    """One step of the 80B preset, in several ways."""
    config = FlamingoConfig.preset("flamingo-80b")
    rows = []
    for gpus, options, times, micro in (
        (8, {}, 1, 8),
        (8, {"tensor_parallel": 8, "fsdp": False}, 1, 8),
        (1024, {}, 16, 4),
        (1024, {"tensor_parallel": 16}, 16, 4),
        (1024, {"tensor_parallel": 8}, 16, 4),
        (1024, {"tensor_parallel": 16, "fsdp": False}, 16, 4),
        (1024, {"tensor_parallel": 8, "fsdp": False}, 16, 4),
        (1024, {"tensor_parallel": 8, "fsdp": False}, 2, 4),
    ):
        batches = {
            name: dataclasses.replace(batch, samples=times * batch.samples)
            for name in config.datasets
            for batch in DATASETS[name]
        }
        parallel = ParallelConfig(activation_checkpointing=True, **options)
        each = plan(config, gpus, parallel, batches=batches, micro_batch_size=micro)
        traffic = each.traffic
        bounds = (each.compute_s, each.data_parallel_s, each.tensor_parallel_s)
        rows.append(
            (
                gpus,
                _where(each),
                f"{times} x, {micro} rows",
                each.passes,
                _number(each.memory.total / _GB),
                _number((traffic.gather + traffic.reduce) / _GB),
                _number(traffic.tensor_parallel / _GB),
                *(_number(value) for value in bounds),
            )
        )
    header = ("GPUs", "shared by", "batches, of a forward", "forwards of a GPU", "memory, GB")
    header += ("sent for data, GB", "sent in layers, GB", "products, s", "data, s", "layers, s")
    operations = step_flops(config).total / 1e15
    return f"Products of a step of 1 x: {operations:.1f} PFLOP.\n\n{_table(header, rows)}"


TABLES: dict[str, Callable[..., str]] = {
    "work": work,
    "launches": launches,
    "presets": presets,
    "table3": table3,
    "patching": patching,
    "plan-sizes": plan_sizes,
    "plan-80b": plan_80b,
}


def with_tables(page: str) -> str:
    """A page's text with its tables computed anew.

    Raises:
        KeyError: a table that there is not.
    """

    def computed(found: re.Match[str]) -> str:
        begin, name, arguments, _, end = found.groups()
        return f"{begin}{TABLES[name](*(arguments or '').split())}{end}"

    return BLOCK.sub(computed, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    others = []
    for file in sorted(PAGES.glob("*.md")):
        text = file.read_text()
        new = with_tables(text)
        if new != text:
            others.append(file.name)
            if not check:
                file.write_text(new)
    print(f"{'other numbers' if check else 'rewritten'}: {', '.join(others) or 'none'}")
    sys.exit(check and bool(others))


if __name__ == "__main__":
    main()
