"""What a call of the compiled kernel is given: one block of 64-bit integers.

First the head (`Job`), then a row (`Column`) for each layer. Floating-point numbers stand in it by
their bits.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "BFLOAT16",
    "DOUBLE",
    "HALF",
    "KEPT",
    "MAX",
    "NONE",
    "OUTSIDE",
    "ROOT",
    "SINGLE",
    "Column",
    "Job",
]

SINGLE, BFLOAT16, HALF, DOUBLE = range(4)
"""Codes of the dtypes."""

ROOT, OUTSIDE, MAX, NONE = range(4)
"""Codes of the forms of f."""

KEPT = 4
"""Numbers kept of each filter for the backward, in float64: mean, unit, factor, curvature."""


class Job(IntEnum):
    """Places in the head of a job."""

    TASK = 0
    TASKS = 1
    LAYERS = 2
    BACKWARD = 3
    WEIGHTS = 4
    BUFFERS = 5
    BUFFER_LENGTH = 6
    BUFFERS_TAKEN = 7
    LENGTH = 8


class Column(IntEnum):
    """Places in a layer's row of a job; an address is 0 where there is nothing."""

    BEFORE = 0
    WEIGHT = 1
    OUT = 2
    GRADIENT = 3
    KEPT = 4
    GAIN = 5
    OFFSET = 6
    TO_GAIN = 7
    TO_OFFSET = 8
    WEIGHT_TYPE = 9
    OUT_TYPE = 10
    GRADIENT_TYPE = 11
    GAIN_TYPE = 12
    OFFSET_TYPE = 13
    FILTERS = 14
    FAN_IN = 15
    RUN = 16
    RUN_STRIDE = 17
    PER_GROUP = 18
    FILTER_STRIDE = 19
    GROUP_STRIDE = 20
    CENTRE = 21
    RAW = 22
    SCALE = 23
    EPS = 24
    CONSTANT = 25
    UNBIASED = 26
    LENGTH = 27
