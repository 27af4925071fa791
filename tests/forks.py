"""Processes as torchrun starts them, as children of the test's."""

import faulthandler
import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork_ranks(
    function: Callable[..., object], *arguments: object, exits: Sequence[int] = (0, 0)
) -> None:
    """Call a function in two children of this process, or one for each exit code, as torchrun
    would; they have what is imported already.
    """

    def work(rank: int) -> None:
        os.environ.update(
            {
                "MASTER_ADDR": "127.0.0.1",
                "WORLD_SIZE": str(len(exits)),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
        )
        function(*arguments)

    fork_each(work, exits)


def fork_each(work: Callable[[int], None], exits: Sequence[int] = (0, 0)) -> None:
    """Call ``work`` with 0, 1 and so on, each in a child of this process, with a port;
    fail unless they end with these codes.
    """
    port = str(free_port())

    def watched(rank: int) -> None:
        faulthandler.dump_traceback_later(100, exit=True)
        os.environ["MASTER_PORT"] = port
        work(rank)

    # A child that collected a process group of this one would wait for threads that it does not
    # have.
    gc.collect()
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=watched, args=(rank,)) for rank in range(len(exits))]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == list(exits)
