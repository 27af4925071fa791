"""Targets, by the names that they have and had, and what is built of them."""

import pytest

from olvae.config import ConfigError, instantiate, resolve_target


@pytest.mark.parametrize(
    "target",
    [
        "olvae.data.folder.FolderSource",
        "olvae.data.huggingface.HuggingFaceSource",
        "olvae.data.latents.LatentSource",
        "olvae.data.samples.SamplePhotographs",
        "olvae.data.torchvision.TorchvisionSource",
        "olvae.data.webdataset.WebDatasetSource",
        "olvae.modules.basicgan.patchgan.PatchGAN",
        "olvae.modules.gigagan.gigagan.GigaGAN",
        "olvae.modules.unetgan.unetgan.UNetGAN",
        "olvae.training.health.Health",
    ],
)
def test_targets_in_configs_of_older_runs_are_found(target):
    assert resolve_target(target).__name__ == target.rpartition(".")[2]


def test_instantiate():
    assert instantiate({"target": "fractions.Fraction", "params": {"numerator": 1, "denominator": 2}}) == 0.5
    assert instantiate({"target": "fractions.Fraction"}, numerator=3) == 3
    for node, message in (
        ({"params": {}}, "target and params"),
        ({"target": "Fraction"}, "not a dotted path"),
        ({"target": "no.such.module"}, "does not import"),
        ({"target": "fractions.Fractoin"}, "did you mean Fraction"),
        ({"target": "olvae.models.optimization.lr_factor", "params": {"stap": 1}}, "lr_factor: "),
    ):
        with pytest.raises(ConfigError, match=message):
            instantiate(node)


def test_a_target_of_very_many_parts_is_no_dotted_path():
    """Importing the parts, one after the other, takes time by the square of their number."""
    with pytest.raises(ConfigError, match="is not a dotted path"):
        resolve_target("olvae" + ".olvae" * 3000)
