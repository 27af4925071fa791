"""The table of recipes is the recipes', and docs/recipes.md has it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from olvae.config import recipes
from olvae.data.pixels.size_and_range import Sides
from olvae.models.footprint import Footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from study.recipes import Counted, costs, groups, page, settings
from tests.recipes import recipe

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "recipes.md"


@pytest.fixture
def read_once(monkeypatch):
    """The table's settings are of recipes that other tests have read."""
    monkeypatch.setattr("study.recipes.load", lambda names: recipe(recipes()[names[0]]))


@pytest.mark.usefixtures("read_once")
def test_every_recipe_is_on_the_page_with_its_settings():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in recipes() if f"`{name}`" not in text] == []
    rows: dict[str, list[str]] = {}  # of both tables
    for line in re.findall(r"^\| (`.*) \|$", text.partition("<!-- table:")[2], re.M):
        name, *cells = [cell.strip() for cell in line.split(" | ")]
        rows.setdefault(name.strip("`"), []).extend(cells)
    names = [name for _, inside in groups() for name in inside]
    assert sorted(rows) == sorted(names)
    for name in names:
        assert rows[name][1:5] == settings(name), f"{name}: python -m study.recipes"


@pytest.mark.usefixtures("read_once")
def test_what_a_recipe_continues_from_is_where_its_comments_name_it():
    for name, path in recipes().items():
        if "Start from" in path.read_text(encoding="utf-8"):
            assert settings(name)[0].startswith("`"), name


def test_hours_are_operations_over_two_fifths_of_the_peak():
    """phase_a's 100,000 steps of 32 images, at a TFLOP an image; 64 GPUs' hours are added up."""
    need = Footprint(fixed=2**30, per_image=2**28, flop=10**12)
    counted = SimpleNamespace(of=lambda _: (need, 59_955_000))
    # 3.2e18 / (0.4 * 989e12) s, and over 312e12; 9 GiB and 15 %
    assert costs("phase_a", counted) == ["60", "10", "2.2 h", "7.1 h"]
    # 12,500 steps of 256 images; 2 GiB and 15 %
    assert costs("imagenet/large_batch", counted)[1:] == ["2.3", "2.2 h", "7.1 h"]
    small = SimpleNamespace(of=lambda _: (need._replace(flop=10**9), 5 * 10**5))
    assert costs("demo", small) == ["0.5", "", "", ""]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_is_what_the_script_makes_of_the_recipes():
    assert page(DOCUMENT) == DOCUMENT.read_text(encoding="utf-8"), "python -m study.recipes"


def test_counted_keeps_an_autoencoder_that_is_not_the_hubs(tmp_path, monkeypatch):
    """Of 0.51 M parameters; the footprint has its own tests."""
    asked = []
    need = Footprint(fixed=1, per_image=2, flop=3)
    monkeypatch.setattr("study.recipes.footprint", lambda *args: asked.append(args) or need)
    counted = Counted(tmp_path)
    found, parameters = counted.of("folder")
    assert round(parameters / 1e6, 2) == 0.51
    ((model, size, precision),) = asked
    assert isinstance(model, LiteAutoencoderKL)
    assert (found, size, precision) == (need, Sides.of(64), "bf16")
    assert list(tmp_path.iterdir()) == []
    assert counted.of("folder") == (need, parameters)
    assert len(asked) == 1
