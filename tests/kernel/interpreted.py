"""Run by `test_triton` as a process of its own: Triton takes its interpreter when imported.

The interpreter computes on the CPU what a GPU would; it takes 20 milliseconds for a filter.
"""

from __future__ import annotations

import torch

from filterwise.kernel import triton_gpu
from kernel.cases import METHODS, assert_as_eager, assert_right, assert_rules, case, mixed, run

torch.manual_seed(0)
torch.set_num_threads(1)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def main() -> None:
    """Compare with the published formulas, and with the eager kernel in every dtype."""
    shapes = [(2, 16), (1, 7, 3, 7), (1, 2100)]
    cases = [case(text, shapes[i % 3], mean=0.1 * i) for i, text in enumerate(METHODS)]
    cases += [case(text, (1, 100), mean=1e4, std=1e-3) for text in ("ws", "wn", "cwn", "sws")]
    cases.append(case("ws(affine=true)", (1, 40_000)))
    outs, gradients = run(triton_gpu, cases, in_place=True)
    for one, out, found in zip(cases, outs, gradients, strict=True):
        assert_right(one, out, found, 1e-6)
    for start, dtype in enumerate(DTYPES):
        gradient = DTYPES[min(start + 1, 3)]
        some = [one for one in mixed(dtype, gradient)[start::4] if triton_gpu.serves(one.layer)]
        # The interpreter cuts bfloat16 off where a GPU rounds it: a whole last digit.
        half = 3e-6 if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
        exact = dtype == torch.float64
        assert_as_eager(
            triton_gpu,
            some,
            effective=1e-13 if exact else half,
            gradient=1e-12 if exact else max(2e-5, half),
        )
    assert_rules(triton_gpu, ("ws", "wa", "cwn"))


main()
