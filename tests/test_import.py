"""Law 33: importing filterwise is quiet: torch, and nothing that torch does not bring."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, warnings
import torch
before = {name.partition(".")[0] for name in sys.modules}
state = (
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
    torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
    torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import filterwise
print(json.dumps({
    "new": sorted({name.partition(".")[0] for name in sys.modules} - before - {"filterwise"}),
    "cuda": torch.cuda.is_initialized(),
    "triton": "triton" in sys.modules,
    "said": [str(one.message) for one in said],
    "unchanged": state == (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
        torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
    ),
}))
"""


@pytest.fixture(scope="module")
def found():
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


def test_law33_brings_nothing_beyond_torch(found):
    foreign = [name for name in found["new"] if name not in sys.stdlib_module_names]
    assert not foreign


def test_law33_leaves_cuda_and_triton_alone(found):
    assert not found["cuda"]
    assert not found["triton"]


def test_law33_warns_nothing_and_changes_no_setting(found):
    assert not found["said"]
    assert found["unchanged"]
