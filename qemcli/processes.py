"""Work spread over processes of this machine: spawned, one single-threaded process a worker, none
left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any


def spread(
    work: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    start: Callable[..., None],
    shared: tuple[Any, ...],
) -> Iterator[int]:
    """Run `work(*job)` for every job; yields the positions of jobs as they are done.

    `start(*shared)` runs once in each worker, for what is too large to send with every job. An
    error in a
    job, Ctrl-C or a signal ends the workers at once and is raised here: what a job left half done
    is its own business, so jobs write beside and rename.
    """
    if not jobs:
        return
    pool = ProcessPoolExecutor(max(1, workers), get_context("spawn"), start, shared)
    futures = {pool.submit(work, *job): i for i, job in enumerate(jobs)}
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()
