"""Text by a stand-in for OCR that reads what is known,
and by rapidocr itself where its wheel is installed.
"""

import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageFilter, ImageFont

from olvae.evaluation.cells import texts
from olvae.evaluation.observers import text
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.text import DRAWN, SIZES, WORDS, Text, draw_pages
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
                assert " " not in line

    # The first two lines of a page: as many characters of some words as fit beside the margins.
    (_, lines), *_ = draw_pages(exact)
    font = ImageFont.truetype(str(file), 8)
    rng = random.Random(0)
    for _, _, line in lines[:2]:
        words = " ".join(rng.choices(WORDS.split(), k=exact // 8 + 1))
        fitting = [n for n in range(len(words)) if font.getlength(words[:n]) <= exact - 8]
        assert line == words[: max(fitting)].replace(" ", "")
    # A page holds fonts of a quarter of the width between its margins.
    assert [len(list(draw_pages(size))) > 0 for size in (39, 40)] == [False, True]


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


def test_pages_are_read_as_drawn_and_as_reconstructed(reader, monkeypatch):
    """Two pages of two lines, read as five times d, of which one was drawn with an x."""
    pages = [torch.full((3, 16, 16), level, dtype=torch.uint8) for level in (30, 31)]
    lines = [("8", BOXES[0], "ddddx"), ("12", BOXES[1], "ddddd")]
    monkeypatch.setattr(text, "draw_pages", lambda size: [(page, lines) for page in pages])

    class Black(Blurred):
        def decode(self, z):
            return torch.full_like(z, -1.0)

    subjects = {"same": Subject(Blurred(0.0)), "black": Subject(Black(0.0))}
    observer = Text()
    page = SimpleNamespace(render=lambda name, **context: context)
    assert observer.section(page) is None
    observer.examine(subjects, 16, "cpu")
    unread = {"8": {"error": 0.2, "characters": 10}, "12": {"error": 0.0, "characters": 10}}
    for target, error in (("same", 0.0), ("black", 1.0)):
        rate = {"error": error, "characters": 10}
        found = observer.result(target, 0)
        assert found == {"images": None, "drawn": {"8": rate, "12": rate}, "unread": unread}
        assert observer.columns(found) == {"drawn text": f"{100 * error:.1f} %"}
    section = observer.section(page)
    table = {"same": {"8 px": "0.0 %", "12 px": "0.0 %"}}
    table["black"] = {"8 px": "100.0 %", "12 px": "100.0 %"}
    assert section["rates"] == texts(table)
    assert section["own"] == "8 px 20.0 %, 12 px 0.0 %"
    shown = {name: int(picture[0, 0, 0]) for name, picture in section["pictures"].items()}
    assert shown == {DRAWN: 30, "same": 30, "black": 0}

    # Where one target takes other channels, nothing is drawn.
    grey = Black(0.0)
    grey.in_channels = 1
    nothing = Text()
    nothing.examine({**subjects, "grey": Subject(grey)}, 16, "cpu")
    assert nothing.result("same", 0)["drawn"] == {}


def test_ocr_gets_blue_first_and_gives_boxes_and_sure_lines(monkeypatch):
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    found = SimpleNamespace(boxes=None, txts=None, scores=None)
    calls = []

    def engine(pixels, **steps):
        calls.append((pixels, steps))
        return found

    monkeypatch.setattr(text, "_engine", lambda: engine)
    assert text._find(image) == []
    found.boxes = [
        [[1.2, 2.6], [5.5, 2.5], [5.4, 4.1], [1.1, 4.2]],
        [[-0.5, 0], [2, 0], [2, 1]] * 1,
    ]
    found.boxes[1].append([-0.5, 1])
    assert text._find(image) == [(1, 2, 6, 5), (0, 0, 2, 1)]
    pixels, steps = calls[0]
    assert np.array_equal(pixels, image.numpy()[::-1].transpose(1, 2, 0))
    assert steps == {"use_det": True, "use_cls": False, "use_rec": False}

    calls.clear()
    assert text._read(image, (1, 2, 6, 5)) == ""
    pixels, steps = calls[0]
    assert np.array_equal(pixels, image.numpy()[::-1, 2:5, 1:6].transpose(1, 2, 0))
    assert steps == {"use_det": False, "use_cls": False, "use_rec": True}
    found.txts, found.scores = ("a b", "c", "d"), (0.5, 0.4, 0.75)
    assert text._read(image, (1, 2, 6, 5), sure=0.5) == "abd"
    found.scores = (0.5,)
    with pytest.raises(ValueError, match="shorter"):
        text._read(image, (1, 2, 6, 5))


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
