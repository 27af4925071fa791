import pytest

from olvae.bench.encode import bench_encode
from olvae.data.mapped.dataset import HELD_OUT


def test_each_beside_the_plain_loop():
    rows = bench_encode([photograph.path for photograph in HELD_OUT[:2]], 16, 2, "cpu", threads=1, rounds=1)
    assert [row["name"] for row in rows] == [
        "diffusers, plain loop",
        "olvae encode, AutoencoderKL-32",
        "olvae encode, LiteVAE-S",
    ]
    assert rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["images_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"])
