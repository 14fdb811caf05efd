"""Every architecture in a process of its own, with a limit on its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.compatibility.architectures import count_parameters
from filterwise.lab.compatibility.examine import examine
from filterwise.lab.compatibility.inputs import prepare
from filterwise.lab.errors import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from filterwise.lab.compatibility.architectures import Architecture

__all__ = ["Job", "count_all", "examine_all", "run_guarded"]

POLL_SECONDS = 0.5
START_SECONDS = 120.0
"""Limit for a process to start in; the first has the libraries to import."""


@dataclass
class Job:
    """Things to do with one architecture, one after the other, in one process.

    Attributes:
        one: The architecture.
        words: What to do: recipes, or what the function that runs them takes.
    """

    one: Architecture
    words: Sequence[str]


def examine_all(
    jobs: Sequence[Job], processes: int, seconds: float, stop: Callable[[], bool]
) -> Iterator[tuple[Architecture, str, dict[str, Any]]]:
    """Yield what each examination found, as it finishes.

    Args:
        jobs: Architectures and recipes, in the order to start them.
        processes: How many at a time.
        seconds: Limit for one recipe; what takes longer is ended and told as failed.
        stop: Asked before each start; what runs is finished.
    """
    return run_guarded(_examine_one, jobs, processes, seconds, stop)


def count_all(
    architectures: Sequence[Architecture],
    processes: int,
    seconds: float,
    stop: Callable[[], bool],
) -> Iterator[tuple[Architecture, str, dict[str, Any]]]:
    """Yield ``parameters`` of each architecture, or ``reason`` where it cannot be built."""
    jobs = [Job(one, ("count",)) for one in architectures]
    return run_guarded(_count_one, jobs, processes, seconds, stop)


def _examine_one(one: Architecture, recipes: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        prepared = prepare(one)
    except Exception as error:
        found = {"outcome": "unfit", "step": "build", "reason": reason(error), "seconds": 0.0}
        for recipe in recipes:
            yield recipe, found
        return
    for recipe in recipes:
        yield recipe, examine(one, recipe, prepared)


def _count_one(one: Architecture, words: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield words[0], {"parameters": count_parameters(one)}
    except Exception as error:
        yield words[0], {"reason": f"{type(error).__name__}: {reason(error)}"}


@dataclass
class _Running:
    """A process at work, and what it still has to do."""

    process: Any
    pipe: Connection
    job: Job
    left: deque[str]
    since: float = field(default_factory=time.monotonic)
    started: bool = False
    closed: bool = False


def run_guarded(
    function: Callable[[Architecture, Sequence[str]], Iterator[tuple[str, dict[str, Any]]]],
    jobs: Sequence[Job],
    processes: int,
    seconds: float,
    stop: Callable[[], bool],
) -> Iterator[tuple[Architecture, str, dict[str, Any]]]:
    """Run a function over jobs in processes; a crash or a hang ends one word of one job only.

    Args:
        function: Yields a word and what was found, for each word of a job in order. It is
            imported by the processes, so it stands in a module.
        jobs: What to do.
        processes: How many at a time.
        seconds: Limit for each word.
        stop: Asked before each start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["filterwise.lab.compatibility.warm"])
    waiting = deque(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes and not stop():
                running.append(_start(context, function, waiting.popleft()))
            if not running:
                return
            connection.wait([one.pipe for one in running], POLL_SECONDS)
            for one in list(running):
                yield from _receive(one)
                again = _ended(one, seconds)
                if again is None:
                    continue
                running.remove(one)
                if again:
                    word, found = again
                    yield one.job.one, word, found
                    if one.left:
                        waiting.appendleft(Job(one.job.one, tuple(one.left)))
    finally:
        for one in running:
            one.process.kill()
            one.process.join()


def _start(context: Any, function: Any, job: Job) -> _Running:
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, function, job), daemon=True)
    process.start()
    theirs.close()
    return _Running(process, mine, job, deque(job.words))


def _receive(one: _Running) -> Iterator[tuple[Architecture, str, dict[str, Any]]]:
    while one.left and not one.closed and one.pipe.poll():
        try:
            word, found = one.pipe.recv()
        except EOFError:  # a pipe that is closed can be read for ever
            one.closed = True
            return
        one.since = time.monotonic()
        if not one.started:
            one.started = True
            continue
        one.left.remove(word)
        yield one.job.one, word, found


def _ended(one: _Running, seconds: float) -> tuple[str, dict[str, Any]] | tuple[()] | None:
    """Return what to tell of the word at work if the process is over; None while it runs."""
    if not one.left:
        one.process.join()
        return ()
    took = time.monotonic() - one.since
    if took > (seconds if one.started else max(seconds, START_SECONDS)):
        one.process.kill()
        one.process.join()
        words = f"took longer than {seconds:.0f} s"
    elif one.closed:
        one.process.join()
        words = _how_it_died(one.process.exitcode)
    else:
        return None
    word = one.left.popleft()
    found = {"outcome": "failed", "step": "process", "reason": words, "seconds": round(took, 2)}
    return word, found


def _how_it_died(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _work(pipe: Connection, function: Any, job: Job) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    pipe.send(("", {}))  # the clock of the first word starts here
    for word, found in function(job.one, job.words):
        pipe.send((word, found))
    pipe.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
