"""Open files of processes that meet: how many, and what is said if too few are allowed."""

import resource
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.launcher import Agreement, gather, join, leave, of_each
from olvae.training.processes import process_count
from tests.forks import fork_ranks


def count_sockets() -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link.readlink()).startswith("socket:") for link in links)


def sockets_of_ranks(world: int, folder: Path, config: str | None = None) -> list[int]:
    """Sockets of each process after it has met the others, gathered and agreed, in all ways.

    ``config``: says of the process group what it is not, as if it had no gloo for CPUs.
    """

    def work() -> None:
        rank, _ = join()
        with patch.object(dist, "get_backend_config", lambda: config or "cpu:gloo,cuda:gloo"):
            for agreement in (Agreement(), Agreement(), Agreement()):
                assert agreement.any_asked(rank == 1, wait=True)
        of_each(rank)
        gather(rank)
        (folder / str(rank)).write_text(str(count_sockets()))
        leave()

    fork_ranks(work, exits=[0] * world)
    return [int((folder / str(rank)).read_text()) for rank in range(world)]


def test_processes_have_one_socket_for_each_other_one(tmp_path):
    """The first has also one for each that asks its store; each further group would add one."""
    counts = {world: sockets_of_ranks(world, tmp_path) for world in (2, 3, 5)}
    first = {world: found[0] for world, found in counts.items()}
    others = {world: max(found[1:]) for world, found in counts.items()}
    assert others[3] - others[2] == 1
    assert others[5] - others[3] == 2
    assert first[5] - first[3] == 4


def test_agreements_share_one_group_where_the_first_one_is_for_gpus_alone(tmp_path):
    counts = {world: max(sockets_of_ranks(world, tmp_path, "cuda:nccl")[1:]) for world in (2, 4)}
    assert counts[4] - counts[2] == 4  # two for two more processes


def test_a_limit_that_may_be_raised_is_no_obstacle():
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (25, 4000))
        join()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (4000, 4000)
        leave()

    fork_ranks(work, exits=[0] * 2)


@pytest.mark.parametrize(
    "meet", [join, lambda: process_count({"devices": 32, "accelerator": "cpu"})]
)
def test_too_low_a_limit_is_named_before_processes_meet(meet, monkeypatch):
    """Whether torchrun starts them, or Lightning."""
    if meet is join:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (80, 80))
    with pytest.raises(ConfigError, match=r"^32 processes .*94 .*80 .*ulimit -n"):
        meet()
