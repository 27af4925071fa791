"""Model and data that do not fit each other, or the device, before a run begins."""

import pytest

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.models.footprint import MARGIN, footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.run import check_memory
from tests.conftest import parts, plain_networks
from tests.models.steps import against, build, source


def test_an_adversary_needs_a_loss_that_compares_images_beside_it(image_folder):
    playing = build(against())
    playing.objective.weights = {"kl": 1e-6}
    with pytest.raises(ConfigError, match="compare images"):
        playing.adversary.check(playing, source(image_folder), 4)


def test_memory_is_checked_before_the_first_step(image_folder, capfd, monkeypatch):
    images, plain = source(image_folder), build(**plain_networks())
    counted = footprint(plain, 16, "32")

    def known(model: LiteAutoencoderKL, size: Sides, precision: str, checkpoint: bool = False):
        assert isinstance(model, LiteAutoencoderKL)
        assert (size, precision) == (images.size, "32")
        return counted

    monkeypatch.setattr("olvae.training.run.footprint", known)
    enough = int(MARGIN * counted.total(4)) + 1
    assert check_memory(plain, images, "32", enough) == counted.flop > 0
    check_memory(plain, images, "32", enough - 2, warns=False)
    assert capfd.readouterr().err == ""
    check_memory(plain, images, "32", enough - 2)
    err = capfd.readouterr().err
    assert "memory: a step with 4 images" in err
    assert "set data.params.batch_size=2 lightning.trainer.accumulate_grad_batches=2" in err
    bounded = build(parts=parts(activation_bound={"bound": 1.0}), **plain_networks())
    check_memory(bounded, images, "32", 2**20)
    assert "checkpoint" not in capfd.readouterr().err  # which a bound excludes
    with pytest.raises(ConfigError, match=r"image fits: .*4 images"):
        check_memory(plain, images, "32", counted.total(1) - 1)
