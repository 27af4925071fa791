import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.distributions import Normal, kl_divergence

from olvae.data.pixels.size_and_range import PixelRange
from olvae.evaluation import latent_report
from olvae.evaluation.latent_report import (
    COLOURS,
    DASHES,
    EDGES,
    LatentAccumulator,
    draw_distribution,
    encode_latents,
    high_and_all,
    image_key,
    mmd2_normal,
    mmd2_null_std,
    print_latents,
    report_latents,
)
from olvae.evaluation.observers.observer import Observer
from olvae.modules.distributions import Deterministic, DiagonalGaussian
from tests.evaluation.peers import numbers

N, C, H, W = 11, 3, 6, 4


@pytest.fixture
def moments():
    """Channels of different mean and width; channel 2 is wide enough to leave the histogram."""
    mean = torch.randn(N, C, H, W)
    mean[:, 1] = 0.8 * mean[:, 1] - 2.0
    mean[:, 2] = 15.0 * mean[:, 2] + 1.0
    return torch.cat((mean, torch.randn(N, C, H, W) - 1.0), dim=1)


def accumulate(
    moments: torch.Tensor, keys: list[int], batch: int, mmd_latents: int = 100
) -> LatentAccumulator:
    accumulator = LatentAccumulator(mmd_latents)
    for start in range(0, len(keys), batch):
        accumulator.update(
            DiagonalGaussian(moments[start : start + batch]), keys[start : start + batch]
        )
    return accumulator


def sample(moments: torch.Tensor, keys: list[int]) -> torch.Tensor:
    mean, logvar = moments.double().chunk(2, dim=1)
    noise = [
        torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k in keys
    ]
    return (mean + (logvar / 2).exp() * torch.stack(noise)).float()


def test_latent_statistics_are_numpys(moments):
    keys = list(range(N))
    got = accumulate(moments, keys, 4).compute()
    # (C, N h w)
    mean, logvar = (
        part.double().transpose(0, 1).flatten(1).numpy() for part in moments.chunk(2, dim=1)
    )
    var = np.exp(logvar)
    std = np.sqrt(mean.var(1) + var.mean(1))
    channels = got["channels"]
    count = H * W
    assert got["n"] == N
    assert got["latent_shape"] == [C, H, W]
    assert channels["mean"] == pytest.approx(mean.mean(1), rel=1e-12)
    assert channels["std"] == pytest.approx(std, rel=1e-12)
    assert channels["std_of_posterior_means"] == pytest.approx(mean.std(1), rel=1e-12)
    assert channels["min_of_posterior_means"] == mean.min(1).tolist()
    assert channels["max_of_posterior_means"] == mean.max(1).tolist()
    oracle = kl_divergence(
        Normal(torch.from_numpy(mean), torch.from_numpy(np.sqrt(var))), Normal(0.0, 1.0)
    )
    assert channels["kl_per_position"] == pytest.approx(oracle.mean(1).numpy(), rel=1e-12)
    assert channels["kl_per_image"] == pytest.approx(oracle.mean(1).numpy() * count, rel=1e-12)
    assert got["kl_per_image"] == pytest.approx(
        float(DiagonalGaussian(moments.double()).kl().mean()), rel=1e-6
    )
    assert got["kl_per_position"] == pytest.approx(got["kl_per_image"] / count, rel=1e-12)
    assert channels["posterior_std"] == pytest.approx(np.sqrt(var.mean(1)), rel=1e-9)
    assert got["posterior_std"] == pytest.approx(np.sqrt(var.mean()), rel=1e-9)
    noise = var.mean(1) / std**2
    assert channels["noise_share"] == pytest.approx(noise, rel=1e-9)
    assert got["noise_share"] == pytest.approx(var.mean() / (std**2).mean(), rel=1e-9)
    factors = got["diffusion"]
    assert (factors["latents_mean"], factors["latents_std"]) == (channels["mean"], channels["std"])
    assert got["mean"] == factors["shift_factor"] == pytest.approx(mean.mean(), rel=1e-12)
    assert 1 / got["std"] == pytest.approx(factors["scaling_factor"], rel=1e-15)
    assert factors["scaling_factor"] == pytest.approx(
        1 / math.sqrt(mean.var() + var.mean()), rel=1e-12
    )
    erfc = np.vectorize(math.erfc)
    z_scores = (mean - EDGES.numpy()[:, None, None]) / np.sqrt(2 * var)
    below = erfc(z_scores).mean((1, 2)) / 2  # (edges,)
    mass = np.diff(below, prepend=0.0, append=1.0)
    found = got["histogram"]
    assert [found["below"], *found["share"], found["above"]] == pytest.approx(mass, abs=1e-12)
    assert mass[0] > 0.0005  # some of channel 2 is below the grid
    z = sample(moments, keys)
    assert got["mmd"]["mmd2"] == pytest.approx(mmd2_normal(z).tolist(), rel=1e-9)
    scaled = (z.double() - got["mean"]) * factors["scaling_factor"]
    assert got["mmd"]["mmd2_scaled"] == pytest.approx(mmd2_normal(scaled).tolist(), rel=1e-4)
    assert got["mmd"]["standard_error_under_normal"] == mmd2_null_std(N, C * H * W).tolist()


def test_latent_statistics_do_not_depend_on_batches_order_and_merging(moments):
    keys = [image_key(torch.full((3, 2, 2), i, dtype=torch.uint8)) for i in range(N)]
    expected = numbers(accumulate(moments, keys, N, 7).compute())
    order = torch.randperm(N).tolist()
    merged = accumulate(moments[:4], keys[:4], 2, 7)
    merged.merge(LatentAccumulator(7))
    merged.merge(accumulate(moments[4:], keys[4:], 3, 7))
    empty = LatentAccumulator(7)
    empty.merge(merged)
    others = [
        accumulate(moments, keys, 1, 7),
        accumulate(moments, keys, 3, 7),
        accumulate(moments[order], [keys[i] for i in order], 5, 7),
        merged,
        empty,
    ]
    for other in others:
        for (path, value), (name, got) in zip(expected, numbers(other.compute()), strict=True):
            assert path == name
            assert got == pytest.approx(value, rel=1e-9, abs=1e-12), path


def test_the_mmd_keeps_the_smallest_keys_and_equal_images_once(moments):
    keys = [50, 3, 40, 7, 3, 99, 1, 60, 7, 20, 30]
    got = accumulate(moments, keys, 4, 5).compute()
    chosen = [6, 1, 3, 9, 10]  # the keys 1, 3, 7, 20, 30
    assert got["n"] == N
    assert got["mmd"]["latents"] == 5
    expected = mmd2_normal(sample(moments[chosen], [keys[i] for i in chosen]))
    assert got["mmd"]["mmd2"] == pytest.approx(expected.tolist(), rel=1e-9)


def test_latent_high_frequencies_are_those_of_numpys_fft():
    """The cosine transform is the Fourier transform of the mirrored image."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5, 3, 6, 9)).cumsum(-1).cumsum(-2)
    images = rng.normal(size=(5, 2, 24, 36)).cumsum(-1)
    small = images.reshape(5, 2, 6, 4, 9, 4).mean((3, 5))
    shares = []
    for x in (latents, small):
        mirrored = np.concatenate((x, x[:, :, ::-1]), 2)
        mirrored = np.concatenate((mirrored, mirrored[..., ::-1]), 3)
        energies = np.abs(np.fft.fft2(mirrored))[:, :, :6, :9] ** 2
        energies[:, :, 0] /= 2.0  # of all frequencies but 0 there are two, k and -k
        energies[..., 0] /= 2.0
        energies[:, :, 0, 0] = 0.0
        totals = energies.sum((0, 2, 3))
        high = totals - energies[:, :, :3, :5].sum((0, 2, 3))
        shares.append(high.sum() / totals.sum())
    accumulator = LatentAccumulator(0)
    for part in (slice(0, 2), slice(2, 5)):
        posterior = Deterministic(torch.from_numpy(latents[part]))
        accumulator.update(posterior, range(5)[part], torch.from_numpy(images[part]))
    row = accumulator.compute()
    assert row["high_frequencies"] == pytest.approx(shares[0], rel=1e-9)
    assert row["high_frequencies_of_images"] == pytest.approx(shares[1], rel=1e-9)
    high, total = high_and_all(torch.randn(64, 1, 32, 32, dtype=torch.float64))
    assert float(high / total) == pytest.approx(0.75, abs=0.01)  # white noise


def test_active_channels_leave_out_a_dead_one():
    """Channel 1 has nothing of the image, channel 2 just under the threshold, channel 3 above."""
    mean = torch.randn(500, 4, 2, 2)
    mean[:, 1] = 0.0
    mean[:, 2] *= 0.09
    mean[:, 3] *= 0.11
    logvar = torch.full_like(mean, -4.0)
    logvar[:, 1] = 0.0
    got = accumulate(torch.cat((mean, logvar), 1), list(range(500)), 100).compute()
    assert got["channels"]["active"] == [True, False, False, True]
    assert got["active_channels"] == 2
    assert got["channels"]["kl_per_position"][1] == 0.0
    assert got["channels"]["std"][1] == pytest.approx(1.0)


def test_a_channel_at_the_threshold_is_not_active(monkeypatch):
    monkeypatch.setattr(latent_report, "ACTIVE_VARIANCE", 0.25)
    mean = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)
    got = accumulate(torch.cat((mean, mean), 1), [0, 1], 2).compute()
    assert got["channels"]["active"] == [False]


def test_deterministic_latents_are_posteriors_of_no_width(moments):
    """Their numbers are the same as of very narrow Gaussians; KL and activity are missing."""
    latent = moments[:, :C].double()
    keys = list(range(N))
    latent[:, 0, 0, 0] = EDGES[120]  # an edge, a hair's breadth above it for a point
    points = LatentAccumulator(100)
    for start in range(0, N, 4):
        points.update(Deterministic(latent[start : start + 4]), keys[start : start + 4])
    narrow = torch.cat((latent, torch.full_like(latent, -30.0)), 1)
    narrow[:, 0, 0, 0] += 1e-5
    got = points.compute()
    expected = accumulate(narrow, keys, N).compute()
    assert (got["deterministic"], expected["deterministic"]) == (True, False)
    assert set(got["skipped"]) == {"kl", "active"}
    assert "deterministic" in got["skipped"]["kl"]
    assert 1 / got["std"] == pytest.approx(1 / float(latent.std(correction=0)), rel=1e-9)
    assert got["mmd"]["mmd2"] == pytest.approx(mmd2_normal(latent).tolist(), rel=1e-6)
    assert got["channels"].pop("min") == latent.transpose(0, 1).flatten(1).amin(1).tolist()
    assert got["channels"].pop("max") == latent.transpose(0, 1).flatten(1).amax(1).tolist()
    found = numbers({**got, "deterministic": [], "mmd": {}, "skipped": {}})
    others = dict(numbers(expected))
    assert {".mean", ".std", ".channels.mean[0]", ".histogram.share[120]"} <= {
        name for name, _ in found
    }
    assert not [name for name, _ in found if "kl" in name or "active" in name]
    for name, value in found:
        assert value == pytest.approx(others[name], rel=1e-4, abs=1e-5), name
    near = LatentAccumulator()
    near.update(Deterministic(latent[:, :1].tanh()), keys)
    shape = near.compute()["histogram"]
    assert (len(shape["share"]), shape["below"], shape["above"]) == (len(EDGES) - 1, 0.0, 0.0)


def test_latent_statistics_refuse_no_images_two_sizes_and_nan(moments):
    with pytest.raises(ValueError, match="no images"):
        LatentAccumulator().compute()
    accumulator = accumulate(moments, list(range(N)), N)
    with pytest.raises(ValueError, match="one size"):
        accumulator.update(DiagonalGaussian(moments[:2, :, :4]), [1, 2])
    broken = moments.clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="diverged"):
        accumulator.update(DiagonalGaussian(broken), list(range(N)))
    with pytest.raises(ValueError, match="zip"):
        accumulator.update(DiagonalGaussian(moments), [1, 2])


class Halves(torch.nn.Module):
    """A stand-in for an autoencoder: its latent is the image, shrunk."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.downscale = factor
        self.places: list[str] = []

    def to(self, device: str) -> "Halves":
        self.places.append(device)
        return self

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        z = torch.nn.functional.avg_pool2d(x, self.downscale)
        return DiagonalGaussian(torch.cat((z, torch.full_like(z, -4.0)), 1))


def test_several_models_see_the_same_images_in_one_pass():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    batches = iter([{"image": part} for part in images.split(2)])
    got = encode_latents({"a": Halves(2), "b": Halves(4)}, batches)
    a, b = got["a"].compute(), got["b"].compute()
    assert [(row["n"], row["latent_shape"]) for row in (a, b)] == [(9, [3, 4, 4]), (9, [3, 2, 2])]
    assert a["channels"]["mean"] == pytest.approx(
        (images.double() / 127.5 - 1).mean((0, 2, 3)).tolist(), abs=1e-6
    )
    assert b["channels"]["mean"] == pytest.approx(a["channels"]["mean"], abs=1e-6)


def test_latent_figure_shows_every_model_in_its_colour(tmp_path, moments):
    wide = accumulate(moments, list(range(N)), N).compute()
    one = accumulate(moments[:, [0, 3], :1, :1], list(range(N)), N).compute()  # one channel of 1x1
    points = LatentAccumulator()
    points.update(Deterministic(moments[:, :C]), range(N))
    rows = {f"model {i}": row for i, row in enumerate((wide, one, points.compute()))}
    draw_distribution(rows, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    for colour in COLOURS[:3]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(1).sum() > 50, colour


def histogram(mean: float, std: float) -> dict:
    """A row of a normal distribution."""
    share = Normal(mean, std).cdf(EDGES).diff()
    return {"mean": mean, "std": std, "histogram": {"share": share.tolist()}}


def drawn(content: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure of these rows, which is not rendered."""
    figures = []

    def keep(figure: Figure, path: Path, **how: int) -> None:
        assert how == {"dpi": 130}
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_distribution(content, folder / "a.png")
    assert (folder / "a.png").exists()
    return figures[0]


@pytest.mark.parametrize(
    ("rows", "reach", "highest"),
    [
        ({"a": (0.0, 1.0)}, 3.5, None),
        ({"a": (-2.0, 3.0), "b": (0.5, 0.125)}, 2 + 3.5 * 3, "b"),
        ({"a": (0.0, 100.0)}, 35.0, None),
    ],
)
def test_latent_figure_has_densities_over_the_middles_of_bins(
    tmp_path, monkeypatch, rows, reach, highest
):
    content = {name: histogram(*numbers) for name, numbers in rows.items()}
    raw, scaled = drawn(content, tmp_path, monkeypatch).axes
    edges = EDGES.numpy()
    tops = [1 / math.sqrt(2 * math.pi)]
    for number, (name, (mean, std)) in enumerate(rows.items(), 1):
        share = np.array(content[name]["histogram"]["share"])
        density = share / [b - a for a, b in pairwise(edges)]
        middles = np.array([(a + b) / 2 for a, b in pairwise(edges)])
        left, right = raw.lines[number], scaled.lines[number]
        np.testing.assert_allclose(left.get_xdata(), middles)
        np.testing.assert_allclose(left.get_ydata(), density)
        np.testing.assert_allclose(right.get_xdata(), (middles - mean) / std)
        np.testing.assert_allclose(right.get_ydata(), density * std)
        assert left.get_label() == f"{name}: mean {mean:g}, std {std:g}"
        tops.append(density.max())
    assert raw.get_xlim() == (-reach, reach)
    assert raw.get_ylim() == (0.0, pytest.approx(1.06 * max(tops)))
    assert (highest is None) == (max(tops) < 1)
    for panel in (raw, scaled):
        x, y = panel.lines[0].get_data()
        normal = Normal(0.0, 1.0).log_prob(torch.from_numpy(x)).exp()
        np.testing.assert_allclose(y, normal, atol=1e-300)
        assert (x[0], x[-1]) == (-40, 40)
        # Filled below, behind all curves.
        (filled,) = panel.collections
        corners = filled.get_paths()[0].get_extents()
        np.testing.assert_allclose(corners.min, (-40, 0), atol=1e-9)
        np.testing.assert_allclose(corners.max, (40, normal.max()))
        layers = [filled.get_zorder(), *(line.get_zorder() for line in panel.lines)]
        assert layers[0] < layers[1] < min(layers[2:])
    assert (scaled.get_xlim(), scaled.get_ylim()) == ((-8, 8), (1e-5, 2.0))
    assert (raw.get_yscale(), scaled.get_yscale()) == ("linear", "log")


def test_latent_figure_repeats_colours_and_dashes_of_many_models(tmp_path, monkeypatch):
    figure = drawn({f"{i}": histogram(0.0, 1.0) for i in range(7)}, tmp_path, monkeypatch)
    lines = figure.axes[0].lines[1:]
    assert [line.get_color() for line in lines] == [*COLOURS, COLOURS[0]]
    assert [line.get_linestyle() for line in lines] == [*DASHES, *DASHES[:3]]


def test_latent_figure_is_two_quiet_panels_over_one_legend(tmp_path, monkeypatch):
    rows = {f"{i}": histogram(0.0, 1.0) for i in range(2)}
    figure = drawn(rows, tmp_path, monkeypatch)
    assert figure.get_size_inches().tolist() == pytest.approx([11.0, 4.84])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "N(0, 1)",
        *(f"{name}: mean 0, std 1" for name in rows),
    ]
    assert {text.get_fontsize() for text in legend.get_texts()} == {9}
    assert (legend.get_frame_on(), legend._ncols) == (False, 1)
    for panel in figure.axes:
        assert panel.get_gridspec().get_geometry() == (1, 2)
        assert [line.get_linewidth() for line in panel.lines] == [1.0, 1.8, 1.8]
        assert len(panel.lines[0].get_xdata()) == 8001
        assert {line.get_alpha() for line in panel.get_xgridlines()} == {0.25}
        assert all(line.get_visible() for line in panel.get_xgridlines())
        hidden = [side for side, spine in panel.spines.items() if not spine.get_visible()]
        assert sorted(hidden) == ["right", "top"]


class Noting(Observer):
    """A column and a line of each target."""

    name = "noting"

    def result(self, target, draw):
        return {"of": target} if target == "a" and draw == 0 else None

    def columns(self, entry):
        return {"noted": f"<{entry['of']}>"}

    def lines(self, rows):
        for row in rows:
            yield f"[noting] {row.target} {row.observed['noting']['of']}"


SPREAD = {
    "deterministic": False,
    "latent_shape": [4, 8, 16],
    "mean": 0.5,
    "std": 2.0,
    "posterior_std": 0.12345,
    "noise_share": 0.0123,
    "kl_per_position": 12.34,
    "active_channels": 3,
    "high_frequencies": 0.25,
    "high_frequencies_of_images": 0.5,
}
MMD = {
    "sigmas": [25.0, 500.0],
    "mmd2": [0.0123456, 0.002],
    "mmd2_scaled": [0.5, 0.25],
    "standard_error_under_normal": [1e-5, 2e-5],
}
POINTS = {"deterministic": True, "latent_shape": [1, 2, 3], "mean": -1.0, "std": 4.0}


def printed(capsys, monkeypatch, *rows: dict) -> list[list[str]]:
    """The words of each line on standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    content = {"data": {"n": 9, "size": [64, 128]}, "results": list(rows)}
    print_latents(content, Noting())
    return [line.split() for line in capsys.readouterr().err.splitlines()]


def test_printed_latents_have_all_numbers_of_their_row(capsys, monkeypatch):
    first = {"target": "a", **SPREAD, "mmd": MMD, "noting": {"of": "a"}}
    lines = printed(capsys, monkeypatch, first, {"target": "[b]", **POINTS})
    text = [" ".join(line) for line in lines]
    assert text[0].startswith("latents of 9 images of 64x128; ")
    headings = ["target", "latent", "shift", "std", "scaling", "noted", "sigma", "KL", "active"]
    assert headings in lines
    assert ["a", "4x8x16", "0.5000", "2.0000", "0.5000", "<a>", "0.123", "12.3", "3/4"] in lines
    of_points = ["[b]", "1x2x3", "-1.0000", "4.0000", "0.2500", "-", *["skipped"] * 3]
    assert of_points in lines
    assert any(line.startswith("[b]: KL and active channels skipped") for line in text)
    assert any(line.startswith("a: 1.23 % of the variance of its samples") for line in text)
    assert any("a stored sample keeps one draw" in line for line in text)
    share = "a: high frequencies have 25 % of the energy, the images' 50 %"
    assert share in text
    assert sum("high frequencies" in line for line in text) == 1
    assert ["target", "25", "500"] in lines
    assert ["a", "12.3", "2"] in lines
    assert ["a,", "scaled", "500", "250"] in lines
    assert ["a,", "error", "0.01", "0.02"] in lines
    assert text[-1] == "[noting] a a"
    assert not any("MMD: skipped" in line for line in text)


def test_printed_latents_of_one_image_have_no_mmd(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, {"target": "b", **POINTS})
    assert lines[-1][:2] == ["MMD:", "skipped,"]
    assert not any("1000" in line for line in lines)


def test_a_report_of_latents_has_weights_entries_and_a_step_for_each_model(moments):
    names = ("a", "b")
    accumulators = {name: accumulate(moments, list(range(N)), N) for name in names}
    done = []
    content = report_latents(
        accumulators, {"a": "12", "b": "34"}, Noting(), {"src": "x"}, lambda: done.append(1)
    )
    assert len(done) == 2
    assert content["data"] == {"src": "x", "n": N}
    assert content["active_variance"] == 0.01
    found = [(row["target"], row["weights"], row.get("noting")) for row in content["results"]]
    assert found == [("a", "12", {"of": "a"}), ("b", "34", None)]
    row = accumulators["a"].compute()
    assert {name: content["results"][0][name] for name in row} == row
    one = {"a": accumulators["a"]}
    assert report_latents(one, {"a": "12"}, Observer(), {}, list)["data"] == {"n": N}


def test_the_mmd_needs_two_different_images(moments):
    for keys, latents in (([5], None), ([5, 5], None), ([5, 6], 2)):
        row = accumulate(moments, keys, 1).compute()
        assert row["n"] == len(keys)
        if latents is None:
            assert set(row["skipped"]) == {"mmd"}
            assert "mmd" not in row
        else:
            assert "skipped" not in row
            assert (row["mmd"]["latents"], row["mmd"]["sigmas"]) == (2, [25, 50, 100, 250, 500])


def kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    return math.exp(
        -sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) / (2 * sigma**2)
    )


def pair_sum(x: np.ndarray, sigma: float) -> float:
    return sum(kernel(x[i], x[j], sigma) for i in range(len(x)) for j in range(len(x)) if i != j)


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_mmd_to_the_normal_is_the_double_loop(chunk):
    """Pairs of latents by a loop; what N(0, I) gives, in one dimension at a time, by quadrature."""
    z = torch.randn(9, 2, 3, 1) * 1.5 + 0.7
    z[1] = z[0] + 0.1  # nearer than 1
    x = z.double().flatten(1).numpy()
    grid = np.linspace(-12, 12, 4001)
    normal = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    step = grid[1] - grid[0]
    for sigma, value in zip((0.7, 3.0, 25.0), mmd2_normal(z, (0.7, 3.0, 25.0), chunk), strict=True):

        def one(a, s=sigma):
            return np.sum(np.exp(-((a - grid) ** 2) / (2 * s**2)) * normal) * step

        expected_e = np.mean([math.prod(map(one, row)) for row in x])
        gap = np.exp(-((grid[::8, None] - grid[None, ::8]) ** 2) / (2 * sigma**2))
        expected_c = float((normal[::8] @ gap @ normal[::8]) * (8 * step) ** 2) ** 6
        expected = pair_sum(x, sigma) / (9 * 8) - 2 * expected_e + expected_c
        assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_mmd_sampling_error_is_the_one_of_many_draws():
    """1000 sets of 30 latents: mean 0 within its error, standard deviation within 10 %."""
    generator = torch.Generator().manual_seed(4)
    sigmas = (1.0, 4.0, 500.0)
    values = torch.stack(
        [mmd2_normal(torch.randn(30, 5, generator=generator), sigmas) for _ in range(1000)]
    )
    expected = mmd2_null_std(30, 5, sigmas)
    assert (values.mean(0).abs() < 4 * expected / math.sqrt(1000)).all()
    assert torch.allclose(values.std(0), expected, rtol=0.1)  # of 1000 draws, skewed: some 3 %


@pytest.mark.parametrize("d", [1, 3])
def test_mmd_sampling_error_is_the_integral(d):
    """By quadrature in one dimension; kernels of several are products."""
    x = np.linspace(-9, 9, 1201)
    normal = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for sigma, found in zip((0.8, 3.0), mmd2_null_std(7, d, (0.8, 3.0)).tolist(), strict=True):
        k = np.exp(-((x[:, None] - x[None]) ** 2) / (2 * sigma**2))
        e = k @ normal
        h2 = (normal @ k**2 @ normal) ** d - 2 * (normal @ e**2) ** d + (normal @ e) ** (2 * d)
        assert found == pytest.approx(math.sqrt(2 * h2 / (7 * 6)), rel=1e-6)


def test_latent_report_encodes_images_with_a_range_in_it():
    images = torch.randint(0, 65536, (5, 3, 8, 8)).to(torch.uint16)
    stated = PixelRange.from_node([0, 65535])
    got = encode_latents({"a": Halves(2)}, [{"image": images}], pixel_range=stated)["a"].compute()
    expected = (images.double() / 32767.5 - 1).mean((0, 2, 3))
    assert got["channels"]["mean"] == pytest.approx(expected.tolist(), abs=1e-6)
