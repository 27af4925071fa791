"""Packing part by part: the order, the plan's hash, what is stored of each image, the limits."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from olvae.config import ConfigError
from olvae.data import packing
from olvae.data.dataset import ImageDataset
from olvae.data.hub import Items
from olvae.data.image import Photo, array_to_picture, resize_shorter_side
from olvae.data.packing import (
    PackOptions,
    _check_unreadable,
    _encode,
    _Packer,
    hash_of,
    pack,
)
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import AS_STORED
from olvae.data.read_errors import ReadError, TooManyUnreadableError, UnreadableImageError
from olvae.data.shards.index import ShardRecord
from olvae.data.shards.write import FinishedShard
from tests.data.images import noise, saved, write_photos
from tests.data.pixels.files import npy, npz, tiff
from tests.data.test_hub_items import Listed

pytestmark = pytest.mark.usefixtures("one_process")


class Named(ImageDataset):
    """Pictures by name; an empty one can't be read."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Photo:
        return Photo(saved(noise(index), "PNG") if self.names[index] else b"", "it")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"resize": 8, "channels": 4, "format": "png"}, {"resize": 8, "channels": 4}),
        ({"resize": 8, "channels": 3}, {"format": "bmp"}),
        ({"resize": None, "channels": 4}, {"hold_out_by": "no group"}),
    ],
)
def test_options_that_fit_each_other(right, wrong):
    PackOptions(**right)
    with pytest.raises((ConfigError, ValueError), match=r"`(format|hold_out_by)`"):
        PackOptions(**wrong)


def test_a_plan_has_a_grouping_where_files_are_not_their_own():
    assert "hold_out_by" not in PackOptions().as_dict()
    assert PackOptions(hold_out_by="folder").as_dict()["hold_out_by"] == "folder"


def test_the_hash_is_of_options_and_states_and_of_a_data_sets_name(tmp_path):
    write_photos(tmp_path, ["a.png", "b.png"])
    options = PackOptions(shard_size=3)
    stated = json.dumps(dict(sorted(options.as_dict().items())))
    files = Files([tmp_path / "a.png", tmp_path / "b.png"])
    for images, src in ((files, ""), (Named("a", "b"), "SRC")):
        states = "".join(f"{images.state(index)}\0" for index in range(2))
        expected = hashlib.sha256(f"{stated}{src}{states}".encode()).hexdigest()
        assert hash_of("SRC", images, options) == expected


def test_a_share_of_the_images_may_be_unreadable():
    lost = [{"name": f"{number}.png", "reason": "bad"} for number in range(2)]
    _check_unreadable("SRC", lost, 200, 0.01)
    with pytest.raises(TooManyUnreadableError, match=r"^2 of 199 images .* 0\.01: 0\.png \(bad\)"):
        _check_unreadable("SRC", lost, 199, 0.01)
    with pytest.raises(ValueError, match="SRC: none of its 2 images can be read"):
        _check_unreadable("SRC", lost, 2, 1.0)


GROUPED = [f"{folder}/{number}" for folder in "abcde" for number in range(3)]


@pytest.mark.parametrize("seed", [None, 3])
def test_the_order_is_a_permutation_of_images_or_of_whole_groups(seed):
    """By numpy's generator; groups fill the shards, whose images are mixed then."""
    images = Named(*GROUPED)
    alone = _Packer(images, PackOptions(7, seed), None)
    numbers = np.arange(15) if seed is None else np.random.default_rng(seed).permutation(15)
    assert alone.order.tolist() == numbers.tolist()
    assert (alone.positions, alone.grouped) == ([range(5), range(5, 10), range(10, 15)], False)

    together = _Packer(images, PackOptions(7, seed, hold_out_by="folder"), None)
    groups = [[3 * folder + number for number in range(3)] for folder in range(5)]
    rng = np.random.default_rng(seed)
    if seed is not None:
        groups = [groups[place] for place in rng.permutation(5)]
    shards = [groups[0] + groups[1], groups[2] + groups[3], groups[4]]
    if seed is not None:
        shards = [rng.permutation(shard).tolist() for shard in shards]
    assert together.order.tolist() == [number for shard in shards for number in shard]
    assert together.positions == [range(6), range(6, 12), range(12, 15)]
    assert together.grouped


class Progress:
    steps = 0

    def advance(self, by: int = 1) -> None:
        self.steps += by


def test_finished_shards_are_left_and_others_written():
    finished = FinishedShard(ShardRecord(5, 9, "abc"), [])
    shards = SimpleNamespace(
        finished=lambda number: finished if number == 1 else None,
        write=lambda number, samples: (number, list(samples)),
    )
    images = Named("a", "b", "", "d")
    packer = _Packer(images, PackOptions(2, None), shards)
    progress = Progress()
    assert packer((1, range(2)), progress) == (1, finished, True)
    assert progress.steps == 2
    number, (same, (sample, lost)), found = packer((0, range(1, 3)), progress)
    assert (number, same, found, progress.steps) == (0, 0, False, 4)
    assert lost == ReadError("", "the file is empty")
    assert sample.key == "00000001"
    assert list(sample.files) == ["json", "png"]
    assert sample.files["png"] == saved(noise(1), "PNG")
    assert json.loads(sample.files["json"]) == {"name": "b", "width": 24, "height": 20}


def test_groups_and_classes_are_stored_beside_an_image():
    packer = _Packer(
        Named("p1/0", "p1/1", "p2/0"), PackOptions(hold_out_by="folder", shard_size=3), None
    )
    assert json.loads(packer._files(2)["json"])["hold_out_group"] == "p2"
    items = Items(Listed((noise(0), 7), noise(1)))
    packer = _Packer(items, PackOptions(shard_size=3), None)
    files = packer._files(0)
    assert list(files) == ["cls", "json", "png"]
    assert files["cls"] == b"7"
    assert json.loads(files["json"])["label"] == 7
    assert list(packer._files(1)) == ["json", "png"]
    assert "label" not in json.loads(packer._files(1)["json"])


def encoded_by(
    content: Any, channels: int = 3, **options: Any
) -> tuple[str, bytes, tuple[int, int]]:
    return _encode(Photo(content, "it", channels, AS_STORED), PackOptions(**options))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_files_are_kept_as_they_are_unless_they_are_made_smaller():
    image = noise(0, (30, 20))
    array = np.arange(6 * 5 * 2, dtype=np.uint8).reshape(6, 5, 2)
    for content, extension in (
        (saved(image, "PNG"), "png"),
        (saved(image, "JPEG"), "jpg"),
        (saved(image, "WEBP"), "webp"),
        (npy(np.asarray(image)), "npy"),
        (npz(np.asarray(image)), "npz"),
        (tiff(np.asarray(image).astype(np.uint16), "rgb"), "tif"),
    ):
        for resize in (None, 20, 21):
            assert encoded_by(content, resize=resize) == (extension, content, (30, 20))
    # Others without a loss.
    for content in (saved(image, "BMP"), image):
        extension, data, size = encoded_by(content)
        assert (extension, size) == ("png", (30, 20))
        assert np.array_equal(opened(data), image)
    extension, data, size = encoded_by(array_to_picture(array), 2)
    assert (extension, size) == ("npy", (5, 6))
    assert np.array_equal(np.load(io.BytesIO(data)), array)


def test_larger_images_are_made_smaller_in_the_format():
    image = noise(0, (30, 20))
    smaller = resize_shorter_side(image, 10)
    for content in (saved(image, "PNG"), saved(image, "BMP"), image):
        extension, data, size = encoded_by(content, resize=10, format="png")
        assert (extension, size) == ("png", (15, 10))
        assert np.array_equal(opened(data), smaller)
    extension, data, _ = encoded_by(image, resize=10, quality=40)
    expected = saved(smaller, "JPEG", quality=40, subsampling="4:4:4")
    assert (extension, data) == ("jpg", expected)
    array = np.arange(600, dtype=np.float32).reshape(20, 15, 2)
    extension, data, size = encoded_by(npy(array), 2, resize=10)
    found = np.load(io.BytesIO(data))
    assert (extension, size, found.shape) == ("npy", (10, 13), (13, 10, 2))
    array[3, 4] = np.nan
    assert encoded_by(npy(array), 2)[1] == npy(array)
    with pytest.raises(UnreadableImageError, match="2 values are missing") as error:
        encoded_by(npy(array), 2, resize=10)
    assert error.value.name == "it"


def test_a_profile_stays_with_pixels_that_become_a_png():
    adobe = Image.open(Path(skimage.__file__).parent / "data" / "rocket.jpg").info["icc_profile"]
    image = noise(0, (30, 20))
    content = saved(image, "TIFF", icc_profile=adobe)
    extension, data, _ = encoded_by(content)
    assert extension == "png"
    assert np.array_equal(opened(data), image)
    assert opened(data).info["icc_profile"] == adobe
    _, data, _ = encoded_by(content, resize=10, format="png")
    assert "icc_profile" not in opened(data).info
    converted = resize_shorter_side(Photo(content, "it").read(), 10)
    assert np.array_equal(opened(data), converted)
    # A palette's is no picture of one of the modes.
    content = saved(image.quantize(4), "TIFF", icc_profile=adobe)
    _, data, _ = encoded_by(content)
    assert "icc_profile" not in opened(data).info


def test_what_a_format_cannot_store_is_named():
    with pytest.raises(
        UnreadableImageError, match=r"200x18000 pixels can't be stored as webp"
    ) as e:
        encoded_by(Image.new("L", (400, 36_000)), 1, resize=200, format="webp")
    assert e.value.name == "it"


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", [f"{number}.png" for number in range(4)])


def test_names_like_slices_are_warned_of_where_files_are_parted(photos, tmp_path, monkeypatch):
    asked: list[Sequence[ImageDataset]] = []
    monkeypatch.setattr(packing, "warn_of_slices", asked.append)
    done: list[tuple[int, int]] = []
    options = PackOptions(shard_size=2)
    pack(str(photos), tmp_path / "a", options, 0, on_progress=lambda *args: done.append(args))
    assert len(asked) == 1
    assert isinstance(asked[0][0], Files)
    assert done[-1] == (4, 4)
    pack(str(photos), tmp_path / "b", PackOptions(hold_out_by=r"(?P<group>\d)"), 0)
    pack("torchvision:FakeData,size=2", tmp_path / "c", PackOptions(), 0)
    assert len(asked) == 1


def test_ranks_agree_and_the_first_has_the_result(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = PackOptions(shard_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "of_each", lambda own: [own, ("other", False)])
        with pytest.raises(ConfigError, match="processes see different names"):
            pack(str(photos), out, options, 0)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "run_in_processes", lambda *_: None)
        assert pack(str(photos), out, options, 0) is None
        packed = [(0, FinishedShard(ShardRecord(2, 9, "abc"), []), False)]
        patch.setattr(packing, "run_in_processes", lambda *_: packed)
        with pytest.raises(
            OSError, match=r"no 000000\.tar: all machines have to share this folder"
        ):
            pack(str(photos), out, options, 0)
    assert pack(str(photos), out, options, 0).found == 0
    # An earlier run was complete, and was killed while it removed its state.
    (out / ".packing").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "this_process", lambda: (1, 2))
        assert pack(str(photos), out, options, 0) is None
    assert not (out / ".packing").exists()
    assert pack(str(photos), out, options, 0).found == 2


def test_a_folder_that_is_no_folder_is_one_line(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as error:
        pack(str(photos), tmp_path / "file", PackOptions(), 0)
    assert str(error.value).endswith("Not a directory")
