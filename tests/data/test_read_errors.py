import inspect
import multiprocessing
import pickle
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist

from olvae.cli.main import print_error
from olvae.data.read_errors import (
    ReadError,
    ReadErrors,
    TooManyUnreadableError,
    UnreadableImageError,
    UnreadableImages,
    read_or_replace,
    worker_death,
)
from olvae.launcher import join, leave
from tests.forks import fork_ranks


def account(epoch: int | None = None, images: int | None = None, limit: float = 0.01) -> ReadErrors:
    return ReadErrors(epoch, images, limit, "training", UnreadableImages())


def test_an_unreadable_file_is_named_and_counted_once_but_every_skip_is_in_the_epochs_total(caplog):
    errors = account(epoch=10, images=1000)
    for _ in range(5):
        errors.take([ReadError("a.jpg", "cut off")], 4)
    assert errors.lost == 1
    assert caplog.messages == [
        "skipped a.jpg: cut off",
        "training: 3 images skipped in this epoch",
        "training: 2 images skipped in this epoch",
    ]


def test_an_epoch_ends_when_all_processes_have_delivered_its_images(caplog):
    errors = account(epoch=12, images=1000)
    for _ in range(7):
        errors.take([ReadError("a.jpg", "cut off")], 2, world=3)
    assert errors.unreadable.delivered == 7 * 2 * 3
    assert caplog.messages[1:] == ["training: 2 images skipped in this epoch"] * 3


def test_a_name_that_commands_a_terminal_is_printed_as_text(caplog, capsys):
    name = "a\x1b]0;owned\x07\nerror: b.jpg"
    account(images=1000).take([ReadError(name, "bad\x1b[2J")], 1)
    assert caplog.messages == ["skipped a\\x1b]0;owned\\x07\\nerror: b.jpg: bad\\x1b[2J"]
    assert print_error(FileNotFoundError(f"{name}: no such folder")) == 1
    assert (
        capsys.readouterr().err
        == "error: a\\x1b]0;owned\\x07\nerror: error: b.jpg: no such folder\n"
    )


def test_several_unreadable_images_of_one_shard_count_and_warnings_do_not(caplog):
    errors = account(images=1000)
    errors.take([ReadError("a.tar", "cut off", str(i)) for i in range(7)], 4)
    errors.take([ReadError("b.tar", "no images in it", lost=False)], 4)
    assert errors.lost == 7
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("images", "limit", "broken"),
    [
        (1000, 0.01, 10),
        (12, 0.01, 0),
        (51, 0.01, 1),
        (200, 0.01, 3),
        (200, 0.0, 0),
        (None, 0.01, 1),
        (20, 0.7, 14),
    ],
)
def test_the_unreadable_limit_is_a_share_of_all_images(images, limit, broken):
    """A few of a small folder may be broken. Of an unknown number, one of 100; ten are named."""
    errors = account(images=images, limit=limit)
    errors.take([ReadError(f"f{i}", "bad") for i in range(broken)], 1)
    more = rf".*, and {broken - 9} more" if broken > 9 else ""
    with pytest.raises(
        TooManyUnreadableError, match=rf"{broken + 1} of \d+ images .* {limit:g}: f0 \(bad\){more}"
    ):
        errors.take([ReadError(f"f{broken}", "bad")], 1)


def lose(errors: ReadErrors, numbers: Sequence[int]) -> None:
    errors.take([ReadError(f"f{i}", "bad") for i in numbers], 1, world=2)


def share_counted(errors: ReadErrors) -> list[int]:
    """Share, and return the bytes that this process sends in each exchange."""
    sent = []
    exchange = dist.all_gather_object

    def counted(parts: list[Any], own: Any) -> None:
        sent.append(len(pickle.dumps(own)))
        exchange(parts, own)

    with patch.object(dist, "all_gather_object", counted):
        errors.share()
    return sent


def lose_many() -> None:
    rank, _ = join()
    errors = account(images=100_000, limit=0.05)
    lose(errors, range(2400) if rank == 0 else range(4899, 2299, -1))
    sent = share_counted(errors)
    assert errors.lost == 4900  # the hundred that both have met count once
    assert len(sent) == 3
    assert max(sent) < 40_000
    assert len(errors.unreadable.elsewhere) == 10

    # Each error travels once: one more takes no more than the first ten names do.
    lose(errors, [] if rank == 0 else [9000])
    (again,) = share_counted(errors)
    assert again < 1000
    assert errors.lost == 4901
    lose(errors, range(100))  # known to both
    assert not errors.unreadable.unshared

    # All stop together, and name files of the others as well.
    lose(errors, range(10_000, 10_100) if rank == 0 else [])
    message = r"5001 of 100000 images can't .* = 0\.05: f\d+ \(bad\), .*, and 4991 more"
    with pytest.raises(TooManyUnreadableError, match=message):
        errors.share()
    leave()


def test_many_unreadable_images_travel_once_and_a_bounded_number_at_a_time():
    fork_ranks(lose_many)


def test_processes_that_read_everything_name_the_files_of_another():
    def share() -> None:
        rank, _ = join()
        errors = account(images=1000, limit=0.0)
        lose(errors, [7] if rank else [])
        with pytest.raises(TooManyUnreadableError, match=r"1 of 1000 .*: f7 \(bad\)$"):
            errors.share()
        leave()

    fork_ranks(share)


def test_too_many_unreadable_images_stop_all_processes_together():
    def share() -> None:
        rank, _ = join()
        errors = account(images=1000)
        # 10 different ones, 4 that both have met
        lose(errors, range(7) if rank == 0 else range(3, 10))
        lose(errors, range(7) if rank == 0 else range(0))
        errors.share()
        assert errors.lost == 10  # of 1000, as one process would count
        assert errors.unreadable.delivered == 4
        if rank:
            errors.unreadable.delivered = 20
        errors.share()
        assert errors.unreadable.delivered == 20  # all divide by the same
        lose(errors, [10] if rank else [])
        with pytest.raises(TooManyUnreadableError, match="11 of 1000"):
            errors.share()
        leave()

    fork_ranks(share)


def read_but(broken: Sequence[int]):
    def read(item: int, errors: list[ReadError]) -> int:
        if item in broken:
            raise UnreadableImageError(str(item), "bad")
        return item

    return read


@pytest.mark.parametrize("image", ["", "7"])
def test_an_unreadable_image_comes_whole_from_another_process(image):
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "cut\n off", image)))
    assert str(error) == "a.jpg: not a readable image: cut off"
    assert error.read_error() == ReadError("a.jpg", "cut off", image)


def test_read_or_replace_takes_another_image_for_what_cannot_be_read():
    assert read_or_replace(3, range(9), (0, 5), read_but(())) == (3, ())
    first = int(np.random.default_rng((0, 5, 1, 0)).integers(9))
    second = int(np.random.default_rng((0, 5, 1, 1)).integers(9))
    assert read_or_replace(3, range(9), (0, 5), read_but([3])) == (first, (ReadError("3", "bad"),))
    errors = (ReadError("3", "bad"), ReadError(str(first), "bad"))
    assert read_or_replace(3, range(9), (0, 5), read_but([3, first])) == (second, errors)
    tried = []

    def read(item: int, errors: list[ReadError]) -> int:
        tried.append(item)
        return read_but(range(9))(item, errors)

    with pytest.raises(UnreadableImageError, match=r"3: .*bad; .*20 others"):
        read_or_replace(3, range(9), (0, 5), read)
    assert len(tried) == 21


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            "DataLoader worker (pid 12) is killed by signal: Killed. ",
            "a loader process (12) was killed (Killed), by",
        ),
        (
            "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
            "a loader process (12, 13) was killed, by",
        ),
    ],
)
def test_worker_death_names_a_loader_process_that_was_killed(text, start, capsys):
    assert worker_death(RuntimeError(text)).startswith(start)
    assert print_error(RuntimeError(text)) == 1
    assert capsys.readouterr().err.startswith(f"error: {start}")
    assert worker_death(RuntimeError("something else")) is None
    with (
        pytest.raises(TypeError) as caught,
        patch("inspect._signature_from_callable", side_effect=RuntimeError(text)),
    ):
        inspect.getfullargspec(print)  # as when the signal comes here
    assert worker_death(caught.value).startswith(start)


def test_worker_death_is_told_for_a_batch_whose_sender_was_killed():
    """As in the main process while it receives tensors: multiprocessing's connection breaks."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(EOFError) as caught:
        ours.recv()
    assert worker_death(caught.value).startswith(
        "a loader process was killed, by the system perhaps"
    )
    with pytest.raises(ConnectionResetError) as other:
        raise ConnectionResetError("of a server")
    assert worker_death(other.value) is None
