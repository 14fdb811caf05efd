"""Independent pieces of work in several processes: each whole or not done, nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from filterwise.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

__all__ = ["work_through"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_through(
    items: Sequence[Item],
    work: Callable[[Item, bool], Result | None],
    *,
    start: Callable[..., None],
    arguments: tuple[Any, ...] = (),
    processes: int,
    threads: int = 1,
    option: str = "--processes",
    finished: Callable[[Item, Result], None],
) -> None:
    """Do some work on each item in processes of their own.

    Args:
        items: In the order to begin them.
        work: Called in a process with an item and whether to wait for it. Without waiting it
            returns None for one that another command is at; those come again at the end.
        start: Called in each process first, with `arguments` and an event that is set when the
            work is to stop.
        arguments: Of `start`.
        processes: How many at a time.
        threads: Of torch, in each process.
        option: What the command line calls `processes`.
        finished: Called here with each item that was done, and what came of it.

    Raises:
        LabError: If a process is killed from outside.
        KeyboardInterrupt: Passed on after the processes have stopped.
    """
    if not items:
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    begin = (threads, start, arguments, stop)
    with ProcessPoolExecutor(min(processes, len(items)), context, _begin, begin) as executor:
        try:
            waiting = {executor.submit(work, item, False): item for item in items}
            elsewhere = _collect(waiting, finished)
            waiting = {executor.submit(work, item, True): item for item in elsewhere}
            _collect(waiting, finished)
        except BrokenProcessPool:
            raise LabError(
                "A training process was killed from outside (out of memory?). Finished runs are"
                f" kept; give the same command again, with {option} 1 if memory is short."
            ) from None
        finally:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)


def _collect(
    waiting: dict[Future[Result | None], Item], finished: Callable[[Item, Result], None]
) -> list[Item]:
    """Report what is done as it comes; return what another command is at."""
    elsewhere = []
    pending = set(waiting)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if result is None:
                elsewhere.append(waiting[future])
            else:
                finished(waiting[future], result)
    return elsewhere


def _begin(threads: int, start: Callable[..., None], arguments: tuple[Any, ...], stop: Any) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides, and tells through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    start(*arguments, stop)


def _die_with_parent() -> None:
    """End this process when its parent is gone: a killed command must leave nobody training."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
