import base64
import io
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.cells import meaning
from olvae.evaluation.observers.gallery import Gallery
from olvae.evaluation.observers.observer import Evaluated, Subject
from olvae.evaluation.observers.pixels.bands import Bands
from olvae.evaluation.observers.pixels.flat_colours import FlatColours
from olvae.evaluation.page import Page, breakable, picture, side_limit
from olvae.evaluation.report import render_page, write_files
from olvae.evaluation.results import Results, Row
from olvae.evaluation.round_trip import Cost, RoundTrip
from olvae.evaluation.statistics import Difference
from olvae.metrics.metric import psnr
from tests.browser import Visit
from tests.evaluation.observers.pixels.test_flat_colours import Faulty
from tests.evaluation.peers import seen

HOSTILE = "<script>alert(1)</script>\"'><img src=https://example.org/x.png onerror=alert(1)>"

NAME = "olitevaeB_im_f8c12_imagenet_phaseB_unetgan_large_ema, raw weights"
LONG = "2026-11-25T03-04-24_olitevaeB_im_f8c12_imagenet_phaseB_unetgan_large_ema_bf16, raw weights"

VOID = {"meta", "img", "br", "col", "link", "input", "hr"}


class Reader(HTMLParser):
    """The elements, with their attributes and texts; fails if one is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(str(html).replace("<wbr>", ""))  # older Markup.replace escapes
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all_text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def photographs(size: int) -> tuple[list[str], torch.Tensor]:
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)
    tiles = (
        image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1)[:12]
    )
    return [f"astronaut/tile {i}.png" for i in range(len(tiles))], tiles.contiguous()


WEIGHTS = {"file": "vgg16-397923af.pth", "sha256": "397923af" * 8, "published": True}


def page(targets: list[str], size: int = 64) -> Evaluated:
    """Real photographs, reduced and enlarged again by as many factors as there are targets."""
    keys, x = photographs(size)
    rows = []
    gallery = Gallery()
    bands = Bands()
    colours = FlatColours()
    faulty = {name: Subject(Faulty(grid=4.0 + i)) for i, name in enumerate(targets[:2])}
    colours.examine(faulty, size, "cpu")
    for i, target in enumerate(targets):
        y = RoundTrip(Bicubic(2 ** (i % 4 + 1)))(keys, x).images
        values = dict(zip(keys, psnr(x, y).tolist(), strict=True))
        for observer in (gallery, bands):
            observer.update(seen(target, keys, x, y, values={"psnr": values}))
        mean = sum(values.values()) / len(values)
        observed = {"bands": bands.result(target, 0)}
        rows.append(
            Row(
                target,
                len(keys),
                {"psnr": mean, "lpips_alex": 0.2 - 0.05 * i, "kid": 0.00000123 * (i + 1)},
                {"lpips": "LPIPS needs vgg16-397923af.pth: name its folder with --weights-dir"},
                {"psnr": (mean - 1.0, mean + 1.25)},
                {"lpips_alex": {"weights": WEIGHTS}, "kid": {"warning": "12 images are few."}},
                Cost(3_012_345, 12_000_000_000, 345_678_901, 129.34, 8.8123, 3 << 30, 4, "a GPU")
                if i == 0
                else None,
                observed,
                differences={
                    "psnr": Difference(-2.5, -3.0, -2.0),
                    "lpips_alex": Difference(-0.05, -0.06, -0.04),
                    "kid": Difference(0.1, -0.1, 0.3),
                },
            )
        )
    protocol = {"name": "open-litevae", "version": 1, "size": size}
    images = {
        "source": "tiles",
        "n": len(keys),
        "sha256": "ab" * 32,
        "unreadable": 0,
        "enlarged": 0,
    }
    return Evaluated(Results(protocol, "0123456789abcdef", images, rows), [gallery, bands, colours])


COMMAND = "olvae evaluate --metrics psnr,lpips,kid runs/a runs/b"


def changed(evaluated: Evaluated, rows: list[Row] | None = None, **changes) -> Evaluated:
    """Other results, with the same pictures."""
    return replace(
        evaluated,
        results=replace(evaluated.results, rows=rows or evaluated.results.rows, **changes),
    )


@pytest.fixture(scope="module")
def whole() -> Evaluated:
    return page(["one", LONG, "three"])


def test_page_is_one_balanced_file_without_requests_or_scripts(whole):
    html = render_page(whole, COMMAND)
    reader = Reader(html)
    tags = {tag for tag, _ in reader.elements}
    assert {"table", "dl", "figure", "section", "style"} <= tags
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith("data:image/webp;base64," if tag == "img" else "#"), value[
                    :80
                ]
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a for tag, a in reader.elements if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")
    links = {a["href"][1:] for tag, a in reader.elements if tag == "a"}
    assert links == {a["id"] for tag, a in reader.elements if "id" in a}
    assert all(
        a["alt"] and a["width"] and a["height"] for tag, a in reader.elements if tag == "img"
    )
    assert len(html) < 2_000_000


def test_page_escapes_names_that_users_write():
    x = torch.zeros(3, 8, 8, dtype=torch.uint8)
    gallery = Gallery()
    colours = FlatColours()
    gallery.update(seen(HOSTILE, [HOSTILE], x[None], x[None], values={"psnr": {HOSTILE: math.inf}}))
    colours.examine({HOSTILE: Subject(Faulty())}, 16, "cpu")
    first = Row(
        HOSTILE,
        1,
        {},
        {"psnr": HOSTILE},
        details={
            "lpips": {
                "warning": HOSTILE,
                "weights": dict.fromkeys(("file", "sha256"), HOSTILE) | {"published": 0},
            }
        },
        cost=Cost(1, 2, 3, None, None, None, 1, HOSTILE),
        observed={"bands": {HOSTILE: {"mse": 1.0, "share_of_signal": None, "energy_ratio": None}}},
    )
    results = Results(
        {HOSTILE: HOSTILE, "name": HOSTILE, "size": 8},
        HOSTILE,
        {"source": HOSTILE, "n": 1, "sha256": HOSTILE, "unreadable": 0, "enlarged": 0},
        [first, replace(first, target=HOSTILE + "2")],
        [replace(first, target=HOSTILE + "3")],
    )
    reader = Reader(render_page(Evaluated(results, [gallery, Bands(), colours]), HOSTILE))
    assert "script" not in {tag for tag, _ in reader.elements}
    assert all(a["src"].startswith("data:") for tag, a in reader.elements if tag == "img")
    assert not any(
        name.startswith("on") for _, attributes in reader.elements for name in attributes
    )
    assert sum(HOSTILE in text for _, text in reader.texts) >= 20
    assert any(a.get("alt") == f"input of {HOSTILE}" for _, a in reader.elements)


def test_page_has_the_numbers_and_marks_the_best(whole):
    html = render_page(whole, COMMAND, datetime(2026, 11, 25, 3, 20, tzinfo=UTC))
    text = Reader(html).all_text()
    values = [row.metrics["psnr"] for row in whole.results.rows]
    assert values[0] > values[1] > values[2]
    assert f'<span class="best">{values[0]:.3f}</span>' in html  # the highest
    assert f'<span class="best">{values[1]:.3f}</span>' not in html
    assert f"[{values[1] - 1:.3f}, {values[1] + 1.25:.3f}]" in text
    assert '<span class="best">1.2e-06</span>' in html  # the lowest; five decimals would be 0
    # One line for all three.
    assert text.count("skipped LPIPS: LPIPS needs vgg16-397923af.pth") == 1
    assert '<span class="worse">\N{MINUS SIGN}2.500</span>' in html
    assert "[\N{MINUS SIGN}3.000, \N{MINUS SIGN}2.000]" in text
    assert '<span class="better">\N{MINUS SIGN}0.050</span>' in html  # lower is better
    assert "<span>+0.10000</span>" in html  # an interval with 0 shows no difference
    assert "12 images." in text
    for number in ("3.01", "12.0", "0.346", "129", "8.81", "3,072", "a GPU"):
        assert number in text
    assert "25 November 2026, 03:20 UTC" in text
    for words in (
        "0123456789abcdef",
        "397923af" * 8,
        "the same",
        "12 images are few.",
        COMMAND,
        NAME,
        "batches of 4",
    ):
        assert words in text
    assert "12 images of tiles, sha256 abababababababab…" in text
    assert text.startswith(f"one, {NAME}, three: open-litevae, 64 px")
    off = 255 * 10 ** (-values[0] / 20)
    best = f"(PSNR {values[0]:.2f} dB); the best of the others is 2.50 dB worse: {NAME}."
    assert f"by about {off:.1f} of 255 {best}" in text
    equal = [
        replace(row, differences={"psnr": Difference(0.0, -0.1, 0.1)}) for row in whole.results.rows
    ]
    assert meaning(changed(whole, equal).results).endswith(
        f"; the best of the others is as good: {LONG}."
    )


@pytest.mark.parametrize(
    ("targets", "shown"),
    [
        (["2026-11-30T10-55-15_demo_32", "olvae:photos-f8c4"], ["demo", "olvae:photos-f8c4"]),
        (["2026-11-30T10-55-15-2_a_b_32, raw weights", "2026-11-30T10-55-15-2_a_b_32, bf16"],
         ["a_b, raw weights", "a_b, bf16"]),
        (["2026-11-30T10-55-15_demo_32", "2026-12-01T00-00-00_demo_32", "c"],
         ["demo (2026-11-30T10-55-15)", "demo (2026-12-01T00-00-00)", "c"]),
        (["2026-11-30T10-55-15_demo_32", "2026-11-30T10-55-15_demo_bf16", "demo"],
         ["2026-11-30T10-55-15_demo_32", "2026-11-30T10-55-15_demo_bf16", "demo"]),
        (["runs/2026-11-30T10-55-15_demo_32", "2026-11-30T10-55-15_demo_32/a.ckpt"],
         ["runs/2026-11-30T10-55-15_demo_32", "2026-11-30T10-55-15_demo_32/a.ckpt"]),
    ],
)  # fmt: skip
def test_a_run_has_its_name_and_the_time_where_two_have_one(targets, shown):
    evaluated = page(targets)
    html = render_page(evaluated, f"olvae evaluate runs/{targets[0]}")
    reader = Reader(html)
    title = f"{', '.join(shown)}: open-litevae, 64 px"
    assert [text for tag, text in reader.texts if tag == "title"] == [title]
    assert f"{shown[0]} misses" in reader.all_text()
    for name in shown:
        assert f"<span>{breakable(name)}</span></span></th>" in html  # a row
        assert f"</span> {breakable(name)}</th>" in html  # a column of the gallery
    assert f"olvae evaluate runs/{targets[0]}" in html
    assert [row.target for row in evaluated.results.rows] == targets


def test_page_images_stand_side_by_side_with_every_target(whole):
    """The same image in a row, and each reconstruction with its own value."""
    table = render_page(whole).split('<table class="beside"')[1].split("</table>")[0]
    rankings = whole.observers[0].rankings
    rows = table.split("<tr>")[2:]
    assert len(rows) == 4
    for row in rows:
        first, *others = re.findall(r'alt="([^"]*)"', row)
        key = first.removeprefix("input of ")
        assert others == [f"reconstruction of {key}"] * 3
        found = re.findall(r"PSNR ([\d.]+) dB", row)
        assert found == [
            next(f"{e.value:.1f}" for e in r.arbitrary(12) if e.key == key)
            for r in rankings.values()
        ]


def test_band_bars_are_as_long_as_the_error(whole):
    """On a scale of the models' own: a baseline that is far worse leaves their bars readable."""
    first, second, third = whole.results.rows
    huge = {
        name: {key: 1000.0 * value for key, value in band.items()}
        for name, band in third.observed["bands"].items()
    }
    html = render_page(
        changed(whole, [first, second, replace(third, observed={"bands": huge}, baseline=True)])
    )
    bands = {row.target: row.observed["bands"] for row in (first, second)}
    largest = max(band["mse"] for found in bands.values() for band in found.values())
    widths = [float(width) for width in re.findall(r'class="c[12]" style="width: ([\d.]+)%"', html)]
    expected = [
        100 * bands[target][name]["mse"] / largest for name in bands["one"] for target in bands
    ]
    assert widths[::2] == pytest.approx(expected, abs=0.01)
    assert max(widths[1::2]) == 100.0
    off = re.findall(r'class="c3 off" style="width: ([\d.]+)%"', html)
    assert set(off) == {"100"}
    assert len(off) == sum(band["mse"] > 0 for band in huge.values()) * 2


def test_baselines_stand_below_all_models(whole):
    first, second, third = whole.results.rows
    earlier = Row("an earlier one", 12, {"psnr": 99.0})
    results = replace(
        whole.results, rows=[first, replace(second, baseline=True), third], earlier=[earlier]
    )
    assert [row.target for row in results.table] == ["one", "three", "an earlier one", LONG]
    assert [Row.from_dict(row.as_dict()).baseline for row in results.table] == [
        False,
        False,
        False,
        True,
    ]
    html = render_page(replace(whole, results=results))
    assert "C an earlier one" in Reader(html).all_text()
    assert "99.000" in html
    assert "olitevaeB_<wbr>im_<wbr>f8c12_<wbr>imagenet" in html  # long names break after separators
    assert breakable("a/b<c") == "a/<wbr>b&lt;c"


def test_page_of_infinite_values_and_uneven_sets(whole):
    images = {"source": "tiles", "n": 2, "sha256": "ab", "unreadable": 0, "enlarged": 0}
    rows = [Row("a", 1, {"psnr": math.inf})]
    protocol = {"name": "mine", "size": 8}
    results = Results(protocol, "0", images, rows, earlier=[Row("b", 2, {})])
    html = render_page(Evaluated(results, [Gallery(), Bands(), FlatColours()]))
    assert "∞" in html
    assert "<span>1</span>" in html
    assert "<span>2</span>" in html
    assert "best</span>" not in html
    for absent in ('id="gallery"', 'id="bands"', 'id="test_patterns"', 'id="cost"', "Differences"):
        assert absent not in html
    Reader(html)


def test_page_keeps_small_pictures_to_the_pixel_and_large_ones_small():
    def decoded(html: str) -> np.ndarray:
        data, width, height = re.search(
            r'base64,(.*?)" width="(.*?)" height="(.*?)"', html
        ).groups()
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.size == (int(width), int(height))
        return np.asarray(shown.convert("RGB"))

    noise = torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8)
    assert np.array_equal(
        decoded(picture(noise, "", 96)), noise.permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
    )
    grey = noise[:1].expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded(picture(noise[:1], "")), grey.repeat(4, 0).repeat(4, 1))
    _, photograph = photographs(256)
    reference = Image.fromarray(photograph[0].permute(1, 2, 0).numpy()).resize(
        (160, 160), Image.Resampling.LANCZOS
    )
    shown = decoded(picture(photograph[0], "", 160))
    assert np.abs(shown.astype(int) - np.asarray(reference)).mean() < 6
    assert len(decoded(picture(photograph[0], ""))) == 256
    for side, expected in ((128, 256), (129, 129)):
        _, (tile, *_) = photographs(side)
        assert decoded(picture(tile, "")).shape == (expected, expected, 3)
    assert [side_limit(n) for n in (0, 36, 1000, 10**6)] == [256, 256, 122, 96]


def test_targets_have_letters_and_seven_colours():
    names = [f"model {i}" for i in range(28)]
    images = {"source": "tiles", "n": 2, "sha256": "ab", "unreadable": 0, "enlarged": 0}
    shown = Page(Results({}, "0", images, [Row(name, 2, {}) for name in names]))
    assert list(shown.colours.values()) == [1, 2, 3, 4, 5, 6, 7] * 4
    assert shown.mark("model 2") == '<span class="badge c3">C</span>'
    assert shown.mark("model 27") == '<span class="badge c7">28</span>'
    other = "see runs/2026-11-30T10-55-15_demo_32"
    assert shown.shown(other) == other  # a run that is no target


def test_templates_leave_no_empty_lines(whole):
    """Of their own statements, whose lines and indents are taken out."""
    body = render_page(whole).split("</style>")[1]
    assert len(re.findall(r"\n[ \t]*\n", body)) <= 1


def test_a_failure_leaves_the_old_page(tmp_path, whole):
    path = write_files(whole, tmp_path, command="not utf-8 \udcff")["report"]
    before = path.read_text(encoding="utf-8")
    assert "not utf-8 \\udcff" in before
    (first, *others) = whole.results.rows
    broken = replace(first, observed={"bands": {"LL1": {"mse": 1.0}}})  # a band without its share
    with pytest.raises(KeyError):
        write_files(changed(whole, [broken, *others]), tmp_path, command=COMMAND)
    assert path.read_text(encoding="utf-8") == before
    # And its numbers.
    assert Results.read(tmp_path / "metrics.json").as_dict() == whole.results.as_dict()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.browser
@pytest.mark.parametrize(
    ("size", "width", "dark"), [(64, 390, False), (256, 390, True), (256, 1280, False)]
)
def test_page_in_a_browser_fits_the_screen_and_requests_nothing(
    tmp_path, browser, size, width, dark
):
    """Nothing is wider than the screen, every picture is there, nothing is asked of the network.

    The screenshots are for people: they stay in pytest's folder.
    """
    path = tmp_path / "report.html"
    path.write_text(render_page(page([HOSTILE, LONG, "three"], size)), encoding="utf-8")
    visit = Visit(browser, width, dark)
    visit.page.goto(path.resolve().as_uri())
    ask = visit.page.evaluate
    assert ask("innerWidth") == width
    assert ask("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.scroll')]"
    wide = f"{boxes}.filter(e => e.scrollWidth > e.clientWidth).length"
    assert (ask(wide) > 0) or width > 390  # wide tables scroll in their box
    assert ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert ask("document.scripts.length") == 0
    paper = [
        int(v) for v in re.findall(r"\d+", ask("getComputedStyle(document.body).backgroundColor"))
    ]
    assert (sum(paper) / len(paper) < 128) == dark
    visit.page.screenshot(path=tmp_path / "report.png", full_page=True)
    with Image.open(tmp_path / "report.png") as image:
        assert image.width == width
    assert {url for url in visit.requests if not url.startswith("data:")} == {
        path.resolve().as_uri()
    }
    assert not visit.problems
