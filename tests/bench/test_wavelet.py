import pytest

from olvae.bench.wavelet import bench_dwt


@pytest.mark.parametrize(("wavelet", "count"), [("haar", 3), ("db2", 2)])
def test_all_compute_the_same(wavelet, count):
    rows = bench_dwt(2, 32, wavelet, "cpu", rounds=1)
    assert len(rows) == count
    assert all(row["max_difference"] < 1e-5 for row in rows)
    assert rows[0]["ratio"] == 1.0
    assert all(row["images_per_s"] > 0 for row in rows)
