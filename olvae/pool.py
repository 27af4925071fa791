"""Run tasks in worker processes that can be stopped, and never outlive the main process."""

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

_T = TypeVar("_T")
_R = TypeVar("_R")

# Called with the number of images done, and of all images if it is known.
OnProgress = Callable[[int, int | None], None]

# Seconds between looks at the progress, and at whether the main process is alive.
POLL_S = 0.1


class Cancelled(Exception):  # noqa: N818  (nothing went wrong)
    """Raised in a worker process when the main process wants no more results."""


class SharedProgress:
    """Count the images that all processes have done, and ask them to stop."""

    def __init__(self, context: Any) -> None:
        self.count = context.Value("Q", 0)
        self.stop = context.Value("b", 0, lock=False)

    def advance(self, images: int = 1) -> None:
        """Count images that are done; raise Cancelled if the task should stop."""
        with self.count.get_lock():
            self.count.value += images
        if self.stop.value:
            raise Cancelled


def run_in_processes(
    function: Callable[[_T, SharedProgress], _R],
    tasks: Sequence[_T],
    workers: int,
    on_progress: Callable[[int], None],
) -> Generator[_R, None, None]:
    """Yield the result of ``function`` for every task, in order of completion.

    Close the iterator (``contextlib.closing``) to stop early: tasks end at their next
    :meth:`SharedProgress.advance`. Worker processes exit by themselves if the main process is
    killed. The function and the tasks reach them by fork on Linux, elsewhere by pickle.
    ``on_progress`` gets the number of images done, several times a second; not before the processes
    are forked, so it may start threads. ChildProcessError if a worker process was killed.
    """
    context = mp.get_context("fork" if sys.platform == "linux" else None)
    progress = SharedProgress(context)
    processes = max(1, min(workers, len(tasks)))
    executor = ProcessPoolExecutor(
        processes, context, _start_worker, (function, progress, os.getpid())
    )
    try:
        waiting = {executor.submit(_run_task, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
            on_progress(progress.count.get_obj().value)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps for lack of memory: lower `workers`"
        ) from error
    finally:
        # Also after the caller closed the iterator early.
        progress.stop.value = 1
        executor.shutdown(wait=True, cancel_futures=True)


# In a worker process: the function, and the progress that it shares with the others.
_work: tuple[Callable[[Any, SharedProgress], Any], SharedProgress] | None = None


def _start_worker(
    function: Callable[[Any, SharedProgress], Any], progress: SharedProgress, parent: int
) -> None:
    global _work
    _work = function, progress
    start_worker(parent)


def start_worker(parent: int, *_: object) -> None:
    """Let a process that works for ``parent`` use one thread, ignore Ctrl-C, and end with it."""
    # Ctrl-C reaches all processes; the main one stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """Wait until this process' parent ends, and exit at once."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _run_task(task: Any) -> Any:
    assert _work is not None
    function, progress = _work
    return function(task, progress)
