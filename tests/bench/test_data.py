from olvae.bench.data import bench_data
from tests.data.images import write_shards


def test_each_source_and_number_of_workers_beside_the_floor(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (8, 8))
    folder, shards = str(image_folder), str(tmp_path / "shards")
    rows = bench_data([folder, shards], 16, 4, [0, 2], 0.05)
    assert [(row["source"], row["workers"]) for row in rows] == [
        ("floor", 1),
        *((name, count) for name in (folder, shards) for count in (0, 2)),
    ]
    floor = rows[0]["images_per_s"]
    for row in rows:
        assert row["images_per_s"] > 0
        assert abs(row["of_floor"] - row["images_per_s"] / floor / max(1, row["workers"])) < 1e-9
