"""A decoder is trained on a frozen vision encoder's latents, by --from timm:NAME."""

import pytest
import torch

from olvae.models.loading.targets import find_target
from tests.conftest import parts
from tests.training.origins import assert_same_checkpoint, checkpoint, without_networks

pytest.importorskip("timm")


def config(images, **model) -> dict:
    found = without_networks(images, use_ema=True, **model)
    found["model"]["params"]["decoder_config"] = {"params": {"width": 32, "depth": 1, "heads": 1}}
    found["data"]["params"]["size"] = 32
    return found


def assert_network_is_kept(run, vit: str) -> None:
    after = checkpoint(run)["state_dict"]
    for name, tensor in torch.load(vit).items():
        assert torch.equal(after[f"encoder.network.1.{name}"], tensor), name


def test_the_decoder_learns_and_the_vision_encoder_stays(train_with, image_folder, vit):
    """RAE: noise on the latent; an evaluation loads the run without the encoder's file."""
    noise = parts(random_noise={"how": "add", "strength": 0.8})
    settings = {"config": config(image_folder, parts=noise), "start_from": f"timm:test_vit={vit}"}
    with pytest.warns(UserWarning, match="starts fresh"):
        run = train_with("lightning.trainer.max_steps=2", **settings)
    assert_network_is_kept(run, vit)
    model = find_target(run.path).load()
    assert (model.latent_channels, len(model.decoder.blocks)) == (64, 1)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32))[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*starts fresh")
def test_reduced_latents_are_learned_and_resumed_bit_for_bit(train_with, image_folder, vit):
    """FAE: attention and projection learn, DINOv2's place does not."""
    given = config(image_folder, freeze_encoder=False)
    settings = {"config": given, "start_from": f"timm:test_vit={vit}::8"}
    whole, half = (
        train_with(f"lightning.trainer.max_steps={steps}", **settings) for steps in (3, 1)
    )
    resumed = train_with("lightning.trainer.max_steps=3", resume=half.path)
    assert_same_checkpoint(whole, resumed)
    assert_network_is_kept(whole, vit)
    start = find_target(f"timm:test_vit={vit}::8").load().state_dict()
    after = checkpoint(whole)["state_dict"]
    for name in ("encoder.attention.qkv.weight", "encoder.conv_out.weight"):
        assert not torch.equal(after[name], start[name]), name
