"""Runs whose decoder's class extends the decoder of the autoencoder that they start from."""

from pathlib import Path

import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.models.loading.targets import find_target
from olvae.modules.litevae.one_step import OneStepDecoder
from olvae.training.start_from import start_from
from tests.conftest import tiny, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.parts.flow.generating import nodes, one_step_config
from tests.models.steps import WITHOUT_KL


def plain(folder: Path, **decoder) -> tuple[str, LiteVAE]:
    """A saved LiteVAE with random weights, other widths than the config's, and a linear path."""
    torch.manual_seed(3)
    node = tiny_config()["model"]["params"]["decoder_config"]
    node["params"] |= {"channels": 4, "linear": True, **decoder}
    model = tiny(decoder_config=node)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "plain")
    return str(folder / "plain"), model


def config(images: Path | None = None, target: str | None = None, **decoder) -> dict:
    """A config whose decoder extends the plain one's."""
    content = tiny_config(
        images,
        decoder_config=one_step_config(noise_std=0.2, **decoder),
        lossconfig=WITHOUT_KL,
        parts=nodes(flow={}),
    )
    if target is not None:
        content["model"]["from"] = target
    return content


def test_a_decoder_that_extends_another_starts_as_that(tmp_path):
    """With its params and weights; what it adds is the config's."""
    target, model = plain(tmp_path)
    content = config(target=target, variant="group_norm", dropout=0.5)
    weights, _ = start_from(content)
    node = content["model"]["params"]["decoder_config"]
    assert node["target"].endswith("OneStepDecoder")
    assert node["params"]["channels"] == 4
    assert (node["params"]["variant"], node["params"]["dropout"]) == ("open_litevae", 0.0)
    assert node["params"]["noise_std"] == 0.2
    assert weights.keys() == model.state_dict().keys()
    assert content["model"]["params"]["freeze_encoder"]


@pytest.mark.parametrize("extended", [False, True])
def test_overrides_are_added_to_the_decoder_that_is_trained(extended, tmp_path):
    """To an extended one with the recipe's params, else to the one found without these."""
    target, _ = plain(tmp_path)
    content = config(target=target) if extended else tiny_config()
    content["model"]["from"] = target
    given = {"dropout": 0.25, "noise_std": 0.3} if extended else {"dropout": 0.25}
    content["model"]["params"]["decoder_config"]["params"] |= {"channels": 8, **given}
    place = "model.params.decoder_config.params"
    start_from(content, [f"{place}.{name}={value}" for name, value in given.items()])
    node = content["model"]["params"]["decoder_config"]
    assert node["target"].endswith("OneStepDecoder") == extended
    assert node["params"] == {**node["params"], "channels": 4, **given}


def test_a_run_of_an_extended_decoder_trains_exports_and_starts_another(
    train_with, tmp_path, image_folder
):
    target, model = plain(tmp_path)
    run = train_with(
        "lightning.trainer.max_steps=2", config=config(image_folder), start_from=target
    )
    trained = find_target(run.path).load()
    decoder = trained.decoder
    assert isinstance(decoder, OneStepDecoder)
    assert torch.equal(decoder.noise, OneStepDecoder(**decoder.node["params"]).noise)
    assert any(injection.conv.weight.any() for injection in decoder.injections)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(trained.encode(x).mean, model.encode(x).mean)
        near = trained.decode(model.encode(x).mean) - model.decode(model.encode(x).mean)
    assert 0 < near.abs().max() < 0.1

    # From this run its decoder, whole, whatever the config's is called.
    content = config(target=str(run.path))
    weights, _ = start_from(content)
    assert weights.keys() == trained.state_dict().keys()
    assert torch.equal(
        weights["decoder.injections.0.conv.weight"], decoder.injections[0].conv.weight
    )


def test_a_decoder_of_another_class_is_not_extended(tmp_path):
    """It takes the config's place, and the part says what it lacks."""
    tiny_kl().save_pretrained(tmp_path / "kl")
    content = config(target=f"diffusers:{tmp_path / 'kl'}")
    with pytest.warns(UserWarning, match="decoder_config: .*SDDecoder"):
        start_from(content)
    assert content["model"]["params"]["decoder_config"]["target"].endswith("SDDecoder")


def test_what_an_extending_class_leaves_out_is_refused_by_name(tmp_path):
    target, _ = plain(tmp_path, enlarge=2)
    with pytest.raises(ConfigError, match="enlarge"):
        start_from(config(target=target))
