"""The curves of docs/symptoms.md: what the page says of them, and their picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from study.curves import CURVES, main

RESULTS = Path(__file__).parent.parent.parent / "study" / "results" / "curves"


def values(name: str, tag: str) -> list[float]:
    return json.loads((RESULTS / f"{name}.json").read_text())[tag][1]


def test_what_the_page_says_of_them():
    start, *psnr = values("healthy", "val/psnr")
    assert psnr == sorted(psnr)
    assert start + 0.5 < psnr[-1] < start + 1  # rises by tenths
    assert sorted(values("rate", "train/grad_norm"))[50] > 1  # clipped in half of the steps
    assert max(values("rate", "val/psnr")[1:]) < start
    assert values("kl", "train/kl")[-1] < 0.05 * values("kl", "train/kl")[0]
    assert values("kl", "val/psnr") == sorted(values("kl", "val/psnr"), reverse=True)


def test_the_picture_is_drawn_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("study.curves.train", lambda *_: pytest.fail("trains again"))
    main(["--out", str(tmp_path), "--results", str(RESULTS), "--picture", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").width == 720
    assert {file.stem for file in RESULTS.iterdir()} == set(CURVES)
