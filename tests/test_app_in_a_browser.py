"""The page in a browser, served by the command, as a visitor uses it.

Needs Chromium and Gradio.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from PIL import Image
from skimage import data

from tests.browser import Visit
from tests.conftest import tiny

pytestmark = pytest.mark.browser

UPLOAD, NUMBERS, TOAST = "#file input[type=file]", "#numbers", "[data-testid=toast-body]"


@contextmanager
def served(tmp_path, *arguments):
    """The address of ``olvae app``; at the end it gets Ctrl-C,
    and has printed no traceback of this package.
    """
    command = [sys.executable, "-m", "olvae", "app", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    printed = tmp_path / "printed.txt"
    with (
        printed.open("w") as log,
        subprocess.Popen(command, stderr=log, env=environment, cwd=tmp_path) as process,
    ):
        try:
            while (
                found := re.search(r"serving at (http://127\.0\.0\.1:\d+/)", printed.read_text())
            ) is None:
                assert process.poll() is None, printed.read_text()
                time.sleep(0.1)
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            # Gradio's threads may outlive Python's end.
            assert process.wait(60) in (
                0,
                130,
                -signal.SIGABRT,
            )
    assert "olvae/app.py" not in printed.read_text()


def picture(path, width, height):
    Image.fromarray(data.astronaut()).resize((width, height)).save(path)
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser_compares_models_on_an_uploaded_image(tmp_path, browser, width):
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
        page.locator("#examples img").first.click()  # an example's thumbnail
        page.locator(NUMBERS, has_text="f8, 4x38x38").wait_for()
        right = "[...document.querySelectorAll('#numbers th')][1].getBoundingClientRect().right"
        assert page.evaluate(right) <= width, "PSNR is seen without scrolling"
        page.goto(address)
        page.set_input_files(UPLOAD, photo)
        page.locator("#slider img").nth(1).wait_for()
        page.locator(NUMBERS, has_text="f8, 4x12x15").wait_for()
        numbers = page.inner_text(NUMBERS)
        found = re.findall(
            r"(first|second)\s+(\d+\.\d\d)\s+(0\.\d{4})\s+\d+\.\d\d\s+f8, 4x12x15", numbers
        )
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
        page.wait_for_function(
            "src => document.querySelector('#detail img').src != src", arg=before
        )
        elsewhere = [
            url for url in visit.requests if not url.startswith(("data:", "blob:", address))
        ]
        assert not elsewhere  # nothing is asked of another machine


def test_page_refuses_huge_uploads_and_paths_that_climb(tmp_path):
    """Thirty requests at once are answered; a huge upload and paths that climb are refused;
    then all still works.
    """
    from gradio_client import Client, handle_file

    tiny().save_pretrained(tmp_path / "small")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    photo = handle_file(picture(tmp_path / "photo.png", 120, 90))
    with served(tmp_path, tmp_path / "small") as address:
        # Gradio writes equal pictures to one file, again for each request: a download may meet an
        # empty one.
        client = Client(address, verbose=False, download_files=False)
        jobs = [client.submit(photo, "small", 64, api_name="/look") for _ in range(30)]
        assert len({job.result(120)[0]["data"][0][1] for job in jobs}) == 1  # one PSNR
        with pytest.raises(Exception, match=r"broken\.jpg: "):
            client.predict(handle_file(tmp_path / "broken.jpg"), "small", 64, api_name="/look")

        def post(place: str, body: bytes, kind: str) -> bytes:
            request = urllib.request.Request(
                f"{address}gradio_api/{place}", body, {"Content-Type": kind}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()

        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="huge.png"\r\n\r\n'
        with pytest.raises(urllib.error.URLError):
            post(
                "upload",
                part + bytes(60 << 20) + b"\r\n--x--\r\n",
                "multipart/form-data; boundary=x",
            )
        for path in ("/etc/passwd", f"{tmp_path}/gradio/../broken.jpg", "../../../../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=60)
            given = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "small", 64]
            event = json.loads(
                post("call/look", json.dumps({"data": given}).encode(), "application/json")
            )["event_id"]
            with urllib.request.urlopen(
                f"{address}gradio_api/call/look/{event}", timeout=60
            ) as answer:
                assert answer.read().startswith(b"event: error")
        assert client.predict(photo, "small", 64, api_name="/look")[0]["data"][0][0] == "small"
        kept = sum(
            path.stat().st_size for path in (tmp_path / "gradio").rglob("*") if path.is_file()
        )
        assert kept < 50 << 20
