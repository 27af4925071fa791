"""Parts of a run that do not fit together; tests/training/test_run.py has that nothing is left behind."""

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.folder import FolderSource
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.checks import check_adversary, check_images, check_torchrun, process_count
from tests.conftest import tiny_config

PATCHGAN = {"target": "olvae.modules.basicgan.patchgan.PatchGAN", "params": {"base_channels": 4, "n_layers": 1}}


def model(**params) -> LiteAutoencoderKL:
    return LiteAutoencoderKL(**tiny_config(**params)["model"]["params"])


def against(**params) -> LiteAutoencoderKL:
    node = {"discriminator_config": PATCHGAN, **params}
    return model(adversary_config={"target": "olvae.models.adversary.Adversary", "params": node})


def source(root, size: int = 16, **params) -> FolderSource:
    return FolderSource(str(root), size, 4, **params)


@pytest.mark.parametrize(
    ("trainer", "count"),
    [({"devices": 2}, 2), ({"devices": [0, 3]}, 2), ({"devices": 2, "num_nodes": 3}, 6)],
)
def test_processes_are_devices_times_nodes(trainer, count):
    assert process_count(trainer) == count


def test_torchrun_must_have_started_as_many(monkeypatch):
    check_torchrun(2)  # without torchrun Lightning starts them
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_torchrun(2)
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes, and .* name 1 device: --gpus 2, or"):
        check_torchrun(1)


def test_images_must_fit(image_folder):
    check_images(model(), source(image_folder))
    with pytest.raises(ConfigError, match=r"20 is not a multiple of 8, .* use 16 or 24"):
        check_images(model(), source(image_folder, 20))
    with pytest.raises(ConfigError, match="the images have 1 channels, the model takes 3"):
        check_images(model(), source(image_folder, channels=1))


def test_images_that_equivariance_would_shrink_below_what_lpips_takes(image_folder):
    equivariant = model(equivariance=0.5)
    check_images(equivariant, source(image_folder, 32))
    equivariant.loss.lpips = torch.nn.Identity()
    with pytest.raises(ConfigError, match="size: 32: equivariance shrinks images to a quarter, and LPIPS needs 16"):
        check_images(equivariant, source(image_folder, 32))
    check_images(equivariant, source(image_folder, 64))


def test_an_adversary_must_play(image_folder):
    check_adversary(model(), source(image_folder), 1)
    check_adversary(against(start_step=3), source(image_folder), 4)
    with pytest.raises(ConfigError, match="start_step: 4 is not before the last of 4 steps"):
        check_adversary(against(start_step=4), source(image_folder), 4)


def test_an_adversary_needs_a_term_that_compares_images(image_folder):
    playing = against()
    playing.objective.weights = {"kl": 1e-6}
    with pytest.raises(ConfigError, match="one of the terms that compare images must be on"):
        check_adversary(playing, source(image_folder), 4)
