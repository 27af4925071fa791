"""Run tasks in worker processes that can be stopped, and never outlive the main process."""

import multiprocessing as mp
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

import torch

from olvae.files import SIGNALS
from olvae.launcher import POLL_S, check_others, exit_with_parent, gather, this_process

_T = TypeVar("_T")
_R = TypeVar("_R")

# Called with the number of images done, and of all images if it is known.
OnProgress = Callable[[int, int | None], None]


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
) -> list[_R] | None:
    """Return the results of ``function`` for all tasks, in their order.

    Each rank of :func:`olvae.launcher.join` does its share of them; the first one gets all results,
    the others None. After an exception, as of Ctrl-C or another rank, tasks end at their next
    :meth:`SharedProgress.advance`. Worker processes exit by themselves if the main process is
    killed. The function and the tasks reach them by fork on Linux, elsewhere by pickle.
    ``on_progress`` gets the number of images done, as if all ranks were equally fast, several times
    a second; not before the processes are forked, so it may start threads. ChildProcessError if a
    worker process was killed.
    """
    rank, world = this_process()
    own = tasks[rank::world]
    context = mp.get_context("fork" if sys.platform == "linux" else None)
    progress = SharedProgress(context)
    processes = max(1, min(workers, len(own)))
    executor = ProcessPoolExecutor(
        processes, context, _start_worker, (function, progress, os.getpid())
    )

    # A task in each process and one more, so that none has to wait for this one.
    coming = enumerate(own)
    waiting: dict[Future[_R], int] = {}
    results: dict[int, _R] = {}
    try:
        while len(results) < len(own):
            for number, task in islice(coming, 2 * processes - len(waiting)):
                waiting[executor.submit(_run_task, task)] = number
            done, _ = wait(waiting, POLL_S, FIRST_COMPLETED)
            on_progress(progress.count.get_obj().value * world)
            check_others()
            for future in done:
                results[waiting.pop(future)] = future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps for lack of memory: lower `workers`"
        ) from error
    finally:
        progress.stop.value = 1
        executor.shutdown(wait=True, cancel_futures=True)

    # Put the shares together again.
    parts = gather([results[number] for number in sorted(results)])
    if parts is None:
        return None
    return [parts[number % world][number // world] for number in range(len(tasks))]


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
    # A console's Ctrl-C and Ctrl-Break reach all processes; the main one stops the others.
    for number, name in SIGNALS.items():
        if name in ("Ctrl-C", "SIGBREAK"):
            signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def _run_task(task: Any) -> Any:
    assert _work is not None
    function, progress = _work
    return function(task, progress)
