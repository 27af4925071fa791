"""The training in one file: its steps are the trainer's, and its command trains."""

import copy

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from olvae import LiteVAE
from olvae.data.dataset import PHOTOGRAPHS
from olvae.data.places import load
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.optimizers import mix_seeds
from tests.examples.loading import ROOT, load_example
from tests.models.steps import trainer

PLAIN = ("model.params.optimizer=adam", "model.params.channels_last=false")
"""Settings of the demo that the file leaves out."""


@pytest.fixture(scope="module")
def nano():
    return load_example("nano_litevae")


def trained(recipe: str, steps: int, photographs: list[torch.Tensor]) -> LiteAutoencoderKL:
    """Train a recipe of the demo on given batches, from the seed's weights."""
    config = load([recipe], list(PLAIN))["model"]
    torch.manual_seed(0)
    model = LiteAutoencoderKL(
        **config["params"], learning_rate=config["base_learning_rate"], gradient_clip_val=1.0
    )
    model.decay_steps = steps
    batches = [{"image": batch, "key": ["a"] * len(batch)} for batch in photographs]
    trainer(steps, limit_val_batches=0).fit(model, DataLoader(batches, batch_size=None))
    return model


@pytest.mark.parametrize(
    ("recipe", "rate", "size", "count", "steps"),
    [("demo", 1e-3, 64, 2, 5), ("demo_b", 2e-4, 128, 1, 3)],
)
def test_its_steps_are_the_trainers(nano, recipe, rate, size, count, steps):
    images = [nano.read_image(path) for path in PHOTOGRAPHS[:4]]
    crops = nano.batches(images, size, count, seed=0)
    photographs = [next(crops) for _ in range(steps)]
    model = trained(recipe, steps, photographs)

    torch.manual_seed(0)
    vae = nano.make_autoencoder()
    discriminator = None
    if recipe == "demo_b":
        discriminator = nano.UNetGAN(base_channels=8, image_size=128)
    before = copy.deepcopy(vae)
    training = nano.Training(vae, rate, steps, discriminator)
    for number, batch in enumerate(photographs):
        torch.manual_seed(mix_seeds(0, number, 0, 0))
        training.step(batch)

    # After the training the trainer's model has the average.
    for name, average in training.average.state_dict().items():
        torch.testing.assert_close(model.autoencoder.state_dict()[name], average, rtol=0, atol=0)
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before.parameters(), training.average.parameters(), strict=True)
    ]
    assert sum(changed) > 0.9 * len(changed)
    if discriminator is not None:
        for name, weight in discriminator.state_dict().items():
            torch.testing.assert_close(
                model.adversary.discriminator.state_dict()[name], weight, rtol=0, atol=0
            )


def test_the_command_trains_both_phases_and_saves_what_loads(nano, tmp_path, capsys):
    paths = [str(path) for path in PHOTOGRAPHS[:11]]
    nano.main([*paths, "--out", str(tmp_path), "--steps=2", "--steps-b=1"])
    assert "phase b: " in capsys.readouterr().out
    assert Image.open(tmp_path / "phase_a.png").size == (8 * 64, 2 * 64)
    vae = LiteVAE.from_pretrained(tmp_path)
    assert vae.encode(torch.zeros(1, 3, 64, 64)).mode().shape == (1, 12, 8, 8)


def test_it_fits_on_two_hundred_lines():
    assert len((ROOT / "examples" / "nano_litevae.py").read_text().splitlines()) <= 200
