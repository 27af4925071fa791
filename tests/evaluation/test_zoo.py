"""The list of autoencoders, and what its table says of each."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from olvae.config import ConfigError
from olvae.evaluation import zoo
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.zoo import Listed, read_zoo
from olvae.models.spec import CLASS_NAME
from olvae.models.target_names import SHIPPED, SHIPPED_FOLDER
from tests.conftest import tiny
from tests.models.loading.classes import CLASSES

DOCS = Path(__file__).parents[2] / "docs"


def test_every_entry_of_the_zoo_is_on_its_page():
    """Our own models come first, with the figures of their cards.

    Every entry is in the list of docs/autoencoders.md, as the file has it.
    """
    entries, page = read_zoo(), (DOCS / "zoo.md").read_text(encoding="utf-8")
    _, heading, listed = (
        (DOCS / "autoencoders.md")
        .read_text(encoding="utf-8")
        .partition(f"### The {len(entries)} autoencoders by name")
    )
    listed = listed.partition("\n## ")[0]
    assert heading
    own = [entry.name for entry in entries if entry.target.startswith(SHIPPED)]
    assert sorted(own) == sorted(
        config.parent.name for config in SHIPPED_FOLDER.glob("*/config.json")
    )
    assert [entry.name for entry in entries[: len(own)]] == own
    for entry in entries:
        assert entry.kind in CLASSES or entry.kind == CLASS_NAME
        facts = (entry.kind, entry.factor, entry.channels, entry.licence)
        line = " | ".join([entry.name, f"`{entry.target}`", *map(str, facts)])
        assert listed.count(f"| {line} | ") == 1, line
    assert listed.count("\n| ") - 1 == len(entries)
    assert f"{len(entries)} autoencoders" in page
    # A list is no result.
    readme = DOCS.parent / "README.md"
    assert "zoo.md" not in readme.read_text(encoding="utf-8")
    for name in own:
        card = json.loads((SHIPPED_FOLDER / name / "metrics.json").read_text())
        assert f"| {name} | 39 | {card['results'][0]['metrics']['psnr']:.3f} " in page


def test_the_list_is_read_whole_or_by_names_in_its_order():
    entries = read_zoo()
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    assert [entry.name for entry in read_zoo(["sdxl", "sd1-mse"])] == ["sd1-mse", "sdxl"]
    (sdxl,) = read_zoo(["sdxl"])
    facts = ("diffusers:stabilityai/sdxl-vae", "AutoencoderKL", 8, 4, "mit")
    assert sdxl == ("sdxl", *facts)
    with pytest.raises(ConfigError, match=r"`zoo` sdxl2: .*photos-f8c12"):
        read_zoo(["sdxl", "sdxl2"])


def test_a_copy_in_the_folder_is_taken_before_the_entrys_own(tmp_path):
    (sdxl,) = read_zoo(["sdxl"])
    assert sdxl.here(None) == sdxl.here(tmp_path) == sdxl.target
    file = tmp_path / "sdxl.safetensors"
    file.touch()
    assert sdxl.here(tmp_path) == str(file)
    (tmp_path / "sdxl").mkdir()
    assert sdxl.here(tmp_path) == str(tmp_path / "sdxl")


def test_a_row_has_the_latent_as_measured_and_the_lists_words():
    (sdxl,) = read_zoo(["sdxl"])
    listed = Listed(sdxl)
    subjects = {"sdxl": Subject(tiny())}
    assert listed.derive(subjects) == subjects
    entry = listed.result("sdxl", 0)
    assert entry == {"class": "AutoencoderKL", "latent": "f8, 4", "licence": "mit"}
    assert listed.columns(entry) == entry
    grey = SimpleNamespace(in_channels=1)
    with pytest.raises(ValueError, match=r"1 channels, .*others 3"):
        listed.derive({"grey": Subject(grey)})  # type: ignore[arg-type]


def test_what_is_missing_has_one_line_for_each_reason():
    """The place of an autoencoder, with which a reason may begin, makes none of its own."""
    missing = {
        "sd1-mse": "stabilityai/sd-vae-ft-mse: no network",
        "sdxl": "stabilityai/sdxl-vae: no network",
        "flux1": "it is gated",
    }
    first, second = Listed(None, missing).lines([])
    assert first == (
        "not here: sd1-mse (diffusers:stabilityai/sd-vae-ft-mse, AutoencoderKL, f8, 4 channels, "
        "mit); sdxl (diffusers:stabilityai/sdxl-vae, AutoencoderKL, f8, 4 channels, mit): "
        "no network"
    )
    assert second.startswith("not here: flux1 (diffusers:black-forest-labs/FLUX.1-schnell, ")
    assert second.endswith("): it is gated")


def test_results_in_the_folder_are_read_by_name_in_the_lists_order(tmp_path):
    for name in ("sdxl", "sd1-mse", "unlisted"):
        (tmp_path / name).mkdir()
        result = {"target": name, "n": 2, "metrics": {"psnr": 20.0}, "skipped": {}}
        content = {
            "protocol": {"name": "a", "version": 1},
            "protocol_hash": "12",
            "results": [result],
        }
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    found = zoo._results(tmp_path)
    assert list(found) == ["sd1-mse", "sdxl"]
    assert found["sdxl"].rows[0].target == "sdxl"
    assert zoo._results(tmp_path / "sdxl") == {}
