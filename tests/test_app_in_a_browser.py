"""The page in a browser, served by the command, as a visitor uses it. Needs Chromium and open-litevae[app]."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from PIL import Image
from skimage import data

from tests.browser import Visit
from tests.models.test_autoencoder import tiny

pytestmark = pytest.mark.browser

UPLOAD, NUMBERS, TOAST = "#file input[type=file]", "#numbers", "[data-testid=toast-body]"


@contextmanager
def served(tmp_path, *arguments):
    """The address of ``olvae app``; at the end it gets Ctrl-C."""
    command = [sys.executable, "-m", "olvae", "app", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = (re.search(r"serving at (http://127\.0\.0\.1:\d+/)", line) for line in process.stderr)
            yield next(filter(None, found))[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)


def picture(path, width, height):
    Image.fromarray(data.astronaut()).resize((width, height)).save(path)
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_a_visit(tmp_path, browser, width):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for name in ("first", "second"):
        tiny().save_pretrained(tmp_path / name)
    photo = picture(tmp_path / "photo.png", 120, 90)
    with served(tmp_path, tmp_path / "first", tmp_path / "second") as address:
        visit = Visit(browser, width)
        page = visit.page
        page.goto(address)
        page.set_input_files(UPLOAD, tmp_path / "broken.jpg")
        page.locator(TOAST, has_text="broken.jpg: not a readable image").wait_for()
        page.goto(address)
        page.set_input_files(UPLOAD, picture(tmp_path / "dot.png", 1, 1))
        page.locator(NUMBERS, has_text="f8, 4x1x1").wait_for()
        assert "\N{EN DASH}" in page.inner_text(NUMBERS)  # too small for SSIM
        page.goto(address)
        page.set_input_files(UPLOAD, photo)
        page.locator("#slider img").nth(1).wait_for()
        page.locator(NUMBERS, has_text="f8, 4x12x15").wait_for()
        numbers = page.inner_text(NUMBERS)
        found = re.findall(r"(first|second)\s+f8, 4x12x15\s+(\d+\.\d\d)\s+(0\.\d{4})\s+\d+\.\d\d", numbers)
        assert [name for name, *_ in found] == ["first", "second"]
        assert all(3 < float(psnr) < 30 for _, psnr, _ in found)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / "app.png", full_page=True)

        handle = page.locator("#slider .outer, #slider .handle").first
        before = handle.bounding_box()
        page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
        page.mouse.down()
        page.mouse.move(before["x"] + before["width"] / 2 - 60, before["y"] + before["height"] / 2)
        page.mouse.up()
        assert handle.bounding_box()["x"] < before["x"] - 30

        page.get_by_role("tab", name="Pixels").click()
        detail = page.locator("#detail img")
        detail.nth(2).wait_for()
        assert detail.count() == 3  # the original and two models
        before = detail.first.get_attribute("src")
        page.locator("#whole img").click(position={"x": 5, "y": 50})
        page.wait_for_function("src => document.querySelector('#detail img').src != src", arg=before)
        elsewhere = [url for url in visit.requests if not url.startswith(("data:", "blob:", address))]
        assert not elsewhere  # nothing is asked of another machine
