"""A training step under the real Nsight Systems: `make test-nsys` unpacks it and runs this.

Elsewhere there is no nsys, and nothing to see.
"""

import os
import statistics
from pathlib import Path

import pytest

for _name in ("timm", "transformers", "nvtx", "matplotlib"):
    pytest.importorskip(_name)

from flamingo_fast.profiling.analysis import Analysis, bare  # noqa: E402
from flamingo_fast.profiling.profile_report import read, report, write  # noqa: E402
from flamingo_fast.profiling.run import run  # noqa: E402
from flamingo_fast.profiling.traces import ReportError  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "FLAMINGO_FAST_NSYS" not in os.environ, reason="no nsys: make test-nsys brings it"
    ),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nsys") / "train"
    return run("train:mini", tool="nsys", out=out, steps=2, warmup=1, device="cpu")


@pytest.fixture(scope="module")
def analysis(recorded: Path) -> Analysis:
    found = read(recorded)
    assert isinstance(found, Analysis)
    return found


def test_times_are_the_drivers(analysis: Analysis) -> None:
    steps = [(each.end - each.start) / 1e9 for each in analysis.trace.steps]
    by_driver = analysis.session.step_s
    assert len(steps) == len(by_driver) == 2
    assert statistics.median(steps) == pytest.approx(statistics.median(by_driver), rel=0.03)
    for step, seconds in zip(steps, by_driver, strict=True):
        assert step == pytest.approx(seconds, rel=0.03)


def test_ranges_are_nearly_all_of_a_step(analysis: Analysis) -> None:
    total = sum(each.self_ns for each in analysis.ranges if len(each.path) > 1)
    steps = sum(each.end - each.start for each in analysis.trace.steps)
    assert total >= 0.95 * steps and analysis.covered == pytest.approx(total / steps)


def test_ranges_lie_within_each_other(analysis: Analysis) -> None:
    paths = {tuple(map(bare, each.path)) for each in analysis.ranges}
    model = ("step", "dataset m3w", "model")
    backward = ("step", "dataset m3w", "backward", "model backward")
    for path in (
        (*model, "vision"),
        (*model, "resampler", "layer 5"),
        (*model, "lm", "lm layer 11", "gated block 11", "attention"),
        (*model, "lm", "lm layer 1", "gated block 1", "feed-forward"),
        (*model, "loss"),
        ("step", "optimiser"),
    ):
        assert path in paths, path
    in_layer = (*backward, "lm backward", "lm layer 3 backward", "gated block 3 backward")
    assert {(*in_layer, "attention backward"), (*in_layer, "feed-forward backward")} <= paths
    assert (*backward, "resampler backward", "layer 5 backward") in paths
    for each in analysis.trace.ranges:
        parent = each.parent
        assert parent is None or (parent.start <= each.start and each.end <= parent.end)


def test_it_is_written(recorded: Path, tmp_path: Path) -> None:
    found = report([recorded], pictures=True)
    files = {each.name: each for each in write(found, tmp_path / "report", "profile report")}
    assert "index.html" in files and files["index.html"].stat().st_size > 10_000
    assert any(name.endswith(".csv") for name in files)


def test_a_truncated_recording(recorded: Path, tmp_path: Path) -> None:
    (whole,) = recorded.glob("report.qdstrm")
    broken = tmp_path / "report.qdstrm"
    broken.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ReportError, match="report.qdstrm"):
        read(broken)
