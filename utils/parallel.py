"""One function over many tasks in several processes: in order, with few tasks in flight, and no process left behind."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
IN_FLIGHT = 4  # tasks handed out per process: enough to keep all busy, few enough to hold in memory


class WorkerLost(ChildProcessError):
    """A worker process ended without an answer, as one that the system kills for its memory does."""


def _end_with_parent() -> None:
    """Leave Ctrl-C to the main process, and end with it even when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parallel(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`function(task)` for every task, in the tasks' order; up to one worker means in this process.

    What a task raises is raised here. Raises WorkerLost where a process dies.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        pending = deque(pool.submit(function, task) for task in itertools.islice(tasks, IN_FLIGHT * workers))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
        except BrokenProcessPool as error:
            raise WorkerLost(f"one of {workers} worker processes died; fewer of them need less memory") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
