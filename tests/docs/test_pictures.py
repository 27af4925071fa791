"""The pictures of the docs are of this code.

OLVAE_STORE_PICTURES=1 stores the browser's anew: OLVAE_STORE_PICTURES=1 make test-browser
"""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from scripts.draw_model import PICTURE, draw
from tests.browser import Visit
from tests.conftest import skip_power_iterations
from tests.docs.markdown import ROOT
from tests.test_app_in_a_browser import NUMBERS, served

MODELS = ("olvae:photos-f8c12", "olvae:photos-f8c12-sharp")


def test_the_drawn_model_is_the_one_of_the_recipe(monkeypatch):
    skip_power_iterations(monkeypatch)
    assert PICTURE.read_text(encoding="utf-8") == draw()


def compare(screen: bytes, name: str) -> None:
    """The stored picture shows what the browser shows now, seen small, as fonts differ."""
    path = ROOT / "docs" / "images" / name
    now = Image.open(io.BytesIO(screen)).convert("RGB")
    if os.environ.get("OLVAE_STORE_PICTURES"):
        now.resize((800, 800 * now.height // now.width)).save(path, quality=70, optimize=True)
    assert path.stat().st_size < 80_000
    with Image.open(path) as stored:
        small = [np.asarray(picture.convert("L").resize((40, 40))) for picture in (stored, now)]
    correlation = np.corrcoef(*(picture.ravel() for picture in small))[0, 1]
    assert correlation > 0.8, f"{path}: store it anew"


@pytest.mark.browser
def test_the_picture_of_the_app(tmp_path, browser):
    with served(tmp_path, "olvae:photos-f8c12", "olvae:photos-f8c4") as address:
        visit = Visit(browser, 1280)
        visit.page.goto(address)
        visit.page.locator("#examples img").nth(1).click()
        visit.page.locator(NUMBERS, has_text="f8, 12x").wait_for()
        visit.page.locator("#slider img").nth(1).wait_for()
        visit.page.wait_for_timeout(2000)  # until pictures have faded in
        compare(visit.page.screenshot(full_page=True), "app.jpg")


@pytest.mark.browser
def test_the_picture_of_a_report(tmp_path, browser):
    command = ["--baselines", "--size", "256", "--metrics", "psnr,ssim", "--data", "samples"]
    out = tmp_path / "report"
    subprocess.run(
        [sys.executable, "-m", "olvae", "evaluate", *MODELS, *command, "--out", out],
        check=True,
        capture_output=True,
    )
    visit = Visit(browser, 900)
    visit.page.goto((out / "report.html").as_uri())
    compare(visit.page.screenshot(), "report.jpg")
