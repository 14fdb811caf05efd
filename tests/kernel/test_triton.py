"""The GPU kernel, as far as it can be checked without a GPU: interpreted, and compiled.

Each check is a process of its own, since Triton's interpreter is chosen when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("script", "interpret"), [("interpreted", "1"), ("compiled", "0")])
def test_triton(script, interpret, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    out = subprocess.run(
        [sys.executable, str(HERE / f"{script}.py")],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
