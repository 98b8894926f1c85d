"""Results as a long CSV: a row for each metric of each provider, case and environment."""

import csv
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import flamingo_fast
from flamingo_fast.bench.timing import Quantiles

ROOT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = (ROOT / "setup.py").is_file()


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a number depends on beside the case.

    cuda: the version that PyTorch was built for, or "none".
    commit: ends in "-dirty" for local changes.
    """

    device: str
    threads: int
    python: str
    torch: str
    cuda: str
    triton: str
    flamingo_fast: str
    commit: str

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.threads} threads, Python {self.python}, torch {self.torch}, "
            f"CUDA {self.cuda}, triton {self.triton}, "
            f"flamingo_fast {self.flamingo_fast} ({self.commit})"
        )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One metric of one provider, in `unit`. The shape of a ceiling is empty."""

    kernel: str
    provider: str
    mode: str
    shape: str
    dtype: str
    metric: str
    unit: str
    value: Quantiles


def set_threads() -> None:
    """One thread for each core this process may use, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Not on every platform.
        affinity = getattr(os, "sched_getaffinity", None)
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)


def environment(device: torch.device) -> Environment:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Environment(
        name,
        torch.get_num_threads(),
        platform.python_version(),
        torch.__version__,
        torch.version.cuda or "none",
        _version("triton"),
        flamingo_fast.__version__,
        commit(),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """Of the checkout, 12 digits, with "-dirty" for local changes; "none" outside of one."""
    # From site-packages git would name the commit of whatever repository lies around it.
    if not IN_CHECKOUT:
        return "none"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return "none"


def changes() -> str:
    """What was changed in files of the commit, as a digest; empty outside of a checkout."""
    if not IN_CHECKOUT:
        return ""
    try:
        return hashlib.sha256(_git("diff", "HEAD").encode()).hexdigest()[:12]
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def results_folder(prefix: str = "") -> Path:
    """results/<prefix><utc>-<commit> of the checkout."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return ROOT / "results" / f"{prefix}{now:%Y%m%dT%H%M%S}-{commit()}"


def replace(path: Path, data: bytes) -> None:
    """All of it or what was there before, whatever comes between."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record))


_KEY = (*(name for name in _names(Measurement) if name != "value"), *_names(Environment))
COLUMNS = (*_KEY, *_names(Quantiles), "timestamp")


def write_csv(path: Path, measurements: Iterable[Measurement], env: Environment) -> None:
    """Adds rows to the file at `path`, in place of those whose columns agree up to the values.

    Raises:
        ValueError: the file there is not of this version, or no CSV.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rows = {_key(row): row for row in read_csv(path)}
    for measurement in measurements:
        row = {
            **{k: str(v) for k, v in dataclasses.asdict(measurement).items() if k != "value"},
            **{k: str(v) for k, v in dataclasses.asdict(env).items()},
            **{k: f"{v:.6g}" for k, v in dataclasses.asdict(measurement.value).items()},
            "timestamp": now,
        }
        rows[_key(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows.values())
    replace(path, text.getvalue().encode())


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in _KEY)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of the file at `path`; none if there is no file.

    Raises:
        ValueError: it has other columns, a row has more or fewer, or it is no CSV.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [*csv.reader(file, strict=True)] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({error}); move it away") from error
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path}: its columns are not this version's; move it away")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(COLUMNS):
            raise ValueError(
                f"{path}: row {number} has {len(row)} fields, expected {len(COLUMNS)}; move it away"
            )
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]
