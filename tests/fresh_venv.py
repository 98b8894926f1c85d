"""Copies of the repository and virtual environments to install them in, without a network."""

import dataclasses
import fnmatch
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def repository_files(root: Path = ROOT) -> list[Path]:
    """Files and symlinks of the repository, relative to its root; links are not followed.

    Read from the folder, not from git: an archive of the repository has no git.
    """
    lines = (root / ".gitignore").read_text().split()
    ignored = [line.rstrip("/") for line in lines] + [".git"]

    def kept(path: Path) -> bool:
        relative = path.relative_to(root)
        return not any(
            fnmatch.fnmatch(relative.name, pattern) or str(relative) == pattern
            for pattern in ignored
        )

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(filter(kept, folder.iterdir())):
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path.relative_to(root)

    return list(walk(root))


def copy_repository(target: Path) -> Path:
    """Copies `repository_files()` into the new folder `target`, keeping symlinks."""
    for file in repository_files():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file, follow_symlinks=False)
    return target


def _clean_environment() -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def run(*command: object, cwd: Path, **environment: str) -> str:
    """stdout of `command`; an AssertionError with its output if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=_clean_environment() | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@dataclasses.dataclass(frozen=True)
class FreshVenv:
    """A virtual environment that has the running interpreter's packages, but not flamingo_fast."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def pip_install(self, *arguments: object, cwd: Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "-qq", "install")
        run(*pip, "--no-index", "--no-deps", "--no-build-isolation", *arguments, cwd=cwd)


def create_venv(path: Path, *, without: tuple[str, ...] = ()) -> FreshVenv:
    """Creates a virtual environment in the new folder `path`, less the packages `without`.

    Its packages are links into the running interpreter's, which may hold an editable
    flamingo_fast: a path to that folder would show pip its metadata.
    """
    venv.create(path, symlinks=True)
    packages = path / "packages"
    packages.mkdir()
    hidden = ("*flamingo_fast*", "*.pth", "*.egg-link", *without)
    for folder in map(Path, sys.path):
        if folder.name not in ("site-packages", "dist-packages") or not folder.is_dir():
            continue
        for entry in folder.iterdir():
            link = packages / entry.name
            if not link.exists() and not any(fnmatch.fnmatch(entry.name, p) for p in hidden):
                link.symlink_to(entry)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return FreshVenv(path)
