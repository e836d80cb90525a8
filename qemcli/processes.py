"""Work spread over processes of this machine: spawned, one single-threaded process a worker, none
left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any

from qemcli.errors import EnvironmentFailure

STOPS = (signal.SIGINT, signal.SIGTERM)


def spread(
    work: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    start: Callable[..., None] | None = None,
    shared: tuple[Any, ...] = (),
) -> Iterator[int]:
    """Run `work(*job)` for every job; yields the positions of jobs as they are done.

    `start(*shared)` runs once in each worker, for what is too large to send with every job. An
    error in a job, Ctrl-C or a signal ends the workers at once and is raised here: what a job left
    half done is its own business, so jobs write beside and rename. Raises EnvironmentFailure where
    a worker was killed.
    """
    if not jobs:
        return
    pool = ProcessPoolExecutor(max(1, workers), get_context("spawn"), _begin, (start, shared))
    try:
        with _held():
            futures = {pool.submit(work, *job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool | BrokenPipeError):
            raise EnvironmentFailure(
                "a worker process was killed (out of memory?); what was finished is kept",
                "go on with the same command and --workers 1",
            ) from None
        raise
    pool.shutdown()


@contextmanager
def _held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what a worker is told at its start is never cut short, and it
    inherits that both wait, so that neither finds it half way up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(start: Callable[..., None] | None, shared: tuple[Any, ...]) -> None:
    """In a worker: Ctrl-C is its parent's business, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_follow, daemon=True).start()
    if start is not None:
        start(*shared)


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
