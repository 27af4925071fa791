"""Work in several processes, that can be stopped between two images and leaves no process behind."""

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

__all__ = ["OnProgress", "Ticker", "cores", "in_processes", "unseen"]


T = TypeVar("T")

R = TypeVar("R")

OnProgress = Callable[[int, int | None], None]
"""Called with the number of images that are done, and of all if that is known."""

LOOK_S = 0.1  # between looks at what is done, and at whether the main process lives


class TaskStopped(Exception):  # noqa: N818  (nothing went wrong)
    """In a working process: the main process wants no more."""


class Ticker:
    """The number of images that all processes have done, and the word to stop."""

    def __init__(self, context: Any) -> None:
        self._count = context.Value("Q", 0)
        self._stop = context.Value("b", 0, lock=False)

    def tick(self, images: int = 1) -> None:
        """Count images; a task calls this after each.

        Raises:
            TaskStopped: the task is to end here.
        """
        with self._count.get_lock():
            self._count.value += images
        if self._stop.value:
            raise TaskStopped

    def stop(self) -> None:
        self._stop.value = 1

    @property
    def count(self) -> int:
        return int(self._count.get_obj().value)


def in_processes(
    function: Callable[[T, Ticker], R], tasks: Sequence[T], workers: int, on_progress: Callable[[int], None]
) -> Generator[R, None, None]:
    """Results of ``function`` for every task, in the order in which they come.

    Close the iterator (``contextlib.closing``) to stop early: tasks end at their next tick. Should the main process
    be killed, the others end themselves.

    Args:
        function: it and the tasks reach the processes by fork on Linux, elsewhere by pickle.
        on_progress: called some times a second with the number of images that are done.

    Raises:
        ChildProcessError: a process was killed.
        Exception: what a task raised.
    """
    context = mp.get_context("fork" if sys.platform == "linux" else None)
    ticker = Ticker(context)
    processes = max(1, min(workers, len(tasks)))
    executor = ProcessPoolExecutor(processes, context, _begin, (function, ticker, os.getpid()))
    try:
        waiting = {executor.submit(_call, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, LOOK_S, FIRST_COMPLETED)
            on_progress(ticker.count)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a working process was killed, perhaps for want of memory: lower --workers") from error
    finally:
        ticker.stop()
        executor.shutdown(wait=True, cancel_futures=True)


def unseen(*_: int | None) -> None:
    """Progress that nobody looks at."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: tuple[Callable[[Any, Ticker], Any], Ticker] | None = None


def _begin(function: Callable[[Any, Ticker], Any], ticker: Ticker, parent: int) -> None:
    global _work
    _work = function, ticker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the main process, which tells the others
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def _call(task: Any) -> Any:
    assert _work is not None
    function, ticker = _work
    return function(task, ticker)
