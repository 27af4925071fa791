import faulthandler
import gc
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.devices import keep_freed_memory, resolve_device, resolve_devices, resolve_precision
from olvae.launcher import Agreement, gather, join, leave


@pytest.fixture
def gpus(monkeypatch):
    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("gpus_wanted", "trainer", "there", "expected"),
    [
        ("0", {}, 4, ("cpu", 1)),
        ("0", {"accelerator": "cpu", "devices": 2}, 0, ("cpu", 2)),
        ("2", {}, 4, ("cuda", [0, 1])),
        ("1,3", {}, 4, ("cuda", [1, 3])),
        ("0,", {}, 4, ("cuda", [0])),
        (None, {}, 4, ("cuda", 4)),
        (None, {}, 0, ("cpu", 1)),
        (None, {"accelerator": "cpu", "devices": 2}, 4, ("cpu", 2)),
        (None, {"accelerator": "gpu", "devices": "auto"}, 3, ("gpu", 3)),
        (None, {"devices": 2}, 4, ("cuda", 2)),
        (None, {"accelerator": "auto", "devices": -1}, 2, ("cuda", 2)),
        (None, {"devices": "-1"}, 2, ("cuda", 2)),
        (None, {"devices": "0, 2"}, 4, ("cuda", [0, 2])),
        (None, {"devices": "1,"}, 4, ("cuda", [1])),
        (None, {"devices": "2"}, 4, ("cuda", 2)),
        (None, {"accelerator": "cpu", "devices": "2"}, 4, ("cpu", 2)),
    ],
)
def test_accelerator_and_devices(gpus, gpus_wanted, trainer, there, expected):
    gpus(there)
    assert tuple(resolve_devices(gpus_wanted, trainer).values()) == expected


@pytest.mark.parametrize(
    ("flag", "there", "message"),
    [
        ("1", 0, "this machine has no GPU"),
        ("2", 1, "this machine has 1 GPU;"),
        ("0,5", 2, "this machine has 2 GPUs"),
        ("two", 2, "give a number of GPUs"),
        ("-1", 2, "give a number of GPUs"),
        (",", 2, "give a number of GPUs"),
    ],
)
def test_gpus_that_are_not_there(gpus, flag, there, message):
    gpus(there)
    with pytest.raises(ConfigError, match=message):
        resolve_devices(flag, {})
    with pytest.raises(
        ConfigError, match=r"lightning\.trainer\.devices: '0,1': give a number of processes"
    ):
        resolve_devices(None, {"accelerator": "cpu", "devices": "0,1"})
    gpus(2)
    with pytest.raises(
        ConfigError, match=r"lightning\.trainer\.devices: 'two': give a number, a list of GPUs"
    ):
        resolve_devices(None, {"devices": "two"})


def test_precision():
    assert [resolve_precision(p, "cpu") for p in ("32", "bf16")] == ["32-true", "bf16-mixed"]
    assert [resolve_precision(p, "cuda") for p in ("16", "fp16", "float16")] == ["16-mixed"] * 3
    with pytest.raises(ConfigError, match="choose from fp16, bf16, 32"):
        resolve_precision("64", "cuda")
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("16", "cpu")


REPO = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork_two(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in two children of this process, as torchrun would; they have what is imported already."""

    def work(rank: int) -> None:
        os.environ.update(
            {
                "MASTER_ADDR": "127.0.0.1",
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
        )
        function(*arguments)

    fork_each(work)


def fork_each(work: Callable[[int], None], exits: Sequence[int] = (0, 0)) -> None:
    """Call ``work`` with 0 and with 1, each in a child of this process, with a port; fail if one of them does."""
    port = str(free_port())

    def watched(rank: int) -> None:
        faulthandler.dump_traceback_later(100, exit=True)
        os.environ["MASTER_PORT"] = port
        work(rank)

    gc.collect()  # a child that collected a process group of this one would wait for threads that it does not have
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=watched, args=(rank,)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == list(exits)


def meet(out: Path) -> None:
    rank, world = join()
    assert join() == (rank, world)
    first = gather({"rank": rank, "z": torch.full((2,), float(rank))})
    second = gather(None if rank else 7)
    assert (first is None) == (rank > 0) == (second is None)
    agreement = Agreement()  # the second process asks at its second call, the first one at the end
    answers = [agreement.any_asked(asked) for asked in (False, rank == 1, False, False)]
    answers.append(agreement.any_asked(2 if rank == 0 else 1, wait=True))
    both = gather(answers)
    if first:
        out.write_text(f"{world} {[(p['rank'], p['z'].tolist()) for p in first]} {second} {both}")
    leave()
    assert gather(1) == [1]


def test_two_processes_meet_and_the_first_gets_what_each_has(tmp_path):
    fork_two(meet, tmp_path / "out")
    answers = [0, 0, 1, 0, 2]
    expected = f"2 [(0, [0.0, 0.0]), (1, [1.0, 1.0])] [7, None] {[answers, answers]}"
    assert (tmp_path / "out").read_text() == expected


def test_alone_there_is_nobody_to_meet(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert join() == (0, 1)
    assert not dist.is_initialized()
    assert gather("mine") == ["mine"]
    assert [Agreement().any_asked(asked) for asked in (False, True)] == [False, True]
    leave()


@pytest.mark.parametrize(
    ("gpus", "local", "expected"), [(0, "1", "cpu"), (1, "1", "cuda"), (4, "3", "cuda:3")]
)
def test_each_process_takes_its_own_gpu(monkeypatch, gpus, local, expected):
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device() == expected
    assert resolve_device("cpu") == "cpu"
    assert current == [expected] * (gpus > 1)
    if gpus > 2:
        assert resolve_device("cuda:2") == current[-1] == "cuda:2"
    else:
        with pytest.raises(ConfigError, match=f"this machine has {gpus} GPUs"):
            resolve_device("cuda:2")


FAULTS = """
import resource, sys
import torch
from olvae.devices import keep_freed_memory

assert sys.argv[1] == "not" or keep_freed_memory()

def use():
    return torch.ones(2**24).sum()  # 64 MB

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
def test_a_tensor_gets_the_pages_of_the_one_before():
    """By the system's count of pages that it had to supply."""
    keep, give = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, mode]))
        for mode in ("keep", "not")
    )
    assert keep < 16 < give  # 16384 pages, or 32 large ones


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
