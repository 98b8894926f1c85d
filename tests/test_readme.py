"""The index of kernels is complete. What the README's blocks say is run by test_docs.py."""

from fresh_venv import ROOT


def test_kernel_index_names_every_file() -> None:
    index = (ROOT / "kernels" / "README.md").read_text()
    missing = [file.name for file in (ROOT / "kernels").glob("*.py") if file.name not in index]
    assert not missing, f"kernels/README.md: add {missing}"
