"""How the repository is laid out: a file holds one idea and can be read in one go."""

from fresh_venv import ROOT

FOLDERS = ("bench", "examples", "flamingo_fast", "kernels", "profiling", "tests")
MOST_LINES = 600


def test_no_file_is_over_600_lines() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    too_long = {name: number for name, number in lines.items() if number > MOST_LINES}
    assert not too_long, f"over {MOST_LINES} lines, to be split along a seam: {too_long}"
