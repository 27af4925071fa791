import json

import pytest

from olvae.export.factors import read_factors


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
    with pytest.raises(ValueError, match=r"has no factors of c, but of a, b"):
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
    with pytest.raises(ValueError, match=r"a made, with other weights than a's"):
        read_factors(path, "a", "34cd")
    path.write_text(
        json.dumps({"target": "a", "weights": "12ab", "scaling_factor": 2.0, "shift_factor": 0.25})
    )
    assert read_factors(path, "c", "12ab")[:2] == (2.0, 0.25)  # a stats.json, of the same weights
    with pytest.raises(ValueError, match=r"a made, with other weights than c's"):
        read_factors(path, "c", "34cd")
    for text in ("", "[]", '{"results": [{"target": "a"}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"not written by olvae latents or olvae encode"):
            read_factors(path, "a")
