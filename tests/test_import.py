"""Law 33: importing filterwise is quiet: torch, and nothing that torch does not bring."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys, warnings
import torch
before = {name.partition(".")[0] for name in sys.modules}

def settings():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
        torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
    )

found = settings()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import filterwise
print(json.dumps({
    "new": sorted({name.partition(".")[0] for name in sys.modules} - before - {"filterwise"}),
    "cuda": torch.cuda.is_initialized(),
    "triton": "triton" in sys.modules,
    "said": [str(one.message) for one in said],
    "unchanged": settings() == found,
}))
"""


def test_law33_import_is_quiet():
    """No module beyond torch's, CUDA and Triton left alone, no warning, no setting changed."""
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout)
    assert not [name for name in found["new"] if name not in sys.stdlib_module_names]
    assert not found["cuda"]
    assert not found["triton"]
    assert not found["said"]
    assert found["unchanged"]
