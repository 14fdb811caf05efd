"""Running a compiled function on torch's own threads.

A second pool of threads would fight with torch's for the same cores, so the function is handed to
the OpenMP library that torch has loaded, by the entry that every compiler's OpenMP code uses. Where
there is none (Windows), ordinary threads serve, which ctypes lets run at the same time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

__all__ = ["run"]


def run(address: int, job: int, threads: int) -> None:
    """Call the function at an address with a job, on so many threads at once.

    Args:
        address: Of a C function that takes a pointer; the threads share the work among themselves.
        job: The pointer.
        threads: How many; OpenMP may grant fewer.
    """
    if threads <= 1:
        _function(address)(job)
        return
    parallel = _openmp()
    if parallel is not None:
        parallel(address, job, threads, 0)
        return
    others = [threading.Thread(target=_function(address), args=(job,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    _function(address)(job)
    for other in others:
        other.join()


@functools.cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@functools.cache
def _openmp() -> Any:
    """Return ``GOMP_parallel(function, data, threads, flags)`` of torch's library, or None."""
    only_if_loaded = getattr(os, "RTLD_NOLOAD", None)
    if only_if_loaded is None or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs", Path(sys.prefix) / "lib"):
        for path in sorted(folder.glob("lib*omp*")):
            try:
                parallel = ctypes.CDLL(str(path), mode=only_if_loaded).GOMP_parallel
            except (OSError, AttributeError):
                continue
            parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            parallel.restype = None
            return parallel
    return None
