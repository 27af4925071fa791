import pytest
from PIL import Image

from olvae.bench import scaling


@pytest.mark.slow
def test_time_and_memory_per_pixel(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "default_memory", lambda _: 24 * 2**20)
    rows = scaling.bench_scaling([32, 64, 512], [1, 2], "cpu", rounds=1)
    names = list(scaling.NETWORKS["cpu"])
    grid = [(32, 1), (32, 2), (64, 1), (64, 2)]  # 512 pixels don't fit
    assert [(row["name"], row["size"], row["batch_size"]) for row in rows] == [(n, *key) for n in names for key in grid]
    for row in rows:
        pixels = row["size"] ** 2 * row["batch_size"]
        assert row["ns_per_pixel"] == pytest.approx(1e6 * row["median_ms"] / pixels)
        assert row["bytes_per_pixel"] == row["peak_memory_bytes"] / pixels
        first = next(other for other in rows if other["name"] == row["name"])
        assert row["relative"] == pytest.approx(row["ns_per_pixel"] / first["ns_per_pixel"])
    for name in names:  # memory is linear in the pixels, but for the smallest, beside which weights count
        each = [row["bytes_per_pixel"] for row in rows if row["name"] == name][1:]
        assert max(each) < 1.1 * min(each)
    scaling.plot_scaling(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"
