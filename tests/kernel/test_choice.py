"""Which kernel serves: what "auto" means, what is refused, and when packages are imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import filterwise as fw
from filterwise.errors import FilterwiseWarning
from filterwise.kernel import check_kernel, choice, resolve, standardize
from kernel.cases import case

IMPORTS = """
import json, sys
import torch
import filterwise as fw

def there():
    return [name in sys.modules for name in ("numba", "triton.language")]

found = [there()]
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
fw.convert_(model, "wa", select="*")
found.append(there())
model(torch.randn(1, 3, 5, 5))
found.append(there())
print(json.dumps(found))
"""


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these packages can be imported, and no others."""

    def pretend(*names):
        monkeypatch.setattr(choice, "_works", lambda name: name in names)
        resolve.cache_clear()

    yield pretend
    resolve.cache_clear()


@pytest.mark.parametrize(
    ("names", "served"),
    [
        ((), ("eager", "eager")),
        (("numba",), ("numba", "eager")),
        (("triton",), ("eager", "triton")),
        (("numba", "triton"), ("numba", "triton")),
    ],
)
def test_auto_takes_what_is_installed(installed, names, served):
    installed(*names)
    assert (resolve("auto", "cpu"), resolve("auto", torch.device("cuda:1"))) == served
    assert {resolve("auto", device) for device in ("mps", "xpu", "meta")} == {"eager"}
    assert resolve("eager", "cuda") == "eager"


def test_a_kernel_that_cannot_serve_is_refused(installed):
    installed()
    with pytest.raises(ValueError, match=r"needs numba.*pip install 'filterwise\[fast\]'"):
        check_kernel("numba")
    with pytest.raises(ValueError, match="needs triton"):
        resolve("triton", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, eager, numba, triton, got 'fast'"):
        check_kernel("fast")
    layer = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="pip install"):
        fw.convert_(layer, "wa", select="*", kernel="numba")
    assert type(layer) is torch.nn.Conv2d
    installed("numba", "triton")
    with pytest.raises(ValueError, match="runs on cuda, and the weight is on cpu"):
        standardize(*case("ws", (2, 9)).layer, kernel="triton")
    assert resolve("triton", "meta") == resolve("numba", "meta") == "eager"


def test_a_broken_package_is_said_and_passed_over(monkeypatch, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('numpy is too new')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    with pytest.warns(FilterwiseWarning, match="numba is installed but .*numpy is too new"):
        assert not choice._works.__wrapped__("numba")


def test_packages_are_imported_when_first_used():
    pytest.importorskip("numba", reason="numba is not installed: pip install 'filterwise[fast]'")
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == [[False, False], [False, False], [True, False]]


def test_a_kernel_that_fails_to_prepare_is_said_and_passed_over(monkeypatch):
    """Triton on a machine without a C compiler fails when it first launches."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

    class Module:
        @staticmethod
        def prepare():
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(choice, "module_of", lambda _: Module)
    with pytest.warns(FilterwiseWarning, match="triton is installed but .*C compiler"):
        assert not choice._works.__wrapped__("triton")
