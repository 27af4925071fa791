import json
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.round_trip import RoundTrip
from olvae.metrics.metric import psnr
from olvae.models import on_the_hub
from olvae.models import target_names as names
from olvae.models.loading.targets import find_target
from tests.export.tiny import tiny_litevae


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of shipped models; whoever asks the hub fails."""
    monkeypatch.setattr(names, "SHIPPED_FOLDER", tmp_path / "pretrained")

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(on_the_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "pretrained"


def test_a_shipped_model_is_a_target_like_its_export(folder):
    model = tiny_litevae()
    model.save_pretrained(folder / "small-f8")
    target = find_target("olvae:small-f8")
    assert target.name == target.given == "olvae:small-f8"
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model.encode(x).mode()
    for loaded in (target.load(), LiteVAE.from_pretrained("olvae:small-f8")):
        assert torch.equal(loaded.encode(x).mode(), expected)


def test_unknown_shipped_names_list_those_that_there_are(folder):
    with pytest.raises(FileNotFoundError, match=r"^olvae:x: .*none$"):
        find_target("olvae:x")
    for name in ("b", "a"):
        tiny_litevae().save_pretrained(folder / name)
    for wrong in ("olvae:c", "olvae:", "olvae:../pretrained/a", "olvae:a/config.json"):
        with pytest.raises(FileNotFoundError, match=r"olvae:a, olvae:b$"):
            find_target(wrong)
        with pytest.raises(FileNotFoundError, match=r"olvae:a, olvae:b$"):
            LiteVAE.from_pretrained(wrong)


ABOVE_BICUBIC = {
    "photos-f8c12": 5.5,
    "photos-f8c4": 2.5,
    "photos-f8c12-sharp": 4.5,
    "photos-f8c16": 6.5,
    "photos-f8c32": 9,
}
"""By how many dB at least."""


@pytest.mark.parametrize(("name", "above"), ABOVE_BICUBIC.items())
def test_shipped_models_beat_bicubic_on_photographs_never_seen(name, above):
    batch = next(iter(SamplePhotographs(size=256, batch_size=4).test_loader(2)))
    keys, photographs = batch["key"], batch["image"]
    with torch.inference_mode():
        y = to_uint8(find_target(f"olvae:{name}").load()(from_uint8(photographs))[0])
    bicubic = RoundTrip(Bicubic(8))(keys, photographs).images
    assert (psnr(photographs, y) - psnr(photographs, bicubic)).mean() > above


def card_number(words, card):
    return float(re.search(rf"{words} (\d+(\.\d+)?)", card)[1])


@pytest.mark.parametrize("name", ABOVE_BICUBIC)
def test_card_of_a_shipped_model_has_its_numbers(name):
    folder = names.SHIPPED_FOLDER / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    results = json.loads((folder / "metrics.json").read_text())["results"]
    card = (folder / "README.md").read_text()
    ours, linear, bicubic = (result["metrics"] for result in results)
    for found in (ours, linear, bicubic):
        assert f"| {found['psnr']:.3f} | {found['ssim']:.3f} |" in card
    card = " ".join(card.split())
    assert f"{ours['psnr'] - bicubic['psnr']:.1f} dB above shrinking" in card
    above = ours["psnr"] - linear["psnr"]
    assert f"{abs(above):.2f} dB {'above' if above >= 0 else 'below'} the linear code" in card
    low, high = results[0]["intervals"]["psnr"]
    assert f"PSNR is {low:.1f} to {high:.1f} dB" in card
    colours = results[0]["test_patterns"]["colours"]
    assert max(abs(v) for found in colours.values() for v in found["shift"]) <= card_number(
        "are shifted by up to", card
    )
    greys = max(
        found["grid"]
        for name, found in colours.items()
        if name.split()[0] in ("black", "grey", "white")
    )
    assert greys <= card_number("deviation of at most", card)
    assert max(found["grid"] for found in colours.values()) <= card_number(
        "few photographs have, of up to", card
    )
    terms = (names.SHIPPED_FOLDER / "LICENCES.txt").read_text()
    licences = re.findall(r"\n  Licence: (.+)", terms)
    gpl = sum("GPL" in licence for licence in licences)
    alike = sum("BY-SA" in licence for licence in licences)
    unnamed = sum(place.endswith("Files: *") for place in re.findall(r"Stated in: (.+)", terms))
    first = card.partition("f8 with")[2].partition(". ")[0]
    assert (
        f"{gpl} of the {len(licences)} are under the GPL or LGPL, {alike} under CC BY-SA" in first
    )
    assert f"for {unnamed} " in first
    vae = AutoencoderLiteVAE.from_pretrained(f"olvae:{name}")
    assert type(vae).__name__ == "AutoencoderLiteVAE"

    # Stored in half precision, and loaded in float32.
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    assert file.stat().st_size < 5e6
    assert "| weights | float16, " in card
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for loaded in (vae, LiteVAE.from_pretrained(f"olvae:{name}")):
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
