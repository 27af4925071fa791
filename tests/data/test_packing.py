"""Packing: the same images, once each, and the same bytes, whoever packs and despite stops."""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import resource
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from olvae.config import ConfigError
from olvae.data.packing import PackOptions, pack, shard_positions, usual_shard_size
from olvae.data.read_errors import TooManyUnreadableError
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.pool import run_in_processes
from tests.data.images import members, noise, saved, write_photos
from tests.data.scenes.geotiffs import geotiff, ground
from tests.soak.killed import killed_before

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def photos(tmp_path):
    """Thirty files, in JPEG, PNG and WebP."""
    names = [f"class{i % 3}/a photo.{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(30)]
    return write_photos(tmp_path / "photos", names)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_packed_shards_hold_each_file_as_it_is_with_counts_and_checksums(photos, tmp_path):
    pack(str(photos), tmp_path / "out", PackOptions(shard_size=8), workers=2)
    packed = members(tmp_path / "out")
    files = {str(path.relative_to(photos)): path for path in photos.rglob("*") if path.is_file()}
    assert {name: data for name, (data, _) in packed.items()} == {
        n: p.read_bytes() for n, p in files.items()
    }
    for name, (_, details) in packed.items():
        assert (details["width"], details["height"]) == (24, 20)
        assert details["file"].split(".", 1)[1] == name.rsplit(".", 1)[1]
    entries = [
        entry
        for i in range(4)
        for entry in read_shard(Shard(str(tmp_path / "out" / f"00000{i}.tar")))
    ]
    assert [entry.key.split("/")[1] for entry in entries] == [f"{i:08d}" for i in range(30)]
    names = [json.loads(entry.files["json"])["name"] for entry in entries]
    assert names != sorted(names)  # shuffled
    source = WebDatasetSource(str(tmp_path / "out"), 16, 2)
    assert (source.images, len(source.train)) == (30, 3)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["images"] == 30
    assert [shard["images"] for shard in index["shards"].values()] == [7, 8, 7, 8]
    for name, shard in index["shards"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert index["bytes"] == sum(shard["bytes"] for shard in index["shards"].values())
    assert index["packed"]["shard_size"] == 8
    assert sorted(shards_of(tmp_path / "out")) == [
        *sorted(index["shards"]),
        "index.json",
        "index.offsets",
    ]


@pytest.mark.usefixtures("processes")
def test_packs_have_the_same_bytes_with_any_number_of_workers(photos, tmp_path):
    for workers in (1, 2):
        pack(str(photos), tmp_path / f"out{workers}", PackOptions(shard_size=7), workers)
    first, second = shards_of(tmp_path / "out1"), shards_of(tmp_path / "out2")
    assert first == second
    assert len(first) == 7
    with tarfile.open(tmp_path / "out1" / "000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
                0,
                0,
                0,
                "",
                "",
            )
            assert member.mode == 0o644


def test_the_order_of_a_pack_is_its_seeds(photos, tmp_path):
    a, b, unshuffled = orders = [[], [], []]
    for order, seed in zip(orders, (0, 1, None), strict=True):
        pack(str(photos), tmp_path / str(seed), PackOptions(shard_size=100, seed=seed))
        order += members(tmp_path / str(seed))
    assert unshuffled == sorted(unshuffled) == sorted(a) == sorted(b)
    assert a != b != unshuffled != a


@pytest.mark.usefixtures("processes")
def test_a_killed_pack_leaves_nothing_half_written_once_it_is_packed_again(photos, tmp_path):
    pack(str(photos), tmp_path / "whole", PackOptions(shard_size=8))
    out = tmp_path / "out"
    for name in (".packing/plan.json", ".packing/000001.json", "index.json"):
        killed_before(out, name, lambda: pack(str(photos), out, PackOptions(shard_size=8)))
    pack(str(photos), out, PackOptions(shard_size=8))
    assert shards_of(out) == shards_of(tmp_path / "whole")


def test_packing_processes_end_with_the_one_that_began_them(tmp_path):
    def sleep(task: int, _: object) -> None:
        (tmp_path / f"{task}").write_text(str(os.getpid()))
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=lambda: list(run_in_processes(sleep, [0, 1], 2, lambda _: None))
    )
    process.start()
    while len(pids := [path.read_text() for path in tmp_path.iterdir()]) < 2 or not all(pids):
        assert process.is_alive()
    process.kill()
    process.join()
    end = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_two_packs_at_once_in_the_same_folder_are_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("olvae.data.shards.write.LOCK_S", 0.1)
    state = tmp_path / "out" / ".packing"
    state.mkdir(parents=True)
    with (state / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another `olvae data pack`"):
            pack(str(photos), tmp_path / "out", PackOptions())
    assert pack(str(photos), tmp_path / "out", PackOptions()).index.images == 30


def test_a_finished_pack_is_left_as_it_is(photos, tmp_path):
    out = tmp_path / "out"
    pack(str(photos), out, PackOptions(shard_size=8))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack(str(photos), out, PackOptions(shard_size=8)).found == 4
    with pytest.raises(ConfigError, match=r"out: .*images or options"):
        pack(str(photos), out, PackOptions(shard_size=9))
    os.utime(next(photos.rglob("*.png")), (1, 1))
    with pytest.raises(ConfigError, match=r"out: .*images or options"):
        pack(str(photos), out, PackOptions(shard_size=8))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_finished_pack_that_lost_or_changed_a_shard_is_no_success(photos, tmp_path):
    out = tmp_path / "out"
    pack(str(photos), out, PackOptions(shard_size=8))
    for damage in (lambda shard: shard.write_bytes(shard.read_bytes()[:-512]), Path.unlink):
        damage(out / "000002.tar")
        with pytest.raises(ConfigError, match=r"out: 000002\.tar is missing"):
            pack(str(photos), out, PackOptions(shard_size=8))


def test_an_unfinished_pack_of_a_changed_source_is_no_continuation(photos, tmp_path):
    out = tmp_path / "out"
    (photos / "bad.png").touch()
    with pytest.raises(TooManyUnreadableError):
        pack(str(photos), out, PackOptions(shard_size=8))
    (photos / "bad.png").unlink()
    with pytest.raises(ConfigError, match="other images"):
        pack(str(photos), out, PackOptions(shard_size=8))
    with pytest.raises(ConfigError, match=r"begun with shard_size 8 \(now 9\)"):
        pack(str(photos), out, PackOptions(shard_size=9))


def test_pack_refuses_a_folder_inside_the_images_or_with_other_files(photos, tmp_path):
    with pytest.raises(ConfigError, match="is inside"):
        pack(str(photos), photos / "shards", PackOptions())
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="other files"):
        pack(str(photos), other, PackOptions())
    with pytest.raises(OSError, match=r"thesis\.tex: Not a directory"):
        pack(str(photos), other / "thesis.tex", PackOptions())
    assert list(shards_of(other)) == ["thesis.tex"]
    pack(str(photos), tmp_path / "shards", PackOptions(shard_size=8))
    with pytest.raises(ConfigError, match="shards already"):
        pack(str(tmp_path / "shards"), tmp_path / "again", PackOptions())
    assert not (tmp_path / "again").exists()


@pytest.fixture
def awkward(photos):
    """Beside the photographs, files that are none, and names that are hard to write."""
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("not a picture")
    for name, kind in (("cut.png", "PNG"), ("cut.jpg", "JPEG")):
        whole = saved(noise(50, (200, 200)), kind)
        (photos / name).write_bytes(whole[: len(whole) // 2])
    (photos / "folder.jpg").mkdir()
    (photos / "nowhere.jpg").symlink_to(photos / "missing.jpg")
    for i, name in enumerate(
        ("two  spaces.png", "dots.in.it.png", "žluťoučký 猫.png", "new\nline.png", "[bold]x.png")
    ):
        noise(60 + i).save(photos / name)
    noise(70).save(os.fsencode(photos) + b"/latin\xe9.png")
    return photos


@pytest.mark.usefixtures("processes")
def test_pack_leaves_out_and_lists_the_unreadable(awkward, tmp_path):
    with pytest.raises(TooManyUnreadableError, match=r"^4 of 40 .* 0\.05: .*\(") as told:
        pack(str(awkward), tmp_path / "out", PackOptions(shard_size=10), 2, max_unreadable=0.05)
    assert all(name in str(told.value) for name in ("cut.jpg", "cut.png", "empty.jpg", "text.jpg"))
    assert not (tmp_path / "out" / "index.json").exists()
    packed = pack(str(awkward), tmp_path / "out", PackOptions(shard_size=10), 2, max_unreadable=0.2)
    assert packed.found == 4
    bad = {skipped["name"]: skipped["reason"] for skipped in packed.index.unreadable}
    assert sorted(bad) == ["cut.jpg", "cut.png", "empty.jpg", "text.jpg"]
    assert bad["empty.jpg"] == "the file is empty"
    assert packed.index.images == 36
    names = members(tmp_path / "out")
    assert len(names) == 36
    for name in ("two  spaces.png", "dots.in.it.png", "žluťoučký 猫.png", "new\nline.png"):
        assert names[name][0] == (awkward / name).read_bytes()
    assert names["latin\\xe9.png"][0] == (awkward / "latin\udce9.png").read_bytes()
    listed = json.loads((tmp_path / "out" / "index.json").read_text())["unreadable"]
    assert {skipped["name"] for skipped in listed} == set(bad)


def test_pack_skips_strips_longer_than_a_format_can_store(photos, tmp_path):
    Image.new("RGB", (170, 17_000)).save(photos / "strip.png")
    options = PackOptions(resize=165, format="webp")
    (skipped,) = pack(str(photos), tmp_path / "out", options, max_unreadable=0.1).index.unreadable
    assert skipped["name"] == "strip.png"
    assert "165x16500 pixels can't be stored as webp: " in skipped["reason"]
    assert skipped["reason"].endswith(": choose `format` png")
    assert not pack(
        str(photos), tmp_path / "png", PackOptions(resize=165, format="png")
    ).index.unreadable


def test_tiles_with_missing_values_are_not_packed_because_shards_lose_them(tmp_path):
    array = ground(0, (64, 64))
    array[:4, :4] = 0
    scenes = f"scenes:{geotiff(tmp_path / 'a.tif', array, nodata=0)},tile=32"
    options = PackOptions(channels=4)
    with pytest.raises(ConfigError, match=r"max_nodata 0\.1"):
        pack(f"{scenes},max_nodata=0.1", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    pack(scenes, tmp_path / "out", options)
    assert len(members(tmp_path / "out")) == 3  # the complete ones


def test_a_shard_without_any_readable_image_is_not_written(root, tmp_path):
    (root / "a.png").touch()
    noise(0).save(root / "b.png")
    packed = pack(str(root), tmp_path / "out", PackOptions(shard_size=1, seed=None), 1, 1.0)
    assert list(packed.index.shards) == ["000001.tar"]
    assert sorted(shards_of(tmp_path / "out")) == ["000001.tar", "index.json", "index.offsets"]
    (root / "b.png").write_text("nor this")
    with pytest.raises(ValueError, match=r"none of .*2 .*a\.png"):
        pack(str(root), tmp_path / "new" / "none", PackOptions(), 1, 1.0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "none").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none of .*2"):
        pack(str(root), tmp_path / "new" / "none", PackOptions(), 1, 0.01)
    assert not list((tmp_path / "new" / "none").iterdir())  # a folder that was there before stays


def pack_on_a_small_disk(answer, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, resource.RLIM_INFINITY))
    try:
        pack(*arguments)
    except OSError as error:
        answer.send(str(error))


@pytest.mark.usefixtures("processes")
def test_a_full_disk_while_packing_leaves_nothing_half_written(root, tmp_path):
    for i in range(4):
        noise(i, (30, 30)).save(root / f"{i}.png")
    noise(4, (200, 200)).save(root / "4.png")  # 120 kB, the last shard
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    options = PackOptions(shard_size=1, seed=None)
    process = context.Process(target=pack_on_a_small_disk, args=(there, str(root), out, options, 2))
    process.start()
    assert here.poll(60)
    assert (
        here.recv()
        == f"{out}: File too large; finished shards stay, and the same command continues from there"
    )
    process.join()
    left = {path.name for path in out.rglob("*.tar")}
    assert left <= {f"00000{i}.tar" for i in range(4)}
    assert pack(str(root), out, options).index.images == 5


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_pack_turns_other_formats_into_png_without_loss(root, tmp_path):
    for extension in ("bmp", "tiff", "ppm"):
        noise(1).save(root / f"a.{extension}")
    sideways = Image.Exif()
    sideways[274] = 6
    noise(1).save(root / "turned.tiff", exif=sideways)
    noise(1).save(root / "turned.jpg", exif=sideways)
    noise(1).save(root / "really a png.jpg", "PNG")
    np.save(root / "array.npy", np.asarray(noise(2)))
    pack(str(root), tmp_path / "out", PackOptions())
    packed = members(tmp_path / "out")
    for name in ("a.bmp", "a.tiff", "a.ppm"):
        data, details = packed[name]
        assert details["file"].endswith(".png")
        assert np.array_equal(pixels(data), np.asarray(noise(1)))
    assert np.array_equal(pixels(packed["turned.tiff"][0]), np.rot90(np.asarray(noise(1)), -1))
    for name in ("turned.tiff", "turned.jpg"):
        assert (packed[name][1]["width"], packed[name][1]["height"]) == (20, 24)
    assert packed["turned.jpg"][0] == (root / "turned.jpg").read_bytes()
    assert packed["really a png.jpg"][1]["file"].endswith(".png")
    assert packed["array.npy"][0] == (root / "array.npy").read_bytes()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_resize_of_a_pack_is_bicubic_and_never_enlarges(root, tmp_path, extension):
    big = noise(1, (90, 60)).resize((180, 120), Image.Resampling.BICUBIC)
    big.save(root / "big.png")
    noise(2, (100, 48)).save(root / "just.jpg")
    noise(3, (20, 30)).save(root / "small.bmp")
    pack(str(root), tmp_path / "out", PackOptions(resize=48, format=extension, quality=90))
    packed = members(tmp_path / "out")
    data, details = packed["big.png"]
    assert (details["width"], details["height"], details["file"][9:]) == (72, 48, extension)
    small = big.resize((72, 48), Image.Resampling.BICUBIC)
    if extension == "png":
        assert np.array_equal(pixels(data), np.asarray(small))
    else:
        stream = io.BytesIO()
        chroma = {"subsampling": 0} if extension == "jpg" else {}
        small.save(stream, "JPEG" if extension == "jpg" else "WEBP", quality=90, **chroma)
        assert np.array_equal(pixels(data), pixels(stream.getvalue()))
    assert packed["just.jpg"][0] == (root / "just.jpg").read_bytes()
    assert np.array_equal(pixels(packed["small.bmp"][0]), np.asarray(noise(3, (20, 30))))
    assert packed["small.bmp"][1]["file"].endswith(".png")


def test_values_that_are_missing_are_packed_but_not_mixed_into_others(root, tmp_path):
    array = np.random.default_rng(0).random((12, 16, 2)).astype(np.float32)
    array[3, 4:7, 1] = np.nan
    np.save(root / "a.npy", array)
    with pytest.raises(ValueError, match="3 values"):
        pack(str(root), tmp_path / "smaller", PackOptions(channels=2, resize=8))
    pack(str(root), tmp_path / "same", PackOptions(channels=2, resize=12))
    ((content, _),) = members(tmp_path / "same").values()
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), array)


def test_pack_resizes_arrays_of_other_channels_as_arrays(root, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 5), dtype=np.uint8)
    np.save(root / "a.npy", array)
    pack(str(root), tmp_path / "out", PackOptions(resize=20, channels=5))
    small = np.load(io.BytesIO(members(tmp_path / "out")["a.npy"][0]))
    assert small.shape == (20, 30, 5)
    for c in range(5):
        band = Image.fromarray(np.ascontiguousarray(array[..., c])).resize(
            (30, 20), Image.Resampling.BICUBIC
        )
        assert np.array_equal(small[..., c], np.asarray(band))


def test_pack_of_a_torchvision_data_set_has_its_classes(tmp_path):
    from torchvision.datasets import FakeData

    src = "torchvision:FakeData,size=9,num_classes=4"
    pack(src, tmp_path / "out", PackOptions(shard_size=4), 2)
    packed = members(tmp_path / "out")
    dataset = FakeData(size=9, num_classes=4)
    assert sorted(packed) == [f"{i:08d}" for i in range(9)]
    for name, (data, details) in packed.items():
        image, label = dataset[int(name)]
        assert np.array_equal(pixels(data), np.asarray(image))
        assert (details["label"], details["cls"]) == (label, str(label))


def test_pack_options_refuse_formats_that_cannot_be_written():
    with pytest.raises(ConfigError, match=r"`format` bmp: .*jpg, png, webp"):
        PackOptions(format="bmp")
    with pytest.raises(ConfigError, match=r"jpg .*channel"):
        PackOptions(resize=8, channels=4)


def test_few_images_still_make_twenty_shards():
    for images, size in ((1, 1), (20, 1), (21, 2), (250, 13), (20_000, 1000), (10**6, 1000)):
        assert usual_shard_size(images) == size
        assert len(shard_positions(images, size)) <= max(20, -(-images // 1000))
