import json
import math

import pytest
import torch
from PIL import Image

from olvae.cli.main import main as olvae
from tests.examples.loading import load_example
from tests.export.latents import tiny_vae
from tests.metrics.test_features import extract


@pytest.fixture
def example(monkeypatch):
    module = load_example("diffusability")
    monkeypatch.setattr(module, "Lite0", lambda: extract)
    monkeypatch.setattr(module, "Inception", lambda path: extract)
    return module


@pytest.fixture
def arguments(tmp_path, image_folder):
    """A tiny autoencoder, latents of 12 images, and what to do with them."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    given = [str(tmp_path / "vae"), "--data", str(image_folder), "--size", "32", "--flip"]
    with pytest.raises(SystemExit) as leaving:
        olvae(["encode", *given, "--out", str(tmp_path / "latents")])
    assert leaving.value.code == 0
    sizes = [
        "--steps=2",
        "--samples=4",
        "--batch-size=4",
        "--width=32",
        "--depth=1",
        "--patch=2",
        "--seeds=0,7",
    ]
    return [
        str(tmp_path / "latents"),
        "--decoder",
        given[0],
        "--reference",
        str(image_folder),
        *sizes,
    ]


def without_seconds(out):
    document = json.loads((out / "diffusability.json").read_text())
    assert all(set(seed.pop("seconds")) == {"training", "sampling"} for seed in document["seeds"])
    return document


def test_equal_seeds_give_equal_results_and_a_finished_seed_is_kept(
    example, arguments, tmp_path, monkeypatch
):
    a, b = tmp_path / "a", tmp_path / "b"
    example.main([*arguments, "--out", str(a)])
    torch.rand(3)  # what happened before does not matter
    example.main([*arguments, "--out", str(b), "--seeds=7"])
    first, alone = without_seconds(a), without_seconds(b)
    assert alone["seeds"][0] == first["seeds"][1] != first["seeds"][0]
    distances = [seed["frechet_lite0"] for seed in first["seeds"]]
    assert first["frechet_lite0"]["mean"] == pytest.approx(sum(distances) / 2)
    assert first["frechet_lite0"]["std"] == pytest.approx(
        abs(distances[0] - distances[1]) / math.sqrt(2)
    )
    assert first["frechet_lite0"]["reconstructions"] > 0
    assert "fid" not in first
    with Image.open(a / "samples.png") as samples:
        assert samples.height > 5 * 128  # the reference, two limits, two seeds

    monkeypatch.setattr(example, "train", None)  # from here on it would fail
    with_inception = example.main([*arguments, "--out", str(a), "--inception", __file__])
    assert with_inception["frechet_lite0"] == first["frechet_lite0"]
    assert with_inception["fid"] == first["frechet_lite0"]  # of equal features
    assert first["frechet_lite0"]["mean_to_decoded"] != first["frechet_lite0"]["mean"]
    with pytest.raises(ValueError, match="steps 2, not 3"):
        example.main([*arguments, "--out", str(a), "--steps=3"])
    (a / "seed-0.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"seed-0\.safetensors .*finished"):
        example.main([*arguments, "--out", str(a)])


@pytest.mark.parametrize("wrong", ["--samples=1", "--steps=0", "--seeds=a", "--inception=none.pth"])
def test_diffusability_refuses_wrong_numbers_before_anything_is_read(example, wrong, capsys):
    with pytest.raises(SystemExit):
        example.main(["latents", "--decoder=x", "--reference=y", "--out=z", wrong])
    assert wrong.partition("=")[0] in capsys.readouterr().err
