import json
import math

import pytest

from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export_target
from olvae.export.factors import read_factors
from olvae.models.loading.targets import find_target
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
