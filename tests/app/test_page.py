"""The page in a browser, served by the command, as a visitor uses it. Needs Chromium and open-litevae[app]."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tests.evaluation.chromium import chromium
from tests.models.test_autoencoder import tiny

pytestmark = pytest.mark.browser

READY = "document.querySelector('#file input[type=file]') !== null"
NUMBERS = "document.querySelector('#numbers').innerText"
TOAST = "(document.querySelector('[data-testid=toast-body]') ?? {innerText: ''}).innerText"


@contextmanager
def served(tmp_path, *arguments):
    """The address of ``olvae app``; at the end it gets Ctrl-C."""
    command = [sys.executable, "-m", "olvae", "app", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"serving at (http://127\.0\.0\.1:\d+/)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError("it ended without serving")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)


def picture(path, width, height):
    Image.fromarray(data.astronaut()).resize((width, height)).save(path)
    return path


def test_a_visit(tmp_path):
    for name in ("first", "second"):
        tiny().save_pretrained(tmp_path / name)
    photo = picture(tmp_path / "photo.png", 120, 90)
    with served(tmp_path, tmp_path / "first", tmp_path / "second") as address, chromium(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(address, width)
            tab.wait_for(READY)
            tab.upload("#file input[type=file]", photo)
            tab.wait_for("document.querySelectorAll('#slider img').length >= 2")
            numbers = tab.wait_for(f"{NUMBERS}.includes('f8, 4x12x15') && {NUMBERS}")
            found = re.findall(r"(first|second)\s+f8, 4x12x15\s+(\d+\.\d\d)\s+(0\.\d{4})\s+\d+\.\d\d", numbers)
            assert [name for name, *_ in found] == ["first", "second"]
            assert all(3 < float(psnr) < 30 for _, psnr, _ in found)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.screenshot(tmp_path / f"app_{width}.png")

        handle = "document.querySelector('#slider .outer') ?? document.querySelector('#slider .handle')"
        place = f"(({handle}).getBoundingClientRect().x)"
        before = tab.evaluate(place)
        box = tab.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({handle}).getBoundingClientRect())")
        tab.mouse("Pressed", *box)
        tab.mouse("Moved", box[0] - 60, box[1])
        tab.mouse("Released", box[0] - 60, box[1])
        tab.wait_for(f"{place} < {before} - 30")

        tab.evaluate("[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText == 'Pixels').click()")
        tab.wait_for("document.querySelectorAll('#detail img').length == 3")  # the original and two models
        before = tab.evaluate("document.querySelector('#detail img').src")
        tab.evaluate("document.querySelector('#whole img').scrollIntoView()")
        corner = tab.evaluate(
            "(r => [r.x + 5, r.y + 50])(document.querySelector('#whole img').getBoundingClientRect())"
        )
        for kind in ("Pressed", "Released"):
            tab.mouse(kind, *corner)
        tab.wait_for(f"document.querySelector('#detail img').src != {before!r}")
        shown = {address, *(url for url in tab.requests if not url.startswith(("data:", "blob:", address)))}
        assert shown == {address}  # nothing is asked of another machine


def test_bad_files_get_a_sentence(tmp_path):
    tiny().save_pretrained(tmp_path / "vae")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    large = tmp_path / "large.png"
    Image.fromarray(np.zeros((8192, 8192, 3), np.uint8)).save(large)
    with served(tmp_path, tmp_path / "vae") as address, chromium(tmp_path / "profile") as tab:
        for path, said in (
            (tmp_path / "broken.jpg", "broken.jpg: not a readable image"),
            (large, "8192x8192 pixels are too many for this page, which takes 4 million"),
        ):
            tab.open(address, 1280)
            tab.wait_for(READY)
            tab.upload("#file input[type=file]", path)
            tab.wait_for(f"{TOAST}.includes({said!r})")
        tab.open(address, 1280)
        tab.wait_for(READY)
        tab.upload("#file input[type=file]", picture(tmp_path / "dot.png", 1, 1))
        tab.wait_for(f"{NUMBERS}.includes('f8, 4x1x1')")
        assert "\N{EN DASH}" in tab.evaluate(NUMBERS)  # too small for SSIM
