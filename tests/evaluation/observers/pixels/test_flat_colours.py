import json
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from olvae.evaluation.cells import texts
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.pixels.flat_colours import (
    FlatColours,
    colour_size,
    reconstruct_colours,
)
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import DiagonalGaussian


class Faulty(Autoencoder):
    """Keeps images as they are, but for faults of a known size; its posterior is noisy."""

    def __init__(
        self, grid: float = 0.0, border: float = 0.0, shift: float = 0.0, channels: int = 3
    ) -> None:
        super().__init__()
        self.grid, self.border, self.shift, self.channels = grid, border, shift, channels

    in_channels = property(lambda self: self.channels)
    downscale = property(lambda self: 4)
    latent_channels = property(lambda self: self.channels)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(torch.cat((x, torch.zeros_like(x)), dim=1))

    def decode(self, z: Tensor) -> Tensor:
        y = z * 127.5  # steps of 8-bit values from here on
        y = y + self.shift
        y[..., ::4, ::4] += self.grid  # one pixel of each tile
        y[..., :2, :] += self.border
        y[..., -2:, :] += self.border
        return y / 127.5


def test_an_identity_has_no_flat_colour_artefacts():
    for colour in reconstruct_colours(Faulty(), size=32).values():
        assert max(map(abs, colour["shift"])) < 1e-4
        assert max(colour["amplitude"], colour["grid"], colour["amplitude_with_border"]) < 1e-4


def test_a_grid_has_the_amplitude_that_was_put_in():
    """Of 16 values one is g higher: their standard deviation is g sqrt(15) / 16,
    their mean g / 16 higher.
    """
    colours = reconstruct_colours(Faulty(grid=4.0), size=32)
    expected = 4.0 * math.sqrt(15) / 16
    for name in ("grey 64", "grey 128", "grey 192", "black"):
        assert colours[name]["shift"] == pytest.approx([0.25] * 3, abs=1e-4)
        for amplitude in ("amplitude", "grid", "amplitude_with_border"):
            assert colours[name][amplitude] == pytest.approx(expected, abs=1e-4)
    assert colours["white"]["amplitude"] < 1e-4  # clamped
    assert colours["red"]["shift"] == pytest.approx([0.0, 0.25, 0.25], abs=1e-4)
    assert colours["red"]["amplitude"] == pytest.approx(expected * math.sqrt(2 / 3), abs=1e-4)


def test_artefacts_at_the_border_are_no_grid():
    grey = reconstruct_colours(Faulty(border=8.0), size=32)["grey 128"]
    assert max(grey["amplitude"], grey["grid"]) < 1e-4
    assert grey["amplitude_with_border"] == pytest.approx(
        8.0 * math.sqrt(4 / 32 * 28 / 32), abs=1e-4
    )


def test_colours_are_clamped_at_black_on_the_device_asked_for():
    model, devices = Faulty(shift=-4.0), []
    model.to = devices.append
    colours = reconstruct_colours(model, 32, "cpu")
    assert colours["black"]["shift"] == pytest.approx([0.0] * 3, abs=1e-4)
    assert colours["grey 64"]["shift"] == pytest.approx([-4.0] * 3, abs=1e-4)
    assert devices == ["cpu"]


def test_noise_that_does_not_repeat_is_no_grid():
    class Noisy(Faulty):
        def decode(self, z: Tensor) -> Tensor:
            noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0))
            return z + 3.0 / 127.5 * noise

    grey = reconstruct_colours(Noisy(), size=128)["grey 128"]
    assert grey["amplitude"] == pytest.approx(3.0, rel=0.05)
    assert grey["grid"] == pytest.approx(3.0 / 16, rel=0.2)  # averaged over 16 x 16 tiles


@pytest.mark.parametrize(
    ("downscales", "largest", "size"),
    [
        ((8,), 256, 128),
        ((4,), 256, 128),
        ((8,), 64, 64),
        ((16, 8), 512, 256),
        ((32,), 256, 256),
        ((6, 4), 600, 132),
    ],
)
def test_flat_colour_size_is_the_smallest_that_a_grid_allows(downscales, largest, size):
    assert colour_size(downscales, largest) == size


@pytest.mark.parametrize(("channels", "colours"), [(1, 5), (2, 7), (3, 11), (4, 9)])
def test_flat_colours_of_other_numbers_of_channels(channels, colours):
    found = reconstruct_colours(Faulty(grid=2.0, channels=channels), size=16)
    assert len(found) == colours
    assert all(len(colour["shift"]) == channels for colour in found.values())
    # What is at its largest is clamped, of the others one pixel in 16 is brighter.
    if channels in (2, 4):
        shift = [0.0] + [2.0 / 16] * (channels - 1)
        assert found["channel 1"]["shift"] == pytest.approx(shift, abs=1e-4)


def test_flat_colours_examine_every_target_in_float32():
    half = Faulty()
    half.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
    observer = FlatColours()
    subjects = {
        "a": Subject(Faulty()),
        "b": Subject(Faulty(grid=4.0)),
        "half": Subject(half),
        "baseline": Subject(Faulty(), baseline=True),
    }
    observer.examine(subjects, 64, "cpu")
    assert [name for name in subjects if observer.result(name, 0)] == ["a", "b"]
    content = observer.result("b", 0)
    expected = reconstruct_colours(Faulty(grid=4.0), 64)
    assert content == {"size": 64, "period": 4, "frame": 16, "colours": expected}
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    observer.examine({"broken": Subject(Faulty(grid=math.nan))}, 64, "cpu")
    assert all(
        colour["grid"] is None for colour in observer.result("broken", 0)["colours"].values()
    )


def test_the_section_sums_up_the_colours():
    observer = FlatColours()
    subjects = {"mine": Faulty(4.0, 8.0, -5.05), "broken": Faulty(grid=math.nan)}
    observer.examine({name: Subject(model) for name, model in subjects.items()}, 64, "cpu")
    colours = observer.result("mine", 0)["colours"].values()
    means = {name: fmean(colour[name] for colour in colours) for name in ("grid", "amplitude")}
    border = fmean(colour["amplitude_with_border"] for colour in colours)
    tables = []

    def table(rows, label, caption):
        tables.append((rows, label))
        return "shown" if rows else ""

    page = SimpleNamespace(table=table)
    assert observer.section(page) == "shown"
    cells = {
        "grid, mean": f"{means['grid']:.2f}",
        "grid, largest": f"{max(colour['grid'] for colour in colours):.2f}",
        "amplitude, mean": f"{means['amplitude']:.2f}",
        "with border, mean": f"{border:.2f}",
        "shift, largest": "4.8",  # -5.05, and 4 in one of 16 pixels
    }
    assert tables == [(texts({"mine": cells, "broken": {}}), "artefacts")]
    assert FlatColours().section(page) is None
