import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS, from_uint8, to_uint8
from olvae.export import reconstruction as module
from olvae.export.reconstruction import (
    Reconstruction,
    ReconstructOptions,
    plan_outputs,
    reconstruct,
    reconstruct_file,
    reconstruct_files,
)
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import pad_to_multiple
from olvae.modules.distributions import Deterministic
from tests.conftest import tiny, tiny_config

ROOT = Path(__file__).parent.parent.parent

CPU = ReconstructOptions(torch.device("cpu"), memory=2**30)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (24, 16), (13, 50)])
@pytest.mark.parametrize("options", [CPU, ReconstructOptions(torch.device("cpu"), 2**20)])
def test_reconstruction_is_the_models_within_rounding(size, options):
    vae = tiny()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    with torch.no_grad():
        expected, _ = vae(pad_to_multiple(from_uint8(image[None]), 8))
    expected = to_uint8(expected[0, :, : size[0], : size[1]])
    difference = (reconstruct(vae, image, options)[0].int() - expected.int()).abs()
    assert difference.max() <= 1  # rounding at .5
    assert difference.float().mean() < 0.01


@torch.no_grad()
def test_a_decoder_at_2x_writes_twice_the_size_and_compares_the_shrunk_image(tmp_path):
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    vae = tiny(decoder_config=decoder)
    pixels = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    value, result = reconstruct_file(vae, tmp_path / "a.png", tmp_path / "out" / "a", CPU)

    x = from_uint8(torch.from_numpy(pixels).movedim(2, 0)[None])
    y = vae.decode(vae.encode(pad_to_multiple(x, 8)).mode())
    written = np.asarray(Image.open(result)).astype(int)
    expected = to_uint8(y)[0, :, :26, :42].movedim(0, 2).numpy().astype(int)
    assert written.shape == (26, 42, 3)
    assert np.abs(written - expected).max() <= 1
    smaller = to_uint8(y.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)))[0, :, :13, :21]
    error = (smaller.movedim(0, 2).numpy().astype(float) - pixels) ** 2
    assert value == pytest.approx(10 * math.log10(255**2 / error.mean()), abs=0.05)


class Steps(Autoencoder):
    """Says how far it is, by thirds of encoding and halves of decoding."""

    in_channels, latent_channels, downscale = 3, 3, 1

    def encode(self, x):
        raise NotImplementedError

    def decode(self, z):
        raise NotImplementedError

    def encode_within(self, x, memory, progress):
        for done in range(4):
            progress(done / 3)
        return Deterministic(x)

    def decode_tiled(self, z, tile, memory, progress):
        for done in range(3):
            progress(done / 2)
        return z


def test_progress_of_a_reconstruction_is_three_tenths_encoding():
    said = []
    image = torch.arange(2 * 3, dtype=torch.uint8).view(1, 2, 3).repeat(3, 1, 1)
    found = reconstruct(Steps(), image, CPU, said.append)
    assert said == pytest.approx([0, 0.1, 0.2, 0.3, 0.3, 0.65, 1.0])
    assert torch.equal(found.levels, image)
    assert reconstruct(Steps(), image, CPU).levels.equal(image)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def test_a_format_that_is_not_read_is_refused_with_a_command_that_converts_it(tmp_path):
    """By its name: a broken picture of a known kind is only broken."""
    for name, advice in (("a.svs", True), ("b.jpg", False)):
        file = tmp_path / name
        file.write_bytes(b"no picture")
        with pytest.raises(ValueError, match="picture format") as raised:
            reconstruct_file(tiny(), file, tmp_path / "out", CPU)
        command = "save it as a tiled TIFF, .*: vips copy 'a.svs' 'a.tif.tile,bigtiff.'"
        assert bool(re.search(command, str(raised.value))) == advice


def test_planned_outputs_give_every_image_a_place_of_its_own(tmp_path):
    a, b, result, c = (
        tmp_path / name for name in ("a.png", "in/b.png", "in/out/b.png", "in/deep/b.jpg")
    )
    out = tmp_path / "in" / "out"
    touch(a, b, result, out / "b_compare.png", c)
    assert plan_outputs([a, tmp_path / "in", b], out) == {
        a: out / "a",
        b: out / "b",
        c: out / "deep/b",
    }
    for given, text in (
        ([a, tmp_path / "missing.png"], "no such image or folder"),
        ([out], "no images outside of the folder of the results"),
    ):
        with pytest.raises(FileNotFoundError, match=text):
            plan_outputs(given, out)
    upper, compare, again = (
        tmp_path / name for name in ("in/B.bmp", "deep/a_compare.png", "deep/b.png")
    )
    touch(upper, compare, again)
    places = plan_outputs([a, b, upper, compare, again], out)
    assert [place.name for place in places.values()] == [
        "a",
        "b",
        "B.bmp",
        "a_compare.png",
        "b.png",
    ]
    touch(tmp_path / "other/b.png")
    assert (
        plan_outputs([b, again, tmp_path / "other/b.png"], out)[tmp_path / "other/b.png"]
        == out / "b.png-2"
    )
    for given, place, text in (
        ([a], tmp_path, r"a\.png is one of the images"),
        (
            [tmp_path / "in/deep/b.jpg", tmp_path / "in/b.png"],
            tmp_path / "in",
            "is one of the images",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            plan_outputs(given, place)
    # Out is around them, not among them.
    assert [*plan_outputs([tmp_path / "in/deep"], tmp_path)] == [c]
    touch(out / "x.png")
    touch(tmp_path / "x.jpg")
    with pytest.raises(ConfigError, match=r"x\.png "):
        plan_outputs([tmp_path / "x.jpg"], out)
    touch(out / "x_compare.png")
    assert plan_outputs([tmp_path / "x.jpg"], out) == {tmp_path / "x.jpg": out / "x"}
    # A picture that is there is no series of DICOM, whatever its name.
    dated = tmp_path / "2026.12.01"
    dated.write_bytes(a.read_bytes())
    assert plan_outputs([dated], out) == {dated: out / "2026.12"}


@pytest.mark.parametrize("channels", [1, 3, 4, 2])
def test_reconstructed_files_of_any_number_of_channels(tmp_path, channels, monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (9, 5, channels), dtype=np.uint8)
    suffix = ".png" if channels in (1, 3, 4) else ".npy"
    source = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(source, array)
    else:
        Image.fromarray(array[..., 0] if channels == 1 else array).save(source)
    monkeypatch.setattr(module, "reconstruct", lambda model, x, *_: Reconstruction(x, x, x))
    vae = tiny()
    vae.in_channels = channels
    value, result = reconstruct_file(vae, source, tmp_path / "out" / "deep" / "x", CPU)
    assert value == math.inf
    written = np.load(result) if suffix == ".npy" else np.asarray(Image.open(result))
    assert np.array_equal(np.atleast_3d(written), array)
    assert (tmp_path / "out" / "deep" / "x_compare.png").is_file()


def test_failed_reconstruction_leaves_nothing_half_written(tmp_path, monkeypatch):
    source = tmp_path / "x.png"
    touch(source)
    out = tmp_path / "out"
    out.mkdir()

    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        reconstruct_file(tiny(), source, out / "x", CPU)
    assert list(out.iterdir()) == []


def test_reconstruction_with_non_finite_values_is_refused(tmp_path):
    vae = tiny()
    torch.nn.init.constant_(vae.decoder.conv_in.bias, torch.nan)
    with pytest.raises(ValueError, match="non-finite"):
        reconstruct(vae, torch.zeros(3, 8, 8, dtype=torch.uint8), CPU)
    Image.new("RGB", (9, 8)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png: .* non-finite values"):
        reconstruct_file(vae, tmp_path / "grey.png", tmp_path / "out", CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["grey.png"]


def test_each_file_is_reported_and_counted(monkeypatch):
    """Of three, the second can't be reconstructed; each says when half of it is done."""

    def one(model, source, place, options, progress):
        progress(0.5)
        if source.name == "b.png":
            raise ValueError("b.png: broken")
        return 12.25, place.with_suffix(".png")

    monkeypatch.setattr(module, "reconstruct_file", one)
    places = {Path(f"{name}.png"): Path("out") / name for name in "abc"}
    lines: list[str] = []
    done: list[float] = []
    assert reconstruct_files(tiny(), places, CPU, lines.append, done.append) == 2
    assert lines == [
        " 12.25 dB  a.png -> out/a.png",
        "error: b.png: broken",
        " 12.25 dB  c.png -> out/c.png",
    ]
    assert done == [0.5, 1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize(
    ("width", "factor"), [(2399, 1), (2400, 1), (4799, 1), (4800, 2), (9599, 2), (9600, 4)]
)
def test_pictures_of_a_large_image_are_shrunk_to_2400_pixels_or_more(width, factor):
    for size in ((width, 3), (3, width)):
        rows = SimpleNamespace(height=size[0], width=size[1])
        assert module.LargeImage(tiny(), None, rows, CPU).factor == factor


def test_rows_of_a_large_image_add_to_its_error_and_its_pictures():
    """The pictures are shrunk by 2, the last column and row by themselves."""
    vae = SimpleNamespace(pixel_range=EIGHT_BITS)
    large = module.LargeImage(vae, None, SimpleNamespace(height=131, width=4801), CPU)
    x, y = torch.randint(0, 256, (2, 3, 131, 65), dtype=torch.uint8)
    large.compare(x, y)
    assert large.error == (x.double() - y.double()).square().sum().item()
    for (picture,), whole in zip(large.pictures[:2], (x, y), strict=True):
        assert picture.shape == (3, 66, 33)
        assert (picture[:, -1, -1] == whole[:, -1, -1]).all()
        mean = whole[:, :2, :2].double().mean((1, 2))
        assert (picture[:, 0, 0] - mean).abs().max() <= 0.5
    assert large.pictures[2][0].shape == (3, 66, 33)
