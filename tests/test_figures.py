import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from PIL import Image

from olvae.figures import (
    comparison,
    error_map,
    labelled_grid,
    plot_curves,
    running_mean,
    save_image,
)


def test_error_map_goes_from_black_to_white_at_64():
    x = torch.zeros(1, 3, 1, 3, dtype=torch.uint8)
    y = x.clone()
    y[..., 1], y[..., 2] = 32, 64
    colours = error_map(x, y)
    assert colours.shape == (1, 3, 1, 3)
    brightness = colours.float().mean(1).flatten()
    assert brightness[0] < 5 < brightness[1] < brightness[2]
    assert brightness[2] > 220
    assert torch.equal(error_map(x, x + 200), error_map(x, x + 64))


def test_the_colours_of_errors_are_those_of_matplotlibs_magma():
    x = torch.zeros(1, 3, 64, 64)
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 100
    y[..., 0, :6] = torch.tensor([0, 0.25, 63.99, 64, 64.01, 255])
    error = (y.mean(1) / 64).clamp(0, 1).numpy()
    expected = colormaps["magma"](error, bytes=True)[..., :3]  # (1, 64, 64, 3)
    assert np.array_equal(error_map(x, y).permute(0, 2, 3, 1).numpy(), expected)


def test_labelled_grid_holds_each_picture_and_is_as_wide_as_its_longest_name():
    red = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    grid = np.asarray(labelled_grid({"red": red, "black": torch.zeros_like(red)[:1]}))
    assert (grid == (255, 0, 0)).all(-1).sum() == 2 * 128 * 128
    assert grid.shape[1] == 4 + 2 * 132
    name = "decoded from N(0, I): noise is expected"
    one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    narrow, wide = (np.asarray(labelled_grid({name: one.expand(n, -1, -1, -1)})) for n in (1, 9))
    label = slice(4, 30)
    assert 132 < narrow.shape[1] < wide.shape[1] == 4 + 9 * 132
    assert np.array_equal(narrow[label], wide[label, : narrow.shape[1]])
    assert (wide[label, narrow.shape[1] :] == 255).all()


@pytest.mark.parametrize(
    ("channels", "extension"), [(1, "png"), (3, "png"), (4, "png"), (5, "npy")]
)
def test_save_image_keeps_every_value(tmp_path, channels, extension):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / f"x.{extension}"
    save_image(image, path)
    array = np.load(path) if extension == "npy" else np.atleast_3d(np.asarray(Image.open(path)))
    assert np.array_equal(array, image.permute(1, 2, 0).numpy())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("channels", "name"), [(2, "x.png"), (4, "x.jpg")])
def test_save_image_refuses_formats_without_so_many_channels(tmp_path, channels, name):
    with pytest.raises(ValueError, match=rf"{channels} channels .*written"):
        save_image(torch.zeros(channels, 2, 2, dtype=torch.uint8), tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_running_mean_is_of_the_values_before():
    values = [*range(10), math.nan, 3.0, 5.0, 7.0]
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(14)]
    assert running_mean(values, 3) == pytest.approx(expected, nan_ok=True)
    assert running_mean(values[:10], 1).tolist() == values[:10]


def test_curve_panel_says_that_its_curves_have_few_points(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text))
    plot_curves({f"of {n}": ([1.0] * n, [2.0] * n) for n in (1, 2, 3, 4, 5)}, tmp_path / "c.png")
    assert (titles[0], titles[3:]) == ("of 1 (1 point)", ["of 4 (4 points)", "of 5"])
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 200


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (256, 256)),
        ((1, 200), (6, 1200)),
        ((13, 200), (26, 400)),
        ((200, 13), (400, 26)),
        ((100, 150), (100, 150)),
        ((1000, 1500), (800, 1200)),
    ],
)
def test_comparison_of_pictures_of_any_shape(size, expected):
    red = torch.zeros(3, *size, dtype=torch.uint8)
    red[0] = 255
    figure = np.asarray(comparison({"a": red, "b": red, "c": torch.zeros_like(red)}))
    is_red = (figure == (255, 0, 0)).all(-1)
    assert is_red.sum() == 2 * expected[0] * expected[1]
    rows, columns = is_red.any(1).sum(), is_red.any(0).sum()
    stacked = size[1] > 2 * size[0]
    assert (rows, columns) == (
        (2 * expected[0], expected[1]) if stacked else (expected[0], 2 * expected[1])
    )


def test_labels_of_narrow_pictures_do_not_overlap():
    narrow = torch.zeros(3, 300, 20, dtype=torch.uint8)
    assert comparison({"a long name": narrow, "b": narrow}).width > 20 + 100
