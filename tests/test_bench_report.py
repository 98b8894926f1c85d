"""Suites of benchmarks, run one after another, and the report of what they found."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from bench_cases import bench

from flamingo_fast.bench import (
    end_to_end,
    growth,
    memory,
    page,
    plan,
    records,
    registry,
    report,
    runner,
    suites,
)
from flamingo_fast.bench import run as bench_run
from flamingo_fast.bench.patching_models import Case, Sizes
from flamingo_fast.bench.records import Measurement, environment
from flamingo_fast.bench.section import Figure, Ratio, Section
from flamingo_fast.bench.suites import SUITES, Settings, Suite
from flamingo_fast.bench.tables import Table
from flamingo_fast.bench.timing import Quantiles

CPU = torch.device("cpu")
ENVIRONMENT = environment(CPU)


def ratio(name: str = "op 2x2 fp32 fwd", value: float = 2.0, width: float = 0.1, **more) -> Ratio:
    return Ratio(name, "x vs eager", value, value - width, value + width, 0.96, 9, **more)


def section(name: str = "toys", **changes) -> Section:
    table = Table("Toys & <b>others</b>", ("toy", "ms"), [["a<b", "1.5"]], 1, ["a note"])
    return dataclasses.replace(Section(name, "Toys", tables=[table]), **changes)


def suite(name: str, *sections: Section, seconds: float = 1.0) -> Suite:
    def run(settings: Settings, progress: suites.Progress) -> Iterator[Section]:
        for index, each in enumerate(sections):
            progress(each.title, index / len(sections))
            yield each

    return Suite(name, name, run, lambda settings: seconds, lambda settings: None)


# Ratios


def test_a_ratio_has_an_interval_of_its_median():
    found = Ratio.of_pairs("a", "x", [1.0, 3.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    assert (found.value, found.low, found.high, found.pairs) == (5, 1, 9, 9)
    assert found.confidence == pytest.approx(0.996, abs=1e-3)
    assert found.half_width == pytest.approx(0.8)


def test_ratios_agree_where_intervals_overlap():
    assert ratio(value=2.0).agrees_with(ratio(value=2.2))
    assert not ratio(value=2.0).agrees_with(ratio(value=2.21))


def test_two_runs_compared(tmp_path: Path):
    for name, value in (("one", 2.0), ("two", 2.15), ("far", 3.0)):
        report = runner.Report(ENVIRONMENT, "cmd", [section(ratios=[ratio(value=value)])])
        (tmp_path / name).mkdir()
        runner.write(report, tmp_path / name)
    table, share = runner.compare(tmp_path / "one", tmp_path / "two" / "results.json")
    assert share == 1 and table.rows[0][-1] == "yes"
    assert "1 of 1 intervals overlap (100%); 0 of the first run's medians" in table.notes[0]
    assert table.notes[1] == "Median half-width: 5.0%, 4.7%"
    assert runner.compare(tmp_path / "one", tmp_path / "far")[1] == 0
    (tmp_path / "other.json").write_text('{"schema": 0, "ratios": []}')
    for path, why in (("absent", "No such file"), ("other.json", "schema 0, expected 1")):
        with pytest.raises(ValueError, match=why):
            runner.compare(tmp_path / "one", tmp_path / path)
    empty = runner.Report(ENVIRONMENT, "cmd", [])
    runner.write(empty, tmp_path / "far")
    with pytest.raises(ValueError, match="expected ratios of the same cases"):
        runner.compare(tmp_path / "one", tmp_path / "far")


# Running


def test_suites_one_after_another_and_how_far(monkeypatch: pytest.MonkeyPatch):
    first, second = section(sentences=["first"]), section("b")
    monkeypatch.setitem(SUITES, "one", suite("one", first, second, seconds=3.0))
    monkeypatch.setitem(SUITES, "two", suite("two", section("c"), seconds=1.0))
    told = []
    reports = runner.run(
        ["one", "two"], Settings(CPU), "cmd", lambda text, share: told.append(share)
    )
    sizes = [len(report.sections) for report in reports]
    assert sizes == [1, 2, 3]
    assert told == [0, 0.375, 0.75]


def test_what_is_interrupted_is_the_last(monkeypatch: pytest.MonkeyPatch):
    stopped = section(is_interrupted=True)
    monkeypatch.setitem(SUITES, "one", suite("one", stopped, section("b")))
    monkeypatch.setitem(SUITES, "two", suite("two", section("c")))
    (report,) = runner.run(["one", "two"], Settings(CPU), "cmd")
    assert report.is_interrupted
    assert report.summary.failures == ["interrupted: what follows was not measured"]


def test_what_fails_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wrong = section(failures=["ours: RMS error 1"], not_measured=[("flash_attn", "no GPU")])
    monkeypatch.setitem(SUITES, "ops", suite("ops", wrong))
    result = bench("ops", "--out", str(tmp_path))
    assert result.exit_code == 1, result.output
    assert "FAILED: ours: RMS error 1" in result.output
    assert result.output.splitlines()[-1] == str(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["failures"] == ["ours: RMS error 1"]
    for name in ("report.md", "index.html"):
        text = (tmp_path / name).read_text()
        assert "RMS error 1" in text and "flash_attn" in text and "no GPU" in text


@pytest.mark.skipif(not records.IN_CHECKOUT, reason="results go to the working folder")
def test_results_go_to_a_folder_of_their_own():
    out = runner.default_out()
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{12}(-dirty)?", out.name)
    ignored = (out.parent.parent / ".gitignore").read_text().splitlines()
    assert out.parent.name == "results" and "results/" in ignored


def test_kernel_block_and_model_side_by_side():
    """A kernel of a quarter of the block's time, four times faster: 1 / (3/4 + 1/16)."""
    names = {level: " ".join((*case, suites.CHAIN_MODE)) for level, case in CHAIN.items()}
    levels = [
        ratio(names["kernel"], 4.0, level="kernel"),
        ratio(names["block"], 1.3, level="block"),
        ratio("train", 1.1, level="model"),
    ]
    times = [
        Measurement(op, "eager", "fwd_bwd", shape, "fp32", "time", "ms", Quantiles(ms, ms, ms, 9))
        for (op, shape), ms in ((suites.KERNEL, 5.0), (suites.BLOCK, 20.0))
    ]
    report = runner.Report(ENVIRONMENT, "cmd", [section(ratios=levels, measurements=times)])
    titles = [table.title for table in report.summary.tables]
    assert titles == ["Ratios", "From kernel to model (Amdahl)"]
    rows = report.summary.tables[1].rows
    assert [row[2] for row in rows] == ["4.00", "1.30", "1.10"]
    assert rows[1][-1] == "25%, 1.23"
    alone = runner.Report(ENVIRONMENT, "cmd", [section(ratios=levels[:1])])
    assert [table.title for table in alone.summary.tables] == ["Ratios"]


CHAIN = {"kernel": suites.KERNEL, "block": suites.BLOCK}


def test_headline_has_a_case_of_each_family():
    parts = suites._headline_parts(Settings(CPU))
    names = {part.name for part, _ in parts}
    assert names == set(SUITES) - {"headline", "packing", "table3"}
    for part, settings in parts:
        part.check(settings)
        assert part.seconds(settings) > 0
    plans = [suites._plan(settings, part.name) for part, settings in parts[:3]]
    cases = {(each[0].name, registry.shape_name(each[1])) for p in plans for each in p.cases}
    # The chain's kernel is the one inside the chain's block, and both are measured.
    assert {suites.KERNEL, suites.BLOCK} <= cases
    assert {"flash_attn", "xformers", "varlen", "liger", "sdpa"} <= {*plans[0].providers}
    assert plans[0].left_out == plan.COMPILED


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nand more"), ValueError("x")])
def test_a_suite_that_raises_fails_alone(error, monkeypatch: pytest.MonkeyPatch):
    def raises(settings, progress):
        yield section()
        raise error

    monkeypatch.setitem(SUITES, "one", dataclasses.replace(suite("one"), run=raises))
    monkeypatch.setitem(SUITES, "two", suite("two", section("c")))
    *_, report = runner.run(["one", "two"], Settings(CPU), "cmd")
    assert [each.name for each in report.sections] == ["toys", "one", "c"]
    assert report.failures == [f"{type(error).__name__}: {str(error).splitlines()[0]}"]


def test_a_part_of_the_headline_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch):
    def raises(settings, progress):
        raise RuntimeError("out of memory")
        yield

    parts = [
        (dataclasses.replace(suite("one"), run=raises), Settings(CPU)),
        (suite("two", section("b")), Settings(CPU)),
    ]
    monkeypatch.setattr(suites, "_headline_parts", lambda settings: parts)
    *_, report = runner.run(["headline"], Settings(CPU), "cmd")
    assert [each.name for each in report.sections] == ["one", "b"]
    assert report.failures == ["RuntimeError: out of memory"]


def test_ctrl_c_anywhere_is_said(monkeypatch: pytest.MonkeyPatch):
    def raises(settings, progress):
        yield section()
        raise KeyboardInterrupt

    monkeypatch.setitem(SUITES, "one", dataclasses.replace(suite("one"), run=raises))
    *_, report = runner.run(["one", "one"], Settings(CPU), "cmd")
    assert report.is_interrupted and len(report.sections) == 2


def test_plots_of_sections_of_one_name_are_two_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    figures = two_figures()
    again = [section(figures=[figures[0]]), section(figures=[figures[1]])]
    again[1].figures = [dataclasses.replace(figures[1], name="one")]
    monkeypatch.setitem(SUITES, "one", suite("one", *again))
    *_, report = runner.run(["one"], Settings(CPU), "cmd")
    runner.write(report, tmp_path)
    assert (tmp_path / "one.png").read_bytes() == figures[0].png
    assert (tmp_path / "one-2.png").read_bytes() == figures[1].png
    parsed = Parsed((tmp_path / "index.html").read_text())
    assert len(parsed.ids) == len(set(parsed.ids))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["memory", "--op", "squared_relu"], "ops: expected one of the suites ops, modules"),
        (["packing", "--dtype", "bf16"], "dtypes: expected one of the suites"),
        (["table3", "--resume"], "resume: expected --out with it"),
        (["ops", "--scale", "micro"], "scale: expected one of the suites table3 with it"),
        (["decode", "--op", "squared_relu"], "have nothing to measure"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(args, message, tmp_path: Path):
    out = [] if "--resume" in args else ["--out", str(tmp_path / "new")]
    result = bench(*args, *out)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_is_stopped_keeps_its_numbers(error, monkeypatch: pytest.MonkeyPatch, open_flamingo):
    interrupted = isinstance(error, KeyboardInterrupt)
    failures = [] if interrupted else ["RuntimeError: out of memory"]
    counted = []

    def peak(call, device):
        counted.append(call)
        if len(counted) == 3:
            raise error
        return 8

    monkeypatch.setattr(memory, "peak_bytes", peak)
    (found,) = SUITES["memory"].run(Settings(CPU, quick=True), lambda text, share: None)
    assert (found.is_interrupted, found.failures) == (interrupted, failures)
    assert len(found.tables[0].rows) == 2

    def stopped(*args):
        raise error

    monkeypatch.setattr(end_to_end, "_decode", stopped)
    run = functools.partial(end_to_end.run, sizes=SMALL, train=Case("train", "train", 2, 32, 2))
    monkeypatch.setattr(end_to_end, "run", run)
    (found,) = SUITES["model"].run(Settings(CPU, quick=True), lambda text, share: None)
    assert (found.is_interrupted, found.failures) == (interrupted, failures)
    assert len(found.ratios) == 1 and "64 wide" in str(found.tables[0].notes)


# Page


class Parsed(HTMLParser):
    VOID = {"meta", "path", "use", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.outside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        for name in ("href", "xlink:href", "src"):
            if link := values.get(name):
                (self.links if link.startswith("#") else self.outside).append(link)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def two_figures() -> list[Figure]:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = []
    for name in ("one", "two"):
        drawn, axis = pyplot.subplots()
        axis.plot([1, 2], [3, 4], "o-", clip_on=True)
        found.append(Figure.of(name, f"caption of {name}", drawn))
    return found


def test_the_page_stands_alone():
    sections = [section("summary", figures=two_figures(), sentences=["1 < 2"], seconds=3.0)]
    text = page.html(ENVIRONMENT, "flamingo-fast bench --op 'a&b'", sections)
    parsed = Parsed(text)
    assert not parsed.open and not parsed.outside
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(parsed.ids)
    for escaped in ("a&lt;b", "1 &lt; 2", "Toys &amp; &lt;b&gt;others", "--op &#39;a&amp;b&#39;"):
        assert escaped in text
    for wanted in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert wanted in text
    assert str(ENVIRONMENT) in text and "caption of two" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs apt package chromium")
def test_the_page_in_a_browser(tmp_path: Path):
    report = runner.Report(ENVIRONMENT, "cmd", [section(figures=two_figures())])
    runner.write(report, tmp_path)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,844"),
        *(f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'index.html'}"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr, done.stderr


# What suites measure


def test_the_power_of_growth():
    sizes = [1, 2, 4, 8, 16]
    assert growth.exponent(sizes, [5 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # What doesn't depend on the size hides it among small ones only.
    assert growth.exponent(sizes, [1, 1, 4, 8, 16]) == pytest.approx(1)
    assert growth.exponent([1, 2], [3, 3]) == pytest.approx(0)
    with pytest.raises(ValueError, match="sizes: expected at least two, got 1"):
        growth.exponent([1], [1])


def test_growth_is_fitted_for_each_size(tmp_path: Path):
    ops = ["--op", "GatedCrossAttentionBlock_decode", "--op", "PerceiverResampler"]
    result = bench("growth", "--quick", *ops, "--dtype", "fp32", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    rows = sections[0]["tables"][0]["rows"]
    assert {(row[0], row[1]) for row in rows} == {
        ("GatedCrossAttentionBlock_decode", "shots, 1 to 4"),
        ("PerceiverResampler", "frames, 1 to 2"),
    }
    memory_of = {
        row[4]: float(row[6])
        for row in rows
        if row[0] == "GatedCrossAttentionBlock_decode" and row[3] == "fwd"
    }
    # OpenFlamingo projects all images for each token; ours has their keys and values.
    assert memory_of["ours"] < 0.1 < memory_of["eager"]


def test_memory_is_counted_of_what_agrees(monkeypatch: pytest.MonkeyPatch):
    results, wrong = memory.Results(), memory.Results()
    memory.run(CPU, ["fp32"], results, quick=True)
    assert not results.failures
    table = memory.table(results)
    ours = {row[0]: row for row in table.rows if row[3] == "ours"}
    assert set(ours) == {op for op, _ in memory._CASES}
    for row in ours.values():
        assert float(row[6]) >= 0.9, row
    monkeypatch.setattr(memory, "problems", lambda *_: ["wrong"])
    memory.run(CPU, ["fp32"], wrong, quick=True)
    # Of the baseline only that it is right in fp32 excuses its rounding.
    assert len(wrong.failures) >= 2 * len(memory._CASES) - 1
    assert not wrong.measured


SMALL = Sizes(
    hidden=64, layers=2, heads=2, intermediate=128, vocab=100, features=32, image=28, latents=8
)


def small_pair() -> end_to_end.Results:
    results = end_to_end.Results()
    train = Case("train", "train", 2, 32, 2)
    end_to_end.run(CPU, results, shots=(1, 3), sizes=SMALL, train=train, rounds=3)
    return results


@pytest.fixture
def open_flamingo():
    pytest.importorskip("timm")
    from flamingo_fast.testing import peers

    try:
        peers.open_flamingo()
    except ImportError as error:
        pytest.skip(str(error))


def test_a_whole_model_against_open_flamingos(open_flamingo):
    results = small_pair()
    assert not results.failures
    assert [each.name for each in results.measured] == [
        *("training step", "decode, 1 shots", "decode, 3 shots")
    ]
    train = results.measured[0]
    assert train.tokens == 64 and 0 < train.peak_bytes[0] < train.peak_bytes[1]
    assert len(end_to_end.table(results).rows) == 3
    assert len(end_to_end.sentences(results)) == 2


def test_a_whole_model_that_disagrees_has_no_number(open_flamingo, monkeypatch):
    original = end_to_end.load_open_flamingo

    def other_weights(model, weights, *, strict=True):
        original(model, weights, strict=strict)
        with torch.no_grad():
            if strict:
                model.conditioning.blocks[1].attn_gate.neg_()

    monkeypatch.setattr(end_to_end, "load_open_flamingo", other_weights)
    results = small_pair()
    assert not results.measured and len(results.failures) == 3
    assert "end to end, train: " in results.failures[0]
    assert "end to end, decode after 3 images: logits" in results.failures[2]


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_are_what_an_interval_is_of(passes: int, monkeypatch: pytest.MonkeyPatch):
    cases = []
    original = bench_run.Case

    class Counted(original):
        def __init__(self, benchmark, shape, *arguments) -> None:
            super().__init__(benchmark, shape, *arguments)
            cases.append(shape)

    monkeypatch.setattr(bench_run, "Case", Counted)
    chosen = plan.make_plan(
        ops=["squared_relu"],
        shapes=["8x16", "4x16"],
        dtypes=["fp32"],
        modes=["fwd"],
        providers=["ours"],
        quick=True,
    )
    results = bench_run.run(dataclasses.replace(chosen, passes=passes), CPU)
    # One after another, not each as often at once; and one for the time of a call.
    assert cases[:-1] == [(8, 16), (4, 16)] * passes
    pairs = results.pairs["squared_relu 8x16 fp32", "fwd", "ours"]
    assert len(pairs) == 3 if passes == 3 else len(pairs) >= 15
    times = {m.shape: m.value.samples for m in results.measurements if m.metric == "time"}
    assert times["8x16"] >= 15 and len(times) == 2
    peaks = [m for m in results.measurements if m.metric == "peak_memory"]
    assert len(peaks) == 4 and {m.value.samples for m in peaks} == {1}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_case_that_is_stopped_half_way_has_no_row(error, monkeypatch: pytest.MonkeyPatch):
    counted = []

    def peak(call, device):
        counted.append(call)
        # Of the second shape's second provider.
        if len(counted) == 4:
            raise error
        return 8

    monkeypatch.setattr(bench_run, "peak_bytes", peak)
    chosen = plan.make_plan(
        ops=["squared_relu"],
        shapes=["8x16", "4x16"],
        dtypes=["fp32"],
        modes=["fwd"],
        providers=["ours"],
        quick=True,
    )
    results = bench_run.run(dataclasses.replace(chosen, passes=3), CPU)
    measured = next(t for t in report.tables(results) if t.title == report.MEASURED)
    assert {row[1] for row in measured.rows} == {"8x16"}
    assert results.is_interrupted == isinstance(error, KeyboardInterrupt)
    expected = (
        [] if results.is_interrupted else ["squared_relu 4x16 fp32: RuntimeError: out of memory"]
    )
    assert results.failures == expected


def test_what_is_wrong_has_no_numbers_in_any_pass(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def wrong(x, *, impl="auto"):
        calls.append(impl)
        return x.relu().square() if impl == "reference" else x

    broken = dataclasses.replace(plan.BENCHMARKS["squared_relu"], ours=wrong)
    monkeypatch.setattr(plan, "BENCHMARKS", {"squared_relu": broken})
    chosen = plan.make_plan(shapes=["8x16"], dtypes=["fp32"], modes=["fwd"], quick=True)
    results = bench_run.run(dataclasses.replace(chosen, passes=3), CPU)
    assert {m.provider for m in results.measurements if m.shape == "8x16"} == {"eager"}
    assert not results.pairs and all("ours" in line for line in results.failures)
    # Only the gate called it: of the one shape, and of the one that a call's time is measured on.
    assert calls.count("auto") == 2
