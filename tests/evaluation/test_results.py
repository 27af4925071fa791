import json

import pytest

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import Evaluation, Result, read_earlier, write_metrics

IMAGES = {"source": "photos", "n": 9, "sha256": "00", "unreadable": 0, "unreadable_files": {}, "enlarged": 0}

NAMES = ("psnr", "ssim", "ms_ssim", "l1", "lpips", "lpips_alex", "rfid", "kid")

VALUES = dict(zip(NAMES, (25.704, 0.721, 0.961, 0.0312, 0.138, 0.079, 1234.5, 0.00042), strict=True))


def evaluation(target: str = "2026-01-31T12-00-00_A2_bf16", sha256: str = "aa", published: bool = True) -> Evaluation:
    weights = {"file": "vgg.pth", "sha256": sha256, "published": published}
    result = Result(target, 9, dict(VALUES), {}, {"lpips": {"weights": weights}})
    return Evaluation(Protocol(n=9), IMAGES, [result], intervals={target: {"psnr": (25.0, 26.5)}})


def earlier(tmp_path, **changes):
    write_metrics(evaluation(**changes), tmp_path / "metrics.json")
    return read_earlier(tmp_path / "metrics.json")


def test_equal_names_are_counted(tmp_path):
    rows = earlier(tmp_path).beside(evaluation(), mix=False)
    together = evaluation().with_rows([*rows, *rows])
    name = "2026-01-31T12-00-00_A2_bf16"
    assert [row["target"] for row in together.as_dict()["results"]] == [name, f"{name} (2)", f"{name} (3)"]


def test_numbers_of_other_networks_do_not_stand_beside_unless_asked(tmp_path):
    other = earlier(tmp_path, sha256="bb")
    with pytest.raises(ValueError, match="has results of other weights of the networks behind LPIPS, which do not"):
        other.beside(evaluation(), mix=False)
    (row,) = other.beside(evaluation(), mix=True)
    assert row["target"].endswith("[other weights of the networks behind LPIPS]")


def test_weights_that_nobody_else_has_are_said():
    assert evaluation().warnings() == []
    (warning,) = evaluation(published=False).warnings()
    assert "LPIPS rests on a vgg.pth that is not the published file" in warning


@pytest.mark.parametrize("value", ["many", None, float("nan"), float("inf")])
def test_an_earlier_file_with_values_that_are_no_numbers(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_metrics(evaluation(), path)
    content = json.loads(path.read_text())
    content["results"][0]["metrics"]["psnr"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a metrics\.json"):
        read_earlier(path)
