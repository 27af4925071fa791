"""Phase A, then phase B with every discriminator and every loss, on the sample photographs, in small."""

from pathlib import Path

import pytest
import torch

from olvae.losses.adversarial import ADVERSARIAL_LOSSES
from olvae.runs import Run
from olvae.training import run as training
from olvae.training.run import TrainOptions, train
from tests.training.events import scalars

pytestmark = pytest.mark.slow

DISCRIMINATORS = {
    "PatchGAN": ("olvae.modules.patchgan.PatchGAN", {"base_channels": 32}),
    "GigaGAN": ("olvae.modules.gigagan.GigaGAN", {"image_size": 64, "base": 1024, "max_channels": 64}),
    "UNetGAN-S": ("olvae.modules.unetgan.UNetGAN", {"base_channels": 4, "image_size": 64}),
    "UNetGAN-M": ("olvae.modules.unetgan.UNetGAN", {"base_channels": 8, "image_size": 64}),
    "UNetGAN-L": ("olvae.modules.unetgan.UNetGAN", {"base_channels": 16, "image_size": 64}),
}
"""Each in small: a quarter of its width, and GigaGAN with fewer channels."""


@pytest.fixture(scope="module")
def phase_a(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("a")
    return train(TrainOptions(["configs/demo.yaml"], ["lightning.trainer.max_steps=250"], folder, gpus="0"))


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
@pytest.mark.parametrize("discriminator", DISCRIMINATORS)
def test_phase_b_stays_healthy(tmp_path: Path, monkeypatch, phase_a, discriminator, loss):
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    target, params = DISCRIMINATORS[discriminator]
    node = "model.params.adversary_config.params.discriminator_config"
    overrides = [
        f"model.params.adversary_config.params.loss={loss}",
        f"{node}.target={target}",
        *(f"{node}.params.{name}={value}" for name, value in params.items()),
        "lightning.trainer.max_steps=40",
        "lightning.trainer.val_check_interval=40",
        "lightning.trainer.log_every_n_steps=1",
        "data.params.size=64",
        "data.params.batch_size=4",
    ]
    run = train(
        TrainOptions(["configs/demo_b.yaml"], overrides, tmp_path, gpus="0", actual_resume=phase_a.last_checkpoint)
    )
    values = {tag: list(by_step.values()) for tag, by_step in scalars(run.path).items()}
    for tag, series in values.items():
        assert torch.isfinite(torch.tensor(series)).all(), tag
    accuracy = sum(values["health/accuracy"][-20:]) / 20
    assert 0.02 < accuracy < 0.99
    assert values["val/psnr"][-1] > [*scalars(phase_a.path)["val/psnr"].values()][-1] - 3.0
