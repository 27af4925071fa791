"""Debian's Chromium, driven by playwright: a fixture, and a page that notes its requests and its
console.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser with an empty profile; tests that use it are marked `browser`."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail(
            f"tests marked browser need Chromium on PATH as {', '.join(NAMES)}: "
            "apt install chromium"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page as wide as a screen; `requests` are the addresses it asked for,
    `problems` what its console shows.
    """

    def __init__(self, browser: Any, width: int, dark: bool = False) -> None:
        self.page = browser.new_page(
            viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light"
        )
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
