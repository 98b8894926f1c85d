"""A training step under the real Nsight Systems: `make test-nsys` unpacks it and runs this.

Elsewhere there is no nsys, and nothing to see.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

for _name in ("timm", "transformers", "nvtx"):
    pytest.importorskip(_name)

from flamingo_fast.profiling.analysis import analyse  # noqa: E402
from flamingo_fast.profiling.profile_report import read  # noqa: E402

NSYS = os.environ.get("FLAMINGO_FAST_NSYS", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NSYS, reason="FLAMINGO_FAST_NSYS is unset: make test-nsys sets it"),
]
