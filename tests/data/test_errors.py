import pytest
import torch.distributed as dist

from olvae.data.errors import ReadError, ReadErrors, TooManyUnreadableError, UnreadableImages


def account(epoch: int | None = None, images: int | None = None, limit: float = 0.01) -> ReadErrors:
    return ReadErrors(epoch, images, limit, "training", UnreadableImages())


def test_a_file_is_named_once_and_counted_once_but_every_skip_is_in_the_epochs_total(caplog):
    faults = account(epoch=10, images=1000)
    for _ in range(5):
        faults.take([ReadError("a.jpg", "cut off")], 4)
    assert faults.lost == 1
    assert caplog.messages == [
        "skipped a.jpg: cut off",
        "training: 3 images skipped in this epoch",
        "training: 2 images skipped in this epoch",
    ]


def test_several_images_of_one_shard_are_several_lost(caplog):
    faults = account(images=1000)
    faults.take([ReadError("a.tar", "cut off", str(i)) for i in range(7)], 4)
    assert faults.lost == 7
    assert len(caplog.messages) == 1


def test_a_warning_loses_nothing():
    faults = account(images=10)
    faults.take([ReadError("a.tar", "no end mark", lost=False)], 4)
    assert faults.lost == 0


@pytest.mark.parametrize(("images", "broken", "stops"), [(1000, 10, False), (1000, 11, True), (12, 1, True)])
def test_the_limit_is_a_share_of_all_images(images, broken, stops):
    faults = account(images=images)
    if stops:
        with pytest.raises(TooManyUnreadableError, match=rf"{broken} of {images} images .* 0\.01: f0 \(bad\)"):
            faults.take([ReadError(f"f{i}", "bad") for i in range(broken)], 1)
    else:
        faults.take([ReadError(f"f{i}", "bad") for i in range(broken)], 1)


def test_one_of_several_processes_does_not_stop_alone_but_with_the_others(monkeypatch):
    mine, other = account(images=1000), account(images=1000)
    for faults, numbers in ((mine, range(7)), (other, range(3, 10))):  # 10 different ones, 4 that both have met
        faults.take([ReadError(f"f{i}", "bad") for i in numbers], 1, world=2)
    mine.take([ReadError(f"f{i}", "bad") for i in range(7)], 1, world=2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), [own, other.losses])
    )
    mine.share()
    assert mine.lost == 10  # of 1000, as one process would count
    assert mine.losses.delivered == 4
    other.losses.delivered = 20
    mine.share()
    assert mine.losses.delivered == 20  # all divide by the same
    other.take([ReadError("f10", "bad")], 1, world=2)
    with pytest.raises(TooManyUnreadableError, match="11 of 1000"):
        mine.share()


def test_where_nobody_knows_how_many_there_are_one_may_always_fail():
    faults = account()
    faults.take([ReadError("f0", "bad")], 4)
    with pytest.raises(TooManyUnreadableError, match="2 of 100"):
        faults.take([ReadError("f1", "bad")], 4)


def test_zero_means_none_at_all():
    with pytest.raises(TooManyUnreadableError):
        account(limit=0.0).take([ReadError("f0", "bad")], 4)


def test_only_ten_are_named_in_the_end():
    with pytest.raises(TooManyUnreadableError, match=r"f9 \(bad\), and 5 more$"):
        account(images=20).take([ReadError(f"f{i}", "bad") for i in range(15)], 1)


def test_what_training_lost_is_no_share_of_what_validation_reads():
    losses = UnreadableImages()
    training = ReadErrors(None, None, 0.01, "training", losses)
    training.take([ReadError(f"f{i}", "bad") for i in range(1)], 1000)
    training.take([ReadError(f"g{i}", "bad") for i in range(4)], 1000)
    validation = ReadErrors(None, None, 0.01, "validation", losses)
    validation.take([], 8)
    with pytest.raises(TooManyUnreadableError, match=r"21 of 2037 images"):
        validation.take([ReadError(f"h{i}", "bad") for i in range(16)], 8)
