"""Peak memory of a contestant's steps, measured in a process that does nothing else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from filterwise.lab.errors import LabError, reason
from harness.contestants import CONTESTANTS, weight_shapes
from harness.nets import NETS
from harness.steps import Cell, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.contestants import Contestant

__all__ = ["converted_bytes", "peak"]

HOME = Path(__file__).resolve().parent.parent
STEPS = 3


def converted_bytes(cell: Cell) -> int:
    """Return the size of one copy of the weights that are converted, in float32."""
    return sum(4 * math.prod(shape) for shape in weight_shapes(cell.net.build()))


def peak(contestant: Contestant, cell: Cell, threads: int, times: int = 3) -> float:
    """Return the largest memory during steps, in bytes: the smallest of several fresh processes.

    On the CPU it is the process's resident set, libraries included; on a GPU what torch had
    allocated. What an allocator happens to hold back comes on top, never off.

    Raises:
        LabError: If a process fails.
    """
    found = []
    for _ in range(times):
        words = {
            "contestant": contestant.name,
            "net": cell.net.name,
            "batch": cell.batch,
            "micro_batches": cell.micro_batches,
            "size": cell.size,
            "device": str(cell.device),
            "autocast": cell.autocast,
            "compile": cell.compile,
            "threads": threads,
        }
        found.append(_in_a_process(json.dumps(words)))
    return min(found)


def _in_a_process(words: str) -> float:
    paths = os.pathsep.join((str(HOME), *(path for path in sys.path if path)))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "harness.memory", words],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=900,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"measuring memory took more than {error.timeout:g} s: {words}.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"measuring memory failed: {words}: {last}.")
    return float(done.stdout.split()[-1])


def _measure(words: dict) -> float:
    torch.set_num_threads(words.pop("threads"))
    contestant = CONTESTANTS[words.pop("contestant")]
    words["device"] = torch.device(words["device"])
    cell = Cell(**{**words, "net": NETS[words["net"]]})
    # What a compiled kernel's library takes is no copy of a weight: everybody loads it first.
    warm = Step(CONTESTANTS["ws"], Cell(NETS["toy"], 1, 1, None, cell.device))
    warm()
    del warm
    step = Step(contestant, cell)
    read = _watch(cell.device)
    for _ in range(STEPS):
        step()
    return read()


def _watch(device: torch.device) -> Callable[[], float]:
    """Forget the peak so far, and return a function that reads the new one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: float(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise LabError(
            f"the peak of the resident set cannot be reset here ({reason(error)}); memory is"
            " measured on Linux or a GPU only."
        ) from None
    return _high_water


def _high_water() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    raise LabError("/proc/self/status has no VmHWM.")


if __name__ == "__main__":
    try:
        print(_measure(json.loads(sys.argv[1])))
    except LabError as error:
        sys.exit(str(error))
