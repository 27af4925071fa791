"""Text by a stand-in for OCR that reads what is known,
and by rapidocr itself where its wheel is installed.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageFilter, ImageFont

from olvae.evaluation.observers import text
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.text import SIZES, Text, draw_pages
from olvae.evaluation.page import Page
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic
from tests.evaluation.peers import seen
from tests.evaluation.test_results import results_of, row


def test_edit_distance_is_the_recursive_definition():
    """Against the recursive definition, on random words;
    and of a long line of which half is missing.
    """

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert text.edit_distance(a, b) == slow(a, b)
    line = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 100))
    assert text.edit_distance(line, line[50:]) == 50


class Blurred(Autoencoder):
    """Blurs by a radius in pixels; encodes to the image itself."""

    in_channels, latent_channels, downscale = 3, 3, 1

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def encode(self, x):
        return Deterministic(x)

    def decode(self, z):
        pictures = [
            Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            for image in z
        ]
        blurred = [
            np.asarray(picture.filter(ImageFilter.GaussianBlur(self.radius)))
            for picture in pictures
        ]
        return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2) / 127.5 - 1.0


def test_text_pages_hold_every_font_size_that_fits():
    for side, sizes in ((256, SIZES), (64, (8, 10, 12)), (8, ())):
        pages = list(draw_pages(side))
        assert {int(kind) for _, lines in pages for kind, _, _ in lines} == set(sizes)
        for image, lines in pages:
            assert image.shape == (3, side, side)
            assert all(0 <= top < bottom <= side for _, (_, top, _, bottom), _ in lines)
            paper = image[:, -1, -1][:, None, None]
            assert all((image[:, top:bottom] != paper).any() for _, (_, top, _, bottom), _ in lines)
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(draw_pages(128), draw_pages(128), strict=True)
    )


def test_a_page_is_full_when_the_next_line_would_not_fit(monkeypatch):
    """Lines of 8 pixels' font, with a margin of 4 pixels around each."""
    monkeypatch.setattr(text, "SIZES", (8,))
    monkeypatch.setattr(text, "STYLES", text.STYLES[:1])
    monkeypatch.setattr(text, "COPIES", 7)
    file = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    high = sum(ImageFont.truetype(str(file), 8).getmetrics())
    exact = 4 + 3 * (high + 4)
    for size, numbers in ((exact, [3, 3, 1]), (exact - 1, [2, 2, 2, 1]), (exact + 1, [3, 3, 1])):
        pages = list(draw_pages(size))
        assert [len(lines) for _, lines in pages] == numbers
        for _, lines in pages:
            for number, (kind, box, line) in enumerate(lines):
                top = 4 + number * (high + 4)
                assert (kind, box) == ("8", (0, top - 2, size, top + high + 2))
                assert line
                assert " " not in line


BOXES = [(0, 0, 16, 8), (0, 8, 16, 16)]


@pytest.fixture
def reader(monkeypatch):
    """Reads the brightness of a line as a letter, five times;
    finds two lines in images that are not black.
    """
    monkeypatch.setattr(text, "_find", lambda image: BOXES if image.any() else [])
    monkeypatch.setattr(
        text,
        "_read",
        lambda image, box, sure=0.0: 5 * chr(97 + int(image[0, box[1], box[0]]) // 10),
    )


def test_text_error_rate_by_hand(reader):
    """Of two images of two lines one reconstruction has one line wrong: 5 of 20 characters."""
    x = torch.full((3, 3, 16, 16), 30, dtype=torch.uint8)
    x[2] = 0  # no text
    y = x.clone()
    y[1, :, 8:] = 50
    keys = ["a", "b", "c"]
    whole, first, second = Text(), Text(), Text()
    whole.update(seen("mine", keys, x, y))
    whole.update(seen("mine", keys, x, x, draw=1))
    found = whole.result("mine", 0)
    assert found == {"images": {"error": 0.25, "characters": 20}, "drawn": {}, "unread": {}}
    assert whole.columns(found) == {"text errors": "25.0 %"}
    first.update(seen("mine", keys[:2], x[:2], y[:2]))
    second.update(seen("mine", keys[1:], x[1:], y[1:]))  # one in both
    second.merge(pickle.loads(pickle.dumps(first.state())))
    assert second.result("mine", 0) == found
    second.update(seen("mine", ["a"], x[:1, :1], y[:1, :1]))  # of one channel, which is not read
    assert second.result("mine", 0) == found


def test_text_without_rapidocr_names_the_extra(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    assert "pip install rapidocr onnxruntime" in next(Text().conflicts([], [], []))


def test_small_fonts_are_lost_to_blur_first(monkeypatch):
    """rapidocr itself, offline, with what its wheel holds; nothing changed is read alike."""
    pytest.importorskip("rapidocr")
    for name, value in (("SIZES", (8, 24)), ("STYLES", text.STYLES[:1]), ("COPIES", 1)):
        monkeypatch.setattr(text, name, value)
    observer = Text()
    observer.examine({"same": Subject(Blurred(0.0)), "soft": Subject(Blurred(2.0))}, 128, "cpu")
    same, soft = (observer.result(target, 0) for target in ("same", "soft"))
    assert {rate["error"] for rate in same["drawn"].values()} == {0.0}
    assert soft["drawn"]["8"]["error"] > 0.5 > 0.1 > soft["drawn"]["24"]["error"]
    assert same["unread"]["24"]["error"] == 0.0
    page = next(draw_pages(128))[0][None]
    observer.update(seen("same", ["a"], page, page))
    found = observer.result("same", 0)["images"]
    assert found["error"] == 0.0
    assert found["characters"] > 15
    html = observer.section(Page(results_of(row("same"), row("soft"))))
    assert html.count("<img") == 3
    assert observer.columns(same).keys() == {"drawn text"}
