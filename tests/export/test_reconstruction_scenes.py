"""A GeoTIFF comes back as one: its place, its missing values, its bands' names; and tiles of it."""

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image
from rasterio.transform import from_origin

from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.shards.tar_reading import Shard
from olvae.export.decoding import decode_shards
from olvae.export.encode_inputs import EncodeOptions, find_inputs
from olvae.export.encoding import EncodeJob
from olvae.export.reconstruction import ReconstructOptions, reconstruct_file
from tests.conftest import tiny, tiny_config
from tests.data.scenes.geotiffs import PLACE, UTM, geotiff, ground
from tests.export.rasters import jpeg_2000

BY_ROWS = ReconstructOptions(torch.device("cpu"), memory=2**21)
IN_MEMORY = ReconstructOptions(torch.device("cpu"), memory=2**28)
either = pytest.mark.parametrize("options", [BY_ROWS, IN_MEMORY], ids=["by rows", "in memory"])


def model(pixel_range: object, channels: int = 4):
    halves = tiny_config()["model"]["params"]
    halves["encoder_config"]["params"]["in_channels"] = channels
    halves["decoder_config"]["params"]["out_channels"] = channels
    vae = tiny(encoder_config=halves["encoder_config"], decoder_config=halves["decoder_config"])
    vae.pixel_range = PixelRange.from_node(pixel_range)
    return vae


def gappy() -> np.ndarray:
    """Values of 1 to 9999; 0 at a corner in all bands, and at some places in one."""
    array = ground(0, (197, 261))
    array[:70, :33] = 0
    array[100:103, 50:60, 2] = 0
    return array


@either
@pytest.mark.parametrize("tags", [{}, {"BIGTIFF": "YES", "interleave": "band"}])
def test_a_geotiff_comes_back_with_place_and_missing_values(options, tags, tmp_path):
    array = gappy()
    geotiff(tmp_path / "a.tif", array, nodata=0, tile=64, **tags)
    vae = model({"pairs": [0, 10_000], "outside": "clip"})
    value, result = reconstruct_file(vae, tmp_path / "a.tif", tmp_path / "out", options)
    assert result == tmp_path / "out.tif"
    with rasterio.open(result) as file:
        assert (file.crs, file.transform, file.nodata) == (UTM, PLACE, 0)
        assert file.descriptions == tuple(f"band {number}" for number in range(4))
        assert rasterio.enums.ColorInterp.alpha not in file.colorinterp
        found = np.moveaxis(file.read(), 0, -1)
        assert np.array_equal(np.moveaxis(file.read_masks(), 0, -1) == 0, array == 0)
    # The PSNR is over the values that are there.
    there = array != 0
    error = np.mean((found[there].astype(float) - array[there]) ** 2)
    assert value == pytest.approx(10 * np.log10(10_000**2 / error), abs=1e-4)
    assert Image.open(tmp_path / "out_compare.png").size[0] > 700


@either
def test_values_that_the_range_or_nan_declares_missing_come_back(options, tmp_path):
    array = gappy().astype(np.float32)
    array[array == 0] = -9999
    array[150, 200] = np.nan
    geotiff(tmp_path / "a.tif", array, tile=64)
    vae = model({"pairs": [0, 10_000], "nodata": -9999})
    _, result = reconstruct_file(vae, tmp_path / "a.tif", tmp_path / "out", options)
    with rasterio.open(result) as file:
        assert file.nodata == -9999
        found = np.moveaxis(file.read(), 0, -1)
    assert np.array_equal(found == -9999, array == -9999)
    assert np.array_equal(np.isnan(found), np.isnan(array))


@either
def test_values_of_8_bits_come_back_as_a_geotiff(options, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (197, 261, 3)).astype(np.uint8)
    array[:50, :50] = 0
    geotiff(tmp_path / "a.tif", array, nodata=0, tile=64, photometric="rgb", compress="deflate")
    _, result = reconstruct_file(tiny(), tmp_path / "a.tif", tmp_path / "out", options)
    with rasterio.open(result) as file:
        assert (file.crs, file.transform, file.dtypes[0], file.nodata) == (UTM, PLACE, "uint8", 0)
        assert not file.read(window=((0, 50), (0, 50))).any()


@either
def test_a_jpeg_2000_with_coordinates_becomes_a_geotiff(options, tmp_path):
    place = from_origin(500_000, 200_000, 20, 20)
    jpeg_2000(tmp_path / "a.jp2", gappy(), crs=UTM, transform=place)
    vae = model([0, 10_000])
    _, result = reconstruct_file(vae, tmp_path / "a.jp2", tmp_path / "out", options)
    with rasterio.open(result) as file:
        assert (file.crs, file.transform, result.suffix) == (UTM, place, ".tif")


@pytest.mark.parametrize(("bands", "shape"), [(1, (197, 261)), (2, (197, 261, 2))])
def test_one_or_two_bands_are_written_by_rows(bands, shape, tmp_path):
    """One as grey, which it was not before."""
    geotiff(tmp_path / "a.tif", gappy()[..., :bands], nodata=0, tile=64)
    vae = model({"pairs": [0, 10_000], "outside": "clip"}, bands)
    pair = [
        tifffile.imread(reconstruct_file(vae, tmp_path / "a.tif", tmp_path / name, options)[1])
        for name, options in (("rows", replace(BY_ROWS, memory=2**20)), ("whole", IN_MEMORY))
    ]
    assert pair[0].shape == shape
    assert np.abs(pair[0] - pair[1]).max() <= 0.05  # of 10,000: rounding


def test_a_value_that_is_there_is_never_the_missing_one(tmp_path):
    """A reconstruction at the low end, 0, would be read as missing."""
    array = np.ones((64, 64, 4), np.uint16)
    array[0, 0] = 0
    geotiff(tmp_path / "a.tif", array, nodata=0)
    vae = model({"pairs": [0, 10_000], "outside": "clip"})
    vae.decode_tiled = lambda *_: torch.full((1, 4, 64, 64), -1.0)
    _, result = reconstruct_file(vae, tmp_path / "a.tif", tmp_path / "out", IN_MEMORY)
    with rasterio.open(result) as file:
        assert (file.read_masks() == 0).sum() == 4
        assert file.read()[:, 1:].max() <= 0.011


def test_a_scene_without_any_value_is_refused(tmp_path):
    geotiff(tmp_path / "a.tif", np.zeros((64, 64, 4), np.uint16), nodata=0)
    with pytest.raises(ValueError, match=r"a\.tif: all "):
        reconstruct_file(model([0, 10_000]), tmp_path / "a.tif", tmp_path / "out", IN_MEMORY)
    assert not list(tmp_path.glob("out*"))


def test_a_plain_tiff_stays_plain_and_refuses_missing_values(tmp_path):
    array = ground(0, (64, 64)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig")
    _, result = reconstruct_file(model([0, 10_000]), tmp_path / "a.tif", tmp_path / "b", IN_MEMORY)
    with tifffile.TiffFile(result) as file:
        assert not {33550, 34735, 42112, 42113} & {tag.code for tag in file.pages.first.tags}
    array[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match="nan at row 3, column 4"):
        reconstruct_file(model([0, 10_000]), tmp_path / "a.tif", tmp_path / "c", IN_MEMORY)


def test_decoded_tiles_are_where_they_were(tmp_path):
    geotiff(tmp_path / "scenes" / "a.tif", gappy(), nodata=0)
    vae = model({"pairs": [0, 10_000], "outside": "clip"})

    def encoded(size: int) -> list[Shard]:
        src = f"scenes:{tmp_path / 'scenes'},tile=64"
        # As after a training on blocks, which other scenes do not have.
        inputs = find_inputs(src, 4, 50, False, vae.pixel_range, size, trained_by="blocks")
        assert inputs.transform.size == 64  # of tiles, if no size is given
        folder = tmp_path / f"latents-{size}"
        job = EncodeJob(vae, inputs, EncodeOptions(size), folder, {"target": "tiny"})
        job.run(batch_size=4, workers=0)
        job.finish()
        return [Shard(str(path)) for path in sorted(folder.glob("*.tar"))]

    shards = encoded(64)
    images, unreadable = decode_shards(vae, shards, tmp_path / "tiles", "tif")
    # Of 4 x 5 tiles, 2 miss values.
    assert (images, unreadable) == (18, [])
    with rasterio.open(tmp_path / "tiles" / "a.tif" / "00128-00064.tif") as file:
        assert file.crs == UTM
        assert file.transform == from_origin(400_640, 5_098_720, 10, 10)
        assert (file.nodata, file.shape, file.count) == (None, (64, 64), 4)

    # Resized ones have other pixels.
    decode_shards(vae, encoded(32), tmp_path / "resized", "tif")
    with tifffile.TiffFile(next((tmp_path / "resized" / "a.tif").glob("*.tif"))) as file:
        assert 34735 not in file.pages.first.tags
