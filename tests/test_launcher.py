"""Processes that meet, gather and agree; in one process there is nobody to meet."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.launcher import (
    Agreement,
    check_others,
    from_first,
    gather,
    gather_parts,
    join,
    leave,
    of_each,
    together,
)
from tests.forks import fork_ranks


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


def test_gather_of_two_processes_gives_the_first_what_each_has(tmp_path):
    fork_ranks(meet, tmp_path / "out")
    answers = [0, 0, 1, 0, 2]
    expected = f"2 [(0, [0.0, 0.0]), (1, [1.0, 1.0])] [7, None] {[answers, answers]}"
    assert (tmp_path / "out").read_text() == expected


def fail(where: str, error: Exception) -> None:
    """Fail in the second process, where the first one is in another part of its work."""
    with together() as (rank, _):
        assert of_each(rank) == [0, 1]
        if rank == 1 and where != "nowhere":
            raise error
        if where == "while it works":
            while True:
                check_others()
        elif where == "where it gathers":
            gather(rank)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (ConfigError, "while it works"),
        (ConfigError, "where it gathers"),
        (OSError, "at its end"),
    ],
)
def test_an_error_of_one_process_is_raised_in_the_first_and_ends_the_others(where, kind, capfd):
    def work() -> None:
        with suppress_in_first(kind):
            fail(where, kind("one line", "and another"))

    fork_ranks(work, exits=(0, 2 if kind is ConfigError else 1))
    assert capfd.readouterr().err.count("caught") == 1


@contextmanager
def suppress_in_first(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        sys.stderr.write(f"caught {error}\n")
        assert os.environ["RANK"] == "0"


def test_processes_that_succeed_leave_together():
    fork_ranks(fail, "nowhere", None)


def meet_in_parts(out: Path) -> None:
    rank, _ = join()
    held = []

    def parts():
        for part in range(3 if rank else 9):
            held.append(part)
            yield rank, part

    found = list(gather_parts(parts()))
    again = list(gather_parts([]))
    everything = gather((found, again, held))
    if everything:
        out.write_text(str(everything))
    leave()


def test_gather_parts_gives_the_first_process_those_of_the_others(tmp_path):
    fork_ranks(meet_in_parts, tmp_path / "out")
    expected = [([(1, 0), (1, 1), (1, 2)], [], []), ([], [], [0, 1, 2])]
    assert (tmp_path / "out").read_text() == str(expected)


def take_from_first() -> None:
    def make() -> int:
        if os.environ["RANK"] == "1":
            raise AssertionError
        return 7

    def fail_in_first() -> None:
        raise ValueError(os.environ["RANK"])

    with together():
        assert from_first(make) == 7
        with pytest.raises(ValueError, match="0"):
            from_first(fail_in_first)


def test_the_first_process_makes_a_value_or_an_error_for_all():
    fork_ranks(take_from_first)


def test_one_process_gathers_and_agrees_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert join() == (0, 1)
    assert not dist.is_initialized()
    assert gather("mine") == ["mine"]
    assert from_first(lambda: "mine") == "mine"
    assert list(gather_parts(["mine"])) == []
    assert [Agreement().any_asked(asked) for asked in (False, True)] == [False, True]
    leave()
