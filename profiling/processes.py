"""Programs of others: where they are, and an end for them and all that they started."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def find_program(name: str) -> str | None:
    """$FLAMINGO_FAST_<NAME>, on the PATH, or with the CUDA toolkit, whose folder often isn't."""
    chosen = os.environ.get("FLAMINGO_FAST_" + name.upper().replace("-", "_"))
    if chosen:
        return shutil.which(chosen)
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    return shutil.which(name) or shutil.which(name, path=str(toolkit))


def run_program(
    command: Sequence[str],
    output: IO[bytes],
    *,
    limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """The exit code; all that is printed goes to `output`.

    Raises:
        TimeoutError: it takes longer than that; it and what it started are killed.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=None if environment is None else dict(environment),
    )
    try:
        return process.wait(limit_s)
    except BaseException as error:
        # Not by a process group of its own: whoever ends ours means these too.
        for pid in reversed([process.pid, *_descendants(process.pid)]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"not done within {limit_s:.0f} s") from None
        raise


def _descendants(pid: int) -> list[int]:
    """Parents come before their children; where there is no /proc, none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may have spaces.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]
