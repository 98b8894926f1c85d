"""What every test has: Triton's interpreter, with bf16 right, and a list of what was skipped.

TEST_DEVICE=cuda runs them on a GPU instead, kernels compiled; `make gpu` names those that can.
"""

import collections
import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator

# Triton decides at import whether kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if "TEST_DEVICE" in os.environ else "1")
# Rounding depends on it, and on two cores two workers have one each: threads of more than there are
# cores wait for each other in turns. Benchmarks, which would take all cores, and processes heed it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

# How the reason starts of a test that skips for want of an optional apt package.
_NEEDS_APT = "needs apt package"


@pytest.fixture(autouse=True)
def interpreter_bf16() -> Iterator[None]:
    """The stock interpreter computes garbage from bf16, silently."""
    if DEVICE != "cpu" or importlib.util.find_spec("triton") is None:
        yield
        return
    from flamingo_fast.testing.interpreter_bf16 import correct_bf16

    with correct_bf16():
        yield


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `flamingo-fast` with arguments; returns (exit code, stdout, stderr)."""
    from flamingo_fast import cli

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flamingo-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return command


@pytest.fixture
def guarded() -> Iterator:
    """Guards every kernel of the test; yields what `flamingo_fast.testing.guard.guard` yields."""
    from flamingo_fast.testing.guard import guard

    with guard() as current:
        yield current


if DEVICE != "cpu":
    from flamingo_fast.testing import guard as _guard

    # Compiled kernels can't be guarded; what tests ask of a guard then is which of them ran.
    _guard.guard = _guard.recorded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="run one of N of the tests marked `matrix`, others at each commit (default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("sample") < 1:
        raise pytest.UsageError(f"--sample: expected at least 1, got {config.getoption('sample')}")
    # Once, for the workers too, which have to choose the same tests.
    if "TEST_SAMPLE_SEED" not in os.environ:
        git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            commit = ""
        os.environ["TEST_SAMPLE_SEED"] = commit.strip()


def _is_of_sample(item: pytest.Item, size: int) -> bool:
    # Of a test that isn't parametrised there are no others alike.
    if item.get_closest_marker("matrix") is None or not hasattr(item, "callspec"):
        return True
    return zlib.crc32(f"{os.environ['TEST_SAMPLE_SEED']} {item.nodeid}".encode()) % size == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = config.getoption("sample")
    left_out = [item for item in items if not _is_of_sample(item, size)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_of_sample(item, size)]
    if DEVICE != "cpu":
        skip = pytest.mark.skip(reason="of a CPU, and TEST_DEVICE is another")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    # What benchmarks collect before they time would be all modules and tests, seconds each time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Libraries that count what is left at the end would call it leaked.
    gc.unfreeze()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Not in the header, which -q leaves out.
    versions = [f"{name} {_version(name)}" for name in ("torch", "triton", "transformers")]
    terminalreporter.write_line(f"with {', '.join(versions)}")
    reasons = collections.Counter(
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for report in terminalreporter.stats.get("skipped", ())
    )
    if not reasons:
        return
    for_apt = sum(count for reason, count in reasons.items() if _NEEDS_APT in reason)
    terminalreporter.section(
        f"{reasons.total()} skipped, {for_apt} of them for want of an optional apt package"
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d}  {reason.removeprefix('Skipped: ')}")
