"""The README's examples run as they stand; the index of kernels is complete."""

import re

import pytest
from fresh_venv import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_there_are_examples_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block: str) -> None:
    exec(block, {})


def test_kernel_index_names_every_file() -> None:
    index = (ROOT / "kernels" / "README.md").read_text()
    missing = [file.name for file in (ROOT / "kernels").glob("*.py") if file.name not in index]
    assert not missing, f"kernels/README.md: add {missing}"
