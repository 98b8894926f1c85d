"""Table 3 as a suite: what is measured of it, and its section of a report."""

import dataclasses
from collections.abc import Iterator, Sequence

from flamingo_fast.bench import table3_report
from flamingo_fast.bench.section import Figure, Ratio, Section
from flamingo_fast.bench.settings import RAISED, Progress, Settings
from flamingo_fast.bench.table3 import Prediction, predict
from flamingo_fast.bench.table3_data import RealData
from flamingo_fast.bench.table3_measured import Measurement, Session, Store, check_rows
from flamingo_fast.bench.table3_scales import SCALES
from flamingo_fast.errors import one_line
from flamingo_fast.models.presets import table3_configs

STEP_TIME = "step time over the baseline's"
"""What a ratio of table 3 is of."""


def measure_table3(settings: Settings, progress: Progress) -> Iterator[Section]:
    """Of `Suite.run`: measures what an earlier run has not, and gives one section."""
    scale = SCALES[settings.scale]
    rows = check_rows(settings.rows)
    progress("table3: counting", 0.0)
    predictions = predict()
    store = None
    measured: dict[str, Measurement] = {}
    if settings.out is not None:
        about = {
            **settings.about,
            "scale": scale.name,
            "pairs": settings.pairs,
            "impl": settings.impl,
            "data": str(settings.data),
        }
        store = Store(settings.out / "table3.jsonl", about, resume=settings.resume)
        measured = store.read()
    kept = [row for row in rows if row in measured]
    is_interrupted, failures = False, []
    missing = [row for row in rows if row not in measured]
    if missing:
        session = Session(
            scale, missing, settings.pairs, settings.device, settings.impl, _data(settings)
        )
        total = session.total_steps
        session.progress = lambda row, steps: progress(
            f"table3 {scale.name}: {row}", min(steps / total, 1.0)
        )
        try:
            for each in session.run():
                measured[each.row] = each
                if store is not None:
                    store.add(each)
        except KeyboardInterrupt:
            is_interrupted = True
        except RAISED as error:
            failures.append(one_line(error))
    found = [measured[row] for row in rows if row in measured]
    section = table3_section(found, predictions)
    section.is_interrupted, section.failures = is_interrupted, failures
    if settings.resume:
        section.notes.append(
            f"{len(kept)} of {len(rows)} rows are of an earlier run of this commit, machine and "
            "settings."
        )
    if settings.out is not None and found:
        table3_report.write_csv(found, predictions, settings.out / "table3.csv")
    yield section


def table3_section(measured: Sequence[Measurement], predictions: Sequence[Prediction]) -> Section:
    """Of rows that were measured, maybe none."""
    section = Section("table3", "Table 3")
    if not measured:
        return section
    section.tables = table3_report.tables(measured, predictions)
    sentence = table3_report.every_4th(measured, predictions)
    rows = table3_report.rows_of(measured, predictions)
    section.sentences = [
        *([sentence] if sentence else []),
        *table3_report.explanations(rows),
    ]
    impl = measured[0].impl
    for row, each in zip(rows, measured, strict=True):
        name = f"table3 {each.scale} {each.row}"
        if not row.is_itself:
            section.ratios.append(Ratio.of_pairs(name, STEP_TIME, each.ratios))
        if each.speedups:
            section.ratios.append(Ratio.of_pairs(name, f"x vs {impl}", each.speedups))
    section.figures = [
        Figure.of(
            "table3",
            "Table 3: the paper's, measured and predicted step times over the baseline's",
            table3_report.plot_ratios(measured, predictions),
        ),
        Figure.of(
            "tradeoff",
            "The trade-off: measured time and memory against the paper's score",
            table3_report.plot_tradeoff(measured, predictions),
        ),
    ]
    return section


def _data(settings: Settings) -> RealData | None:
    if settings.data is None:
        return None
    return RealData(settings.data, SCALES[settings.scale], settings.device)


def check_table3(settings: Settings) -> None:
    """Of `Suite.check`."""
    if settings.scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}; got {settings.scale!r}")
    check_rows(settings.rows)
    Session(SCALES["micro"], (), settings.pairs, settings.device, settings.impl)
    if settings.device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {str(settings.device)!r}")
    # Shards that can't be read are found out before hours of measuring.
    if data := _data(settings):
        configs = table3_configs()
        for datasets in dict.fromkeys(configs[row].datasets for row in check_rows(settings.rows)):
            config = dataclasses.replace(configs["baseline"], datasets=datasets)
            data.batches(data.config(SCALES[settings.scale].config(config)))


def seconds_of_table3(settings: Settings) -> float:
    """Of `Suite.seconds`."""
    scale = SCALES[settings.scale]
    rows = check_rows(settings.rows)
    session = Session(scale, rows, settings.pairs, settings.device, settings.impl)
    gflops = scale.flops(session.configs["baseline"]).total / 1e9
    return session.total_steps * gflops / 100
