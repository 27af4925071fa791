import json
import math
from types import SimpleNamespace

import pytest

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export_target
from olvae.export.factors import find_factors_file, read_factors, set_factors
from olvae.export.formats import LAYOUTS
from olvae.models.loading.targets import find_target
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from tests.export.tiny import tiny_litevae
from tests.models.loading.classes import make


def test_factors_are_read_from_latents_json(tmp_path):
    def result(name: str, scale: float) -> dict:
        return {
            "target": name,
            "n": 3,
            "diffusion": {"scaling_factor": scale, "shift_factor": 0.25},
        }

    path = tmp_path / "latents.json"
    path.write_text(json.dumps({"data": {}, "results": [result("a", 2.0), result("b", 3.0)]}))
    assert read_factors(path, "b")[:2] == (3.0, 0.25)
    with pytest.raises(ValueError, match=r"factors of c, .*a, b"):
        read_factors(path, "c")
    path.write_text(json.dumps({"results": [result("a", 2.0)]}))
    # The only one, of a version without checksums.
    assert read_factors(path, "c", "12ab")[:2] == (
        2.0,
        0.25,
    )
    path.write_text(
        json.dumps({"results": [{**result("a", 2.0), "weights": "12ab"}, result("b", 3.0)]})
    )
    assert read_factors(path, "a", "12ab")[:2] == (2.0, 0.25)
    with pytest.raises(ValueError, match=r"a made, .* a's"):
        read_factors(path, "a", "34cd")
    path.write_text(
        json.dumps({"target": "a", "weights": "12ab", "scaling_factor": 2.0, "shift_factor": 0.25})
    )
    assert read_factors(path, "c", "12ab")[:2] == (2.0, 0.25)  # a stats.json, of the same weights
    with pytest.raises(ValueError, match=r"a made, .* c's"):
        read_factors(path, "c", "34cd")
    for scale, message in ((math.nan, "nan"), (-2.0, r"-2\.0"), (0.0, r"0\.0")):
        path.write_text(json.dumps({"results": [result("a", scale)]}))
        expected = f"scaling_factor: expected a number above 0, got {message}"
        with pytest.raises(ValueError, match=rf"latents\.json: {expected}"):
            read_factors(path, "a")
    for text in ("", "[]", '{"results": [{"target": "a"}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not written"):
            read_factors(path, "a")


def test_measured_factors_may_replace_those_per_channel(tmp_path):
    make("AutoencoderKLQwenImage").save_pretrained(tmp_path / "qwen")
    target = find_target(f"diffusers:{tmp_path / 'qwen'}")
    (tmp_path / "latents.json").touch()
    for settings, remedy in (
        (ExportSettings(latents=tmp_path), "leave out `latents`, or add `per_channel`"),
        (ExportSettings(scaling_factor=2.0), "leave out `scaling_factor`"),
    ):
        with pytest.raises(ConfigError, match=rf"per channel: {remedy}$"):
            export_target(target, tmp_path / "out", settings)


def test_a_class_without_a_place_for_factors_per_channel(tmp_path):
    """It refuses them; the classes whose latents are scaled so take new ones."""
    numbers = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    pair = {"scaling_factor": 2.0, "shift_factor": 0.1}
    latents = tmp_path / "stats.json"
    latents.write_text(json.dumps({"target": "vae", "count": 200, **pair, **numbers}))
    settings = ExportSettings(latents=latents, per_channel=True)
    for name in ("AutoencoderKLFlux2", "AutoencoderKLQwenImage"):
        make(name).save_pretrained(tmp_path / name)
    flux = find_target(f"diffusers:{tmp_path / 'AutoencoderKLFlux2'}")
    with pytest.raises(ConfigError, match="`per_channel`: AutoencoderKLFlux2"):
        export_target(flux, tmp_path / "flux", settings)
    qwen = find_target(f"diffusers:{tmp_path / 'AutoencoderKLQwenImage'}")
    export_target(qwen, tmp_path / "qwen", settings)
    back = find_target(f"diffusers:{tmp_path / 'qwen'}").load().for_diffusion
    assert {name: back[name] for name in numbers} == numbers
    assert (back["scaling_factor"], back["shift_factor"]) == (1.0, 0.0)


def test_a_file_of_factors_is_found_by_itself_or_its_folder(tmp_path):
    for given in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(FileNotFoundError, match="`latents`"):
            find_factors_file(given)
    stats = tmp_path / "stats.json"
    stats.touch()
    assert find_factors_file(tmp_path) == find_factors_file(stats) == stats
    (tmp_path / "latents.json").touch()
    assert find_factors_file(tmp_path) == tmp_path / "latents.json"
    assert find_factors_file(stats) == stats


def from_run(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"given": "run", "name": "vae", "factors_outdated": False, **changes})


def set_on(model: LiteVAE, given: dict, target=None, **settings) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    target = target or from_run()
    layout = LAYOUTS["litevae"]()
    return set_factors(model, model, target, given, layout, notes, **settings), notes


PAIR = {"scaling_factor": 2.0, "shift_factor": 0.25}
NUMBERS = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}


@pytest.mark.parametrize(
    ("name", "numbers", "noted"),
    [
        ("stats.json", {"count": 100}, []),
        ("stats.json", {"count": 99}, ["on 99 images"]),
        ("stats.json", {"count": 1, **NUMBERS}, ["`per_channel`", "on 1 image:"]),
        ("latents.json", {"data": {"n": 7}, **NUMBERS}, ["on 7 images"]),
        ("latents.json", {"data": {"n": 100}, **NUMBERS}, []),
        ("latents.json", NUMBERS, []),
    ],
)
def test_measured_factors_are_set_with_what_a_user_has_to_know(tmp_path, name, numbers, noted):
    model = tiny_litevae()
    content = {"target": "vae", **PAIR, **numbers}
    if name == "latents.json":
        data = content.pop("data", None)
        content = {"data": data, "results": [{"target": "vae", "diffusion": content}]}
    (tmp_path / name).write_text(json.dumps(content))
    origin, notes = set_on(model, {"latents": tmp_path})
    assert origin == f"measured by olvae {'encode' if name == 'stats.json' else 'latents'}"
    assert (model.scaling_factor, model.shift_factor) == (2.0, 0.25)
    assert len(notes) == len(noted)
    assert all(part in note for part, note in zip(noted, notes, strict=True))


def test_measured_numbers_per_channel_replace_the_pair(tmp_path):
    model = tiny_litevae()
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"target": "vae", "count": 100, **PAIR, **NUMBERS}))
    assert set_on(model, {"latents": file}, by_channel=True) == ("measured by olvae encode", [])
    found = model.for_diffusion
    assert {name: found[name] for name in NUMBERS} == NUMBERS
    assert (found["scaling_factor"], found["shift_factor"]) == (1.0, 0.0)
    wrong = {**NUMBERS, "latents_std": [2.0, 0.0, 2.0, 2.0]}
    half = {"latents_mean": NUMBERS["latents_mean"]}
    for numbers, message in (
        ({}, "measure again"),
        (half, "measure again"),
        (wrong, "latents_std"),
    ):
        file.write_text(json.dumps({"target": "vae", "count": 100, **PAIR, **numbers}))
        with pytest.raises(ValueError, match=rf"stats\.json: .*{message}"):
            set_on(tiny_litevae(), {"latents": file}, by_channel=True)


def test_factors_that_are_not_measured_anew_are_the_models_own():
    model = tiny_litevae()
    assert set_on(model, {}) == ("from vae", [])
    assert set_on(model, {"scaling_factor": 3.0}) == ("given to olvae export", [])
    assert (model.scaling_factor, model.shift_factor) == (3.0, -0.1)

    # Of weights that have moved, which no longer have the factors of the start.
    moved = from_run(factors_outdated=True)
    origin, (note,) = set_on(model, {}, moved)
    assert origin is None
    assert "export with `latents`" in note
    per_channel = tiny_litevae().set_for_diffusion(NUMBERS)
    assert set_on(per_channel, {}) == ("from vae", [])
    origin, (note,) = set_on(per_channel, {}, moved)
    assert origin == "of the weights that it started from"
    assert "`per_channel`" in note

    # 1 and 0 are no measurement, unless one of them is another number.
    for scaling, shift, known in ((1.0, 0.0, False), (1.0, 0.1, True), (0.5, 0.0, True)):
        model.set_for_diffusion({"scaling_factor": scaling, "shift_factor": shift})
        origin, notes = set_on(model, {})
        assert (origin, len(notes)) == (("from vae", 0) if known else (None, 1))
    # A tiny autoencoder may have the units of TAESD's files, which nobody should measure.
    tiny = LiteVAE(TinyEncoder(8), TinyDecoder())
    origin, (note,) = set_on(tiny, {})
    assert origin is None
    assert "right for latents that started from TAESD's" in note
    # What is known of them is known of the model that was loaded.
    loaded = SimpleNamespace(factors_known=False)
    notes: list[str] = []
    origin = set_factors(model, loaded, from_run(), {}, LAYOUTS["litevae"](), notes)
    (note,) = notes
    assert origin.startswith("diffusers' default")
    assert "`scaling_factor` and `shift_factor`" in note
