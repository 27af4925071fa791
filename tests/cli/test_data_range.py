"""``olvae data range``, and the range that ``olvae data check`` takes."""

import numpy as np
import pytest
import yaml

from tests.data.pixels.files import npy, png, tiff, values


def test_data_range_counts_missing_values(tmp_path, olvae):
    array = values("float32", 1)
    array[:4] = np.nan
    (tmp_path / "a.tif").write_bytes(tiff(array[..., 0]))
    code, out, err = olvae("data", "range", tmp_path)
    assert code == 0
    assert "20.00% of" in err
    pair = yaml.safe_load(out)["range"]["pairs"]
    assert pair == pytest.approx([np.nanmin(array), np.nanmax(array)], rel=1e-2, abs=2)


def test_data_range_refuses_what_can_not_be_measured(tmp_path, olvae):
    (tmp_path / "a.png").write_bytes(png(values("uint8")))
    assert "8 bits" in olvae("data", "range", tmp_path)[2]
    (tmp_path / "b.npy").write_bytes(npy(values("uint8", 2)))
    code, out, err = olvae("data", "range", tmp_path)
    assert (code, out) == (1, "")
    assert "0 to 255" in err.splitlines()[-1]
    (tmp_path / "b.npy").write_bytes(npy(values("uint16", 2)))
    (tmp_path / "c.npy").write_bytes(npy(values("uint16", 5)))
    code, out, err = olvae("data", "range", tmp_path)
    assert (code, out) == (1, "")
    assert err.strip().endswith("c.npy: 5 channels, but those before it have 2")
    (tmp_path / "b.npy").write_bytes(npy(np.full((20, 24, 2), np.inf, dtype=np.float32)))
    (tmp_path / "c.npy").unlink()
    assert "channel 0 " in olvae("data", "range", tmp_path)[2]


def test_data_check_takes_a_range_and_finds_mixed_kinds(tmp_path, olvae):
    for name, kind in (("a", "uint16"), ("b", "float32"), ("c", "uint16")):
        (tmp_path / f"{name}.npy").write_bytes(npy(values(kind, 2)))
    code, _, err = olvae(
        "data", "check", tmp_path, "--size", 16, "--channels", 2, "--range", "[0, 65535]"
    )
    assert code == 1
    assert "2 array uint16, 1 array float32" in " ".join(err.split())
    assert olvae("data", "check", tmp_path, "--channels", 2, "--range", "[5, 1]")[0] == 2
    code, _, err = olvae("data", "check", tmp_path, "--channels", 2, "--range", "[0, 65535")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: --range: expected YAML, as in [0, 65535], got [0, 65535",
    )
