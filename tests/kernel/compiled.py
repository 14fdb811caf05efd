"""Run by `test_triton` as a process of its own: compile the GPU programs, which needs no GPU.

The interpreter runs what the compiler refuses (a variable that changes its type in a loop).
"""

from __future__ import annotations

import warnings

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from filterwise.kernel.triton_rows import BLOCK, backward_rows, forward_rows

COMMON = {"largest": 1e4, "size": BLOCK}
FORWARD = (
    {"weight_kind": tl.float32, "out_kind": tl.bfloat16, "gain_kind": None, "offset_kind": None}
    | {"kind": tl.float32, "centre": True, "raw": False, "scale": "outside", "one_run": True},
    {"weight_kind": tl.float64, "out_kind": tl.float64, "gain_kind": tl.float64}
    | {"offset_kind": tl.float32, "kind": tl.float64, "centre": False, "raw": True}
    | {"scale": "max", "one_run": False},
)
BACKWARD = (
    {"weight_kind": tl.float32, "gradient_kind": tl.bfloat16, "gain_kind": None}
    | {"offset_kind": None, "gain_largest": 0.0, "offset_largest": 0.0}
    | {"kind": tl.float32, "centre": True, "raw": False, "one_run": True},
    {"weight_kind": tl.float16, "gradient_kind": tl.float32, "gain_kind": tl.float16}
    | {"offset_kind": tl.float32, "gain_largest": 1e4, "offset_largest": 1e4}
    | {"kind": tl.float32, "centre": False, "raw": True, "one_run": False},
)
TARGET = GPUTarget("cuda", 80, 32)


def main() -> None:
    """Compile each program for the plainest and for the most entangled layer."""
    for program, variants in ((forward_rows, FORWARD), (backward_rows, BACKWARD)):
        names = program.arg_names
        for variant in variants:
            constants = COMMON | variant
            kinds = {name: "constexpr" if name in constants else "*i64" for name in names}
            places = {(names.index(name),): value for name, value in constants.items()}
            source = ASTSource(fn=program, signature=kinds, constexprs=places)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert compile(source, target=TARGET, options={"num_warps": 4}).asm["ptx"]


main()
