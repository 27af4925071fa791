"""Decoders at 2x that start from an autoencoder or learn from a teacher, as the command trains."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS
from olvae.data.places import load
from olvae.models.autoencoder import LiteVAE
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.targets import find_target
from olvae.models.parts.part import Step
from olvae.modules.base import Decoder
from olvae.training.start_from import enlarged_as
from tests.conftest import parts, plain_networks, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.classes import make
from tests.models.steps import WITHOUT_KL, build, fit
from tests.training.origins import save_teacher

TWICE = "model.params.decoder_config.params.enlarge=2"
SIZE = "data.params.size=32"
MAKE = {
    "AutoencoderKL": tiny_kl,
    "AutoencoderTiny": lambda: make("AutoencoderTiny"),
    "AutoencoderKLWan": lambda: make("AutoencoderKLWan"),
}


def nearest(image: Tensor) -> Tensor:
    return image.repeat_interleave(2, 2).repeat_interleave(2, 3)


def enlarging(**model) -> dict:
    """Arguments of the tiny config: a decoder at 2x behind a plain encoder."""
    encoder = plain_networks()["encoder_config"]
    decoder = copy.deepcopy(tiny_config()["model"]["params"]["decoder_config"])
    decoder["params"]["enlarge"] = 2
    networks = {"encoder_config": encoder, "decoder_config": decoder}
    return {**networks, "lossconfig": WITHOUT_KL, **model}


@pytest.fixture
def starts(monkeypatch) -> list[LiteVAE]:
    """The autoencoder of every training before its first step."""
    seen, hook = [], LiteAutoencoderKL.on_train_start

    def look(self):
        seen.append(copy.deepcopy(self.autoencoder).eval())
        hook(self)

    monkeypatch.setattr(LiteAutoencoderKL, "on_train_start", look)
    return seen


@pytest.mark.parametrize("name", MAKE)
def test_a_decoder_at_2x_starts_as_the_1x_decoder_and_learns(name, train_with, tmp_path, starts):
    theirs = MAKE[name]()
    theirs.save_pretrained(tmp_path / "source")
    target = f"diffusers:{tmp_path / 'source'}"
    run = train_with(TWICE, SIZE, "lightning.trainer.max_steps=2", start_from=target)

    # Before the first step: nearest neighbours of the source's picture, and its encoder.
    (start,) = starts
    before = DiffusersAutoencoder(theirs)
    z = torch.randn(1, before.latent_channels, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(start.decode(z), nearest(before.decode(z)), rtol=1e-5, atol=1e-6)
    assert (start.downscale, start.enlarge) == (before.downscale, 2)
    assert start.for_diffusion == before.for_diffusion

    # After it: the four copies differ, and the encoder does not.
    after = LiteVAE.from_pretrained(run.path)
    assert load([run.config])["model"]["params"]["decoder_config"]["params"]["enlarge"] == 2
    with torch.no_grad():
        image = after.decode(z)
    assert image.shape[-1] == 8 * before.downscale
    assert not torch.equal(image, nearest(image[..., ::2, ::2]))
    frozen = before.as_litevae("it").encoder.state_dict()
    assert all(torch.equal(t, frozen[n]) for n, t in after.encoder.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
def test_who_sets_upscale_reads_of_enlarge(name, train_with, tmp_path):
    """A wrapped decoder has an ``upscale``, which is its whole factor; others have none."""
    MAKE[name]().save_pretrained(tmp_path / "source")
    twice = "model.params.decoder_config.params.upscale=2"
    with pytest.raises(ValueError, match=r"did you mean enlarge\?|`enlarge` is what makes"):
        train_with(twice, SIZE, start_from=f"diffusers:{tmp_path / 'source'}")


def test_a_run_at_2x_continues_at_2x(train_with, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "source")
    once = "lightning.trainer.max_steps=1"
    run = train_with(TWICE, SIZE, once, start_from=f"diffusers:{tmp_path / 'source'}")
    again = train_with(SIZE, once, start_from=str(run.path))
    assert find_target(again.path).load().enlarge == 2
    with pytest.raises(ConfigError, match=r"2 times .*to 2"):
        train_with(
            "model.params.decoder_config.params.enlarge=3", SIZE, once, start_from=str(run.path)
        )


def test_a_decoder_that_does_not_know_enlarge_is_refused():
    class Own(Decoder):
        def __init__(self) -> None:
            super().__init__(4, 3, 8)

    model = DiffusersAutoencoder(make("AutoencoderTiny")).as_litevae("it")
    model.decoder = Own()
    node = {"target": model.decoder.node["target"], "params": {"enlarge": 2}}
    with pytest.raises(ConfigError, match="enlarge: Own, "):
        enlarged_as(model, node, "it")


def test_a_step_encodes_the_shrunk_image_and_compares_the_whole_one():
    model = build(**enlarging(parts=parts(equivariance={"probability": 0.0, "shrunk": 0.0})))
    seen: dict[str, Tensor] = {}
    model.encoder.register_forward_pre_hook(lambda _, x: seen.update(encoded=x[0]))
    model.loss.register_forward_pre_hook(lambda _, x: seen.update(target=x[0], reconstruction=x[1]))
    model.log = model.report = lambda *_, **__: None
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    x = model.images({"image": images})
    step = Step(x, None, np.random.default_rng(0), warming_up=False, adversary_plays=False)
    model.forward_pass(step)
    model.autoencoder_loss(step)
    expected = (images.double() / 127.5 - 1).unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    torch.testing.assert_close(seen["encoded"].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(seen["target"], x)
    assert seen["reconstruction"].shape == x.shape
    assert model(x)[0].shape == x.shape


def test_parts_of_a_training_at_2x(image_folder):
    """Each runs on images and latents of their two sizes."""
    nodes = parts(
        equivariance={"probability": 0.5},
        scale_equivariance={"factors": [2]},
        anchor={"weight": 0.1},
    )
    for name in ("equivariance", "scale_equivariance"):
        chosen = {key: node for key, node in nodes.items() if key in (name, "anchor")}
        model = build(**enlarging(learning_rate=1e-3, parts=chosen))
        fit(model, image_folder, steps=3, size=32)
        assert model.global_step == 3


def test_a_student_at_2x_of_a_teacher_at_1x(train_with, tmp_path, image_folder):
    teacher = {"autoencoder": save_teacher(tmp_path / "teacher"), "decoder_weight": 0.1}
    config = tiny_config(image_folder, **enlarging(parts=parts(teacher=teacher)))
    config["data"]["params"] |= {"size": 32, "val_fraction": 0.4}
    run = train_with("lightning.trainer.max_steps=2", config=config)
    assert find_target(run.path).load().enlarge == 2
    config["model"]["params"] |= {"freeze_decoder": True}
    with pytest.raises(ConfigError, match=r"enlarge: .*frozen"):
        train_with(config=config)


def test_a_teacher_is_measured_on_images_of_the_encoded_size(tmp_path):
    teacher = {"autoencoder": save_teacher(tmp_path / "teacher")}
    model = build(**enlarging(parts=parts(teacher=teacher)))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    source = SimpleNamespace(
        first_images=lambda seed, count: iter(images), pixel_range=EIGHT_BITS, means_std=None
    )
    (part,) = model.each_part
    part.prepare(model, source, 0, torch.device("cpu"))
    halved = (images.double() / 127.5 - 1).unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    with torch.no_grad():
        means = part.model.encode(halved.float()).mean.double()
    expected = means.transpose(0, 1).flatten(1).std(1, unbiased=False)
    torch.testing.assert_close(part.std.double(), expected, rtol=1e-5, atol=0)


def test_a_size_that_is_no_multiple_of_both_factors_is_refused(train_with, image_folder):
    config = tiny_config(image_folder, **enlarging())
    config["data"]["params"]["size"] = 24
    with pytest.raises(ConfigError, match=r"24 .*16, .*2 "):
        train_with(config=config)


def test_enlarge_counts_beside_networks_that_are_replaced(train_with, image_folder, tmp_path):
    """As in a recipe that trains from scratch, with --from."""
    tiny_kl().save_pretrained(tmp_path / "source")
    config = tiny_config(image_folder, **enlarging())
    config["data"]["params"]["size"] = 32
    once = "lightning.trainer.max_steps=1"
    run = train_with(once, config=config, start_from=f"diffusers:{tmp_path / 'source'}")
    found = find_target(run.path).load()
    assert (found.enlarge, found.downscale, type(found.decoder).__name__) == (2, 4, "SDDecoder")
