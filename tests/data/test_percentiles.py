import numpy as np
import pytest
import yaml

from olvae.data.packing import PackOptions, pack
from olvae.data.percentiles import measure
from olvae.data.pixels.size_and_range import PixelRange
from tests.data.pixels.files import npy, tiff, values


def test_percentiles_per_channel_as_numpy_has_them(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    arrays = [(values("uint16", 2, seed=n) // np.array([1, 8])).astype(np.uint16) for n in range(5)]
    for number, array in enumerate(arrays):
        (root / f"{number}.npy").write_bytes(npy(array))
    found = measure(str(root))
    together = np.stack(arrays).reshape(-1, 2)
    np.testing.assert_allclose(found.percentiles[:, 1:4], np.percentile(together, [0.1, 1, 50], axis=0).T)
    assert (found.images, found.kinds, found.missing) == (5, {"uint16": 5}, 0.0)
    stated = PixelRange.from_node(yaml.safe_load(found.line())["range"])
    assert stated.outside == "clip"
    np.testing.assert_allclose(stated.high, np.percentile(together, 99.9, axis=0), rtol=1e-3)
    pack(str(root), tmp_path / "shards", PackOptions(channels=2))
    np.testing.assert_array_equal(measure(str(tmp_path / "shards")).percentiles, found.percentiles)


def test_a_files_own_missing_value_is_no_value_and_is_not_resized(tmp_path):
    array = np.full((40, 40), 7, dtype=np.float32)
    array[:4], array[4] = -9999, 9
    tags = [(42113, "s", 0, "-9999", True)]
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.tif").write_bytes(tiff(array, extratags=tags))
    found = measure(str(tmp_path / "root"))
    assert (found.percentiles[0, [0, -1]].tolist(), found.missing) == ([7, 9], pytest.approx(0.1))
    assert yaml.safe_load(found.line())["range"] == {"pairs": [7, 9], "outside": "clip", "nodata": -9999}
    assert pack(str(tmp_path / "root"), tmp_path / "whole", PackOptions(channels=1)).index.images == 1
    with pytest.raises(ValueError, match="160 values are missing, which a resize would mix"):
        pack(str(tmp_path / "root"), tmp_path / "smaller", PackOptions(channels=1, resize=20))
