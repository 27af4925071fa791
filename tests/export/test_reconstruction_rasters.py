from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from olvae.data.pixels.size_and_range import PixelRange
from olvae.export.reconstruction import ReconstructOptions, plan_outputs, reconstruct_file
from tests.conftest import tiny
from tests.data.pixels.files import tiff, values
from tests.export.rasters import jpeg_2000, zarr
from tests.export.test_raster_rows import planes, truncated

SMALL = ReconstructOptions(torch.device("cpu"), memory=2**21)
LARGE = replace(SMALL, memory=2**28)
DEEP = PixelRange.from_node([-40_000, 70_000])


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["by rows", "in memory"])
@pytest.mark.parametrize("kind", ["jp2", "zarr"])
@pytest.mark.parametrize("pixel_range", [None, DEEP], ids=["8 bits", "16 bits"])
def test_the_result_is_the_same_pictures_as_tiff(kind, pixel_range, options, tmp_path):
    """Bit for bit: the reconstruction, the comparison and the PSNR."""
    vae = tiny()
    array = values("uint16" if pixel_range else "uint8", 3, (131, 261))
    if pixel_range:
        vae.pixel_range = pixel_range
    (tmp_path / "a.tif").write_bytes(tiff(array, "rgb", tile=(64, 64)))
    source = tmp_path / f"a.{kind}"
    if kind == "jp2":
        jpeg_2000(source, array)
    else:
        zarr(source, planes(array), (3, 64, 64))

    assert plan_outputs([source], tmp_path / "out") == {source: tmp_path / "out/a"}
    value, result = reconstruct_file(vae, source, tmp_path / "out/a", options)
    usual, expected = reconstruct_file(vae, tmp_path / "a.tif", tmp_path / "usual/a", options)
    assert value == usual
    if options is SMALL:
        assert result.suffix == expected.suffix == ".tif"
    read = {".png": Image.open, ".npy": np.load, ".tif": tifffile.imread}
    assert np.array_equal(*(np.asarray(read[path.suffix](path)) for path in (result, expected)))
    compared = (folder / "a_compare.png" for folder in (tmp_path / "out", tmp_path / "usual"))
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in compared))


def test_what_can_not_be_decoded_by_rows_is_read_in_memory(tmp_path):
    jpeg_2000(tmp_path / "a.jp2", values("uint8", 3, (131, 261)))
    sampled = replace(SMALL, seed=0)
    _, result = reconstruct_file(tiny(), tmp_path / "a.jp2", tmp_path / "out", sampled)
    assert result.suffix == ".png"
    assert Image.open(result).size == (261, 131)


@pytest.mark.parametrize("options", [SMALL, LARGE])
def test_a_truncated_jpeg_2000_leaves_nothing(options, tmp_path):
    truncated(tmp_path / "a.jp2")
    with pytest.raises(ValueError, match=r"a\.jp2: .*rows") as error:
        reconstruct_file(tiny(), tmp_path / "a.jp2", tmp_path / "out/a", options)
    assert "\n" not in str(error.value)
    assert "vips" not in str(error.value)
    assert not (tmp_path / "out").exists()
