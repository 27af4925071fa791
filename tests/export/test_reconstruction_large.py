import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from olvae.data.image import image_to_tensor, read_picture
from olvae.data.pixels.size_and_range import PixelRange
from olvae.export import reconstruction as module
from olvae.export.reconstruction import ReconstructOptions, reconstruct, reconstruct_file
from tests.conftest import tiny
from tests.data.pixels.files import tiff, values
from tests.data.test_image import bomb
from tests.models.large.test_streaming import autoencoder
from tests.models.large.test_tiling import sd

SMALL = ReconstructOptions(torch.device("cpu"), memory=2**22)
DEEP = PixelRange.from_node([-40_000, 70_000])


def smooth(height: int, width: int) -> np.ndarray:
    """Colours that differ from place to place, uint8 (H, W, 3)."""
    small = Image.fromarray(values("uint8", 3, (height // 8 + 1, width // 8 + 1)))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("size", "make"),
    [
        ((203, 605), lambda: autoencoder(packets=True, linear=True)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((403, 701), autoencoder),
                ((403, 505), lambda: autoencoder(quantizer=True, wavelet="db2")),
                (
                    (300, 401),
                    lambda: autoencoder(variant="paper", pool="conv", shared_extractor=True),
                ),
            )
        ),
    ],
)
def test_a_large_tiff_is_reconstructed_as_in_memory(size, make, tmp_path, monkeypatch):
    """Bit for bit, in many strips and tiles, of the network and of the file."""
    monkeypatch.setattr(module, "TILE", 128)
    # As many bytes as a file may have that is no BigTIFF.
    monkeypatch.setattr(module, "MOST_CLASSIC", 3 * size[0] * size[1])
    vae = make()
    source = tmp_path / "large.tif"
    source.write_bytes(tiff(smooth(*size), "rgb", tile=(64, 64), compression="zlib"))
    whole, *_ = reconstruct(vae, image_to_tensor(read_picture(source)), SMALL)

    done: list[float] = []
    place = tmp_path / "out/deep/large"
    value, result = reconstruct_file(vae, source, place, SMALL, done.append)
    written = torch.from_numpy(tifffile.imread(result)).permute(2, 0, 1)
    assert torch.equal(written, whole)
    assert len(done) >= 3
    assert done == sorted(done)
    assert done[-1] == 1.0
    with tifffile.TiffFile(result) as file:
        assert file.pages.first.tile == (128, 128)
        assert not file.is_bigtiff
    assert sorted(path.name for path in result.parent.iterdir()) == [
        "large.tif",
        "large_compare.png",
    ]

    # PSNR and the comparison are those of an image in memory.
    monkeypatch.setattr(module, "open_rows", lambda *_: None)
    usual, _ = reconstruct_file(vae, source, tmp_path / "usual", SMALL)
    assert value == pytest.approx(usual, rel=1e-13)
    a, b = (
        np.asarray(Image.open(path), dtype=int)
        for path in (tmp_path / "out/deep/large_compare.png", tmp_path / "usual_compare.png")
    )
    assert a.shape == b.shape
    assert np.array_equal(a, b)


def test_a_large_tiff_of_real_values_is_reconstructed_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_CLASSIC", 4 * 3 * 203 * 605 - 1)
    vae = tiny()
    vae.pixel_range = DEEP
    source = tmp_path / "deep.tif"
    source.write_bytes(tiff(values("uint16", 3, (203, 605)), "rgb", tile=(64, 64)))
    whole, *_ = reconstruct(vae, image_to_tensor(read_picture(source, 3, DEEP)), SMALL)
    _, result = reconstruct_file(vae, source, tmp_path / "out", SMALL)
    assert result.name == "out.tif"
    with tifffile.TiffFile(result) as file:
        assert file.is_bigtiff
        assert file.pages.first.tile == (256, 256)
    written = tifffile.imread(result)
    assert written.dtype == np.float32
    assert np.array_equal(written, DEEP.real(whole).permute(1, 2, 0).numpy())


def of_equal_tiles(path: Path, height: int, width: int) -> None:
    """Write a file of at most a few MB with that many pixels."""
    tile = zlib.compress(bytes(256 * 256 * 3))
    tifffile.imwrite(
        path,
        iter([tile] * (-(-height // 256) * -(-width // 256))),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="rgb",
        compression="zlib",
    )


def test_what_is_too_large_is_refused_with_advice(tmp_path):
    """Files of another kind, and networks that see the whole image."""
    (tmp_path / "a.png").write_bytes(bomb(20_000, 20_000))
    with pytest.raises(ValueError, match=r"million pixels: .*'a\.png' 'a\.tif\[tile,"):
        reconstruct_file(tiny(), tmp_path / "a.png", tmp_path / "out", SMALL)
    of_equal_tiles(tmp_path / "a.tif", 20_000, 20_000)
    for vae, options in ((sd(), SMALL), (tiny(), replace(SMALL, seed=0))):
        with pytest.raises(ValueError, match=r"million.*LiteVAE alone"):
            reconstruct_file(vae, tmp_path / "a.tif", tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.tif"]


def test_a_large_tiff_that_breaks_off_leaves_nothing(tmp_path):
    """Bytes in the last tile are no packed pixels."""
    content = bytearray(tiff(smooth(600, 500), "rgb", tile=(64, 64), compression="zlib"))
    source = tmp_path / "large.tif"
    source.write_bytes(content)
    with tifffile.TiffFile(source) as file:
        start = file.pages.first.dataoffsets[-1]
        count = file.pages.first.databytecounts[-1]
    content[start : start + count] = bytes(count)
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"large\.tif: .*rows") as error:
        reconstruct_file(tiny(), source, tmp_path / "out", SMALL)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["large.tif"]


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_between_tiles_leaves_nothing(failure, tmp_path, monkeypatch):
    source = tmp_path / "large.tif"
    source.write_bytes(tiff(smooth(600, 500), "rgb", tile=(64, 64)))
    calls = []
    whole = module.decode_window

    def decode(*arguments):
        calls.append(0)
        if len(calls) == 5:
            raise failure("no more")
        return whole(*arguments)

    monkeypatch.setattr(module, "decode_window", decode)
    with pytest.raises(failure):
        reconstruct_file(tiny(), source, tmp_path / "out", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["large.tif"]


def test_non_finite_values_of_a_large_tiff_are_refused(tmp_path):
    vae = tiny()
    torch.nn.init.constant_(vae.decoder.conv_in.bias, torch.nan)
    source = tmp_path / "large.tif"
    source.write_bytes(tiff(smooth(600, 500), "rgb", tile=(64, 64)))
    with pytest.raises(ValueError, match=r"large\.tif: .* non-finite values"):
        reconstruct_file(vae, source, tmp_path / "out", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["large.tif"]


MEASURE = """
import json, sys
from pathlib import Path
import torch
from olvae.data.pixels.size_and_range import PixelRange
from olvae.export.reconstruction import ReconstructOptions, reconstruct_file
from tests.conftest import tiny

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

options = ReconstructOptions(torch.device("cpu"), memory=int(sys.argv[1]))
model = tiny()
model.pixel_range = PixelRange.from_node(json.loads(sys.argv[2]))
for path in sys.argv[3:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    reconstruct_file(model, Path(path), Path(path).parent / "out", options)
    print(resident("VmHWM") - before)
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peaks(memory: int, *paths: Path, pixel_range: object = None) -> list[int]:
    """Reconstruct TIFFs in one new process; the bytes that each adds to those in use before."""
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(memory),
        json.dumps(pixel_range),
        *map(str, paths),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@on_linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_height(tmp_path):
    """Ten times the pixels: in memory they would take 70 MB more, and as bytes 4."""
    paths = []
    for height in (1200, 1200, 12_000):
        path = tmp_path / f"{len(paths)}.tif"
        paths.append(path)
        path.write_bytes(tiff(smooth(height, 124), "rgb", tile=(64, 64)))
    _, small, large = peaks(2**21, *paths)
    assert large - small < 24e6


@on_linux
@pytest.mark.slow
def test_memory_is_not_kept_after_it_is_freed(tmp_path):
    """Beside 64 MiB of layers there are a row of the decoder's tiles, 15 MB, and the file's.

    With gaps that the C library keeps between windows, and three rows of tiles, it was 3.4 times.
    """
    of_equal_tiles(tmp_path / "wide.tif", 1024, 5000)
    memory = 2**26
    (peak,) = peaks(memory, tmp_path / "wide.tif")
    assert peak < 2.9 * memory


@on_linux
@pytest.mark.slow
def test_real_values_are_compared_a_few_rows_at_a_time(tmp_path):
    """A row of the result's tiles has 61 MB in float32; copies took 422 MB, now 335."""
    path = tmp_path / "wide.tif"
    array = np.zeros((256, 20_000, 3), np.uint16)
    tifffile.imwrite(path, array, compression="zlib", tile=(64, 64))
    (peak,) = peaks(2**23, path, pixel_range=[0, 9999])
    assert peak < 375e6
