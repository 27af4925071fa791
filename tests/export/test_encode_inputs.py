"""Which images an encoding reads, into which shards, and how."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.config import ConfigError, save
from olvae.data.image import EvalTransform, image_to_tensor, read_picture
from olvae.data.packing import usual_shard_size
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides
from olvae.data.read_errors import ReadError
from olvae.data.shards.tar_reading import Shard
from olvae.export import encode_inputs as module
from olvae.export.encode_inputs import (
    DatasetInputs,
    EncodeOptions,
    Inputs,
    Item,
    Reader,
    ReadImage,
    ShardInputs,
    Units,
    find_inputs,
    usual_transform,
    windows_of,
)
from tests.data.images import encoded, write_shards
from tests.export.latents import encode, tiny_vae

WIDE = PixelRange.from_node([0, 4095])


def test_encoding_plan_tells_other_images_of_the_same_names_apart():
    data_sets = ["torchvision:FakeData,size=4", "torchvision:FakeData,size=4,random_offset=4"]
    shards = [
        "https://here.org/0.tar",
        "https://there.org/0.tar",
        "pipe:cat 0.tar?a=0",
        "pipe:cat 0.tar?a=1",
    ]
    plans = [find_inputs(source, 3, 2).plan({})["images"] for source in (*data_sets, *shards)]
    shard = find_inputs(shards[0], 3, 2)
    plans += [
        replace(shard, image_key=key).plan({})["images"] for key in ("input.png", "target.png")
    ]
    assert len(set(plans)) == 8


def test_a_plan_knows_images_by_their_states_and_not_by_their_place(tmp_path, image_folder):
    inputs = find_inputs(str(image_folder), 3, 5)
    plan = inputs.plan({"flip": True})
    assert plan["options"] == {"flip": True, "shard_size": 5}
    assert plan["classes"] == []
    shutil.copytree(image_folder, tmp_path / "moved")
    assert find_inputs(str(tmp_path / "moved"), 3, 5).plan({"flip": True}) == plan

    # Shards by their files; a config's data whatever the order of its entries.
    plans = []
    for counts in ((3, 2), (3, 2), (2, 3)):
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        plans.append(find_inputs(str(shards_of(tmp_path, counts)), 3, 5).plan({}))
    assert plans[0]["options"] == {}
    assert plans[0] != plans[2]
    entries = ["size: 64", "batch_size: 2"]
    for number, order in enumerate((entries, entries[::-1])):
        text = f"data: {{target: {SAMPLES}, params: {{{', '.join(order)}}}}}"
        (tmp_path / f"{number}.yaml").write_text(text)
    one, other = (find_inputs(str(tmp_path / f"{n}.yaml"), 3, 5).plan({}) for n in range(2))
    assert one == other


SAMPLES = "olvae.data.dataset.SamplePhotographs"


def shards_of(folder, counts):
    write_shards(folder / "shards", counts)
    return folder / "shards"


def test_encoding_resizes_images_as_evaluation_does(tmp_path, image_folder):
    masks = {"size": 24, "filters": ["nearest"]}
    params = {"root": str(image_folder), "batch_size": 1, **masks}
    save(
        {"data": {"target": "olvae.data.picture_folder.FolderSource", "params": params}},
        tmp_path / "masks.yaml",
    )
    trained = {"data": {"params": masks}}
    for source, config, expected in (
        (image_folder, {}, (16, "bicubic")),  # the model's image_size
        (image_folder, trained, (24, "nearest")),
        (tmp_path / "masks.yaml", {}, (24, "nearest")),
        (tmp_path / "masks.yaml", {"data": {"params": {"size": 32}}}, (24, "nearest")),
    ):
        usual = usual_transform(find_inputs(str(source), 3, 5), config, tiny_vae())
        assert (Sides.of(usual.size).node, usual.resample) == expected
    save(
        {"data": {"target": "olvae.data.dataset.SamplePhotographs", "params": {"size": 64}}},
        tmp_path / "tiles.yaml",
    )
    for size, tile in ((None, 64), (80, 80)):
        inputs = find_inputs(str(tmp_path / "tiles.yaml"), 3, 5, size=size)
        assert inputs.open(next(inputs.read(0)).image).size == (tile, tile)
    (tmp_path / "masks").mkdir()
    mask = np.random.default_rng(0).integers(0, 2, (40, 40, 3), dtype=np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "masks" / "0.png")
    encode(tmp_path / "masks", tmp_path / "out", resample="nearest", images=True)
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        content = archive.extractfile("00000000.latent.png").read()
    assert set(np.asarray(Image.open(io.BytesIO(content))).flat) == {0, 255}
    assert (
        "resample"
        in json.loads((tmp_path / "out" / ".encode" / "plan.json").read_text())["options"]
    )


def names(inputs: Inputs, shard: int) -> list[tuple[str, str]]:
    return [(item.name, item.key) for item in inputs.read(shard)]


def test_images_of_a_folder_are_cut_into_shards_by_number(image_folder):
    paths = [path.relative_to(image_folder).as_posix() for path in find_images(image_folder)]
    inputs = find_inputs(str(image_folder), 3, 5)
    assert isinstance(inputs, DatasetInputs)
    assert len(inputs) == 3
    assert [inputs.count(range(n, n + 1)) for n in range(3)] == [5, 5, 2]
    assert inputs.count(range(3)) == 12
    assert {item.group for item in inputs.read(0)} == {None}
    usual = find_inputs(str(image_folder), 3, 0)
    assert usual.shard_size == usual_shard_size(12)
    found = [pair for shard in range(3) for pair in names(inputs, shard)]
    assert found == [(f"{number:08d}", path) for number, path in enumerate(paths)]


@pytest.mark.parametrize("by", ["hold_out_by", "trained_by"])
def test_groups_stay_together_in_a_shard(image_folder, by):
    """Of four images in each of three folders; a shard has up to five, or eight."""
    for size, counts in ((5, [4, 4, 4]), (8, [8, 4])):
        inputs = find_inputs(str(image_folder), 3, size, **{by: "folder"})
        assert [inputs.count(range(n, n + 1)) for n in range(len(inputs))] == counts
    groups = [[item.group for item in inputs.read(n)] for n in range(2)]
    assert groups == [["class0"] * 4 + ["class1"] * 4, ["class2"] * 4]
    assert inputs.plan({})["options"] == {"shard_size": 8, "hold_out_by": "folder"}
    # What the user says goes before what the training says.
    both = find_inputs(str(image_folder), 3, 5, hold_out_by="file", trained_by="folder")
    assert both.grouped is None


def test_what_can_not_be_encoded_is_refused(tmp_path, image_folder):
    folder = "olvae.data.picture_folder.FolderSource"
    params = {"root": str(image_folder), "size": 16, "batch_size": 1}
    mixed = {"size": 16, "batch_size": 1, "sources": [{"target": folder, "params": params}]}
    shards = str(shards_of(tmp_path, (2,)))
    (image_folder / "loose.png").write_bytes(encoded(0))
    for target, given, options, message in (
        (folder, {**params, "channels": 1}, {}, "images of 1 channel, .* takes 3"),
        (folder, params, {"pixel_range": WIDE}, "its values are"),
        ("olvae.data.mix.MixSource", mixed, {}, "MixSource can't be encoded: .* one by one"),
        (None, shards, {"classes": True}, "`classes` is for folders"),
        (None, shards, {"hold_out_by": "folder"}, "`hold_out_by`: each"),
        (None, str(image_folder), {"classes": True}, r"`classes`: loose\.png is not"),
    ):
        src = given
        if target is not None:
            src = str(tmp_path / "data.yaml")
            save({"data": {"target": target, "params": given}}, tmp_path / "data.yaml")
        with pytest.raises(ConfigError, match=message):
            find_inputs(src, 3, 5, **options)


def test_a_config_of_shards_is_their_test_shards(tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(module, "share_indexes", shared.append)
    folder = str(shards_of(tmp_path, (2, 1)))
    assert len(find_inputs(folder, 3, 5)) == 2
    assert shared == [folder]
    params = {"shards": folder, "val_shards": folder, "size": 24, "batch_size": 1}
    node = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    save({"data": {**node, "params": {**params, "image_key": "jpg"}}}, tmp_path / "shards.yaml")
    inputs = find_inputs(str(tmp_path / "shards.yaml"), 3, 5)
    assert isinstance(inputs, ShardInputs)
    assert (len(inputs), inputs.channels, inputs.image_key) == (2, 3, "jpg")
    assert inputs.pixel_range == EIGHT_BITS
    assert Sides.of(inputs.transform.size).node == 24


def test_classes_are_the_first_folders_by_number(image_folder):
    inputs = find_inputs(str(image_folder), 3, 12, classes=True)
    assert inputs.classes == ["class0", "class1", "class2"]
    for item in inputs.read(0):
        assert item.files["cls"] == item.key[len("class")].encode()


def test_each_shard_becomes_one_and_keeps_its_other_files(tmp_path):
    write_shards(tmp_path, (3, 2))
    inputs = find_inputs(str(tmp_path), 3, 100)
    assert isinstance(inputs, ShardInputs)
    assert len(inputs) == 2
    assert names(inputs, 1) == [("0003", "001/0003"), ("0004", "001/0004")]
    assert [{*item.files} for item in inputs.read(0)] == [{"json"}] * 3
    assert [inputs.count(range(n)) for n in range(3)] == [0, 3, 5]
    uncounted = replace(inputs, shards=[inputs.shards[0], inputs.shards[1]._replace(images=None)])
    assert uncounted.count(range(2)) is None
    assert inputs.open((encoded(0), "a.jpg")).size == (40, 32)


@pytest.mark.parametrize(
    ("options", "batch_size", "lengths"),
    [
        (EncodeOptions(16), 4, [4, 1, 4, 1, 2]),
        (EncodeOptions(0), 4, [1] * 12),  # of their own sizes, which may be large
        (EncodeOptions(512), 4, [2, 2, 1, 2, 2, 1, 2]),  # 2^19 pixels at most
        (EncodeOptions([1024, 2048]), 4, [1] * 12),  # but for one image
    ],
)
def test_readers_are_sent_a_few_images_of_one_shard_at_a_time(
    image_folder, options, batch_size, lengths
):
    inputs = find_inputs(str(image_folder), 3, 5)
    units = Units(inputs, options, range(3), batch_size)
    sent = list(units)
    assert [len(unit) for unit in sent] == lengths
    assert [shard for shard, _ in units.waiting] == sorted(shard for shard, _ in units.waiting)
    keys = [item.key for unit in sent for item in unit]
    assert keys == [key for shard in range(3) for _, key in names(inputs, shard)]
    assert not any(item.files for unit in sent for item in unit)


def test_what_is_read_has_pixels_or_the_reason_in_the_order_of_the_shard(image_folder):
    (image_folder / "class0" / "bad.png").write_bytes(b"no picture")
    inputs = find_inputs(str(image_folder), 3, 20)
    options = EncodeOptions(16)
    reader = Reader(inputs, options)
    units = Units(inputs, options, range(1), 4)
    found = [image for _, unit in units.images(reader[unit] for unit in units) for image in unit]
    assert len(found) == 13
    (bad,) = [one for one in found if isinstance(one, ReadError)]
    assert bad.name == "class0/bad.png"
    for one in found:
        if one is not bad:
            expected = read_picture(image_folder / one.item.key)
            pixels = image_to_tensor(EvalTransform(16)(expected))
            assert torch.equal(one.pixels, pixels)
            assert one.size == (48, 40)


def test_an_error_in_the_middle_comes_after_the_images_before_it():
    class Broken:
        def read(self, shard: int) -> Iterator[Item]:
            yield Item("0", "a", 0)
            raise OSError(f"shard {shard} ends here")

    units = Units(Broken(), EncodeOptions(16), [7], 1)  # type: ignore[arg-type]
    assert [item.key for unit in units for item in unit] == ["a"]
    assert str(units.error) == "shard 7 ends here"
    pixels = np.zeros((1, 3, 2, 2), np.uint8)
    found = units.images([(pixels, [module._Read((2, 2), {})])])
    shard, (image,) = next(found)
    assert (shard, image.item.key) == (7, "a")
    with pytest.raises(OSError, match="shard 7 ends"):
        next(found)


def test_a_shard_that_is_cut_off_ends_with_an_error_or_is_tried_again(tmp_path):
    """Its second image is whole; over a network the rest may come later."""
    path = shards_of(tmp_path, (3,)) / "000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    local = ShardInputs([Shard(str(path))], 3)
    *items, error = local.read(0)
    assert isinstance(error, ReadError)
    options = EncodeOptions(16)
    units = Units(local, options, [0], 2)
    reader = Reader(local, options)
    found = [image for _, unit in units.images(reader[unit] for unit in units) for image in unit]
    assert [type(one) for one in found] == [ReadImage] * len(items) + [ReadError]
    assert found[-1] == error
    remote = ShardInputs([Shard(f"pipe:cat {path}; false")], 3)
    with pytest.raises(OSError, match="run the same command again to continue"):
        list(remote.read(0))


def test_readers_send_images_of_one_kind_in_one_array(image_folder):
    Image.new("RGB", (20, 30)).save(image_folder / "class0" / "0.png")
    inputs = find_inputs(str(image_folder), 3, 12)
    items = list(inputs.read(0))
    for size, one in ((16, True), (0, False)):
        pixels, read = Reader(inputs, EncodeOptions(size))[items]
        assert isinstance(pixels, np.ndarray) == one
        assert len(pixels) == len(read) == 12
    pixels, _ = Reader(inputs, EncodeOptions(0))[items[1:]]
    assert pixels.shape == (11, 3, 40, 48)


@pytest.mark.parametrize(("resample", "masks"), [("nearest", True), ("bicubic", False)])
def test_masks_are_read_as_they_are(resample, masks):
    """Without the conversion of a colour profile."""
    asked = []

    class Photo:
        def read(self, masks):
            asked.append(masks)
            return Image.new("RGB", (4, 4))

    inputs = SimpleNamespace(open=lambda _: Photo())
    Reader(inputs, EncodeOptions(4, resample=resample))[[Item("0", "a", 0)]]
    assert asked == [masks]


def test_windows_end_at_their_length_or_when_their_bytes_are_too_many(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_BYTES", 24)
    error = ReadError("a.png", "broken")
    images: list[ReadImage | ReadError] = []
    for size in (12, 12, 8, 25, 12, 13, 12, 12, 1, None, None, None, 8):
        pixels = None if size is None else torch.zeros(1, 1, size, dtype=torch.uint8)
        item = Item("a", "a", 0)
        images.append(error if pixels is None else ReadImage(item, pixels, (1, 1)))
    windows = list(windows_of(images, 3))
    assert [len(window) for window in windows] == [3, 1, 2, 3, 3, 1]
    assert [image for window in windows for image in window] == images
    assert list(windows_of([], 3)) == []


@pytest.mark.parametrize(
    ("options", "taken", "message"),
    [
        (EncodeOptions(16, images=True), {}, None),
        (EncodeOptions([16, 24]), {"in_channels": 2, "pixel_range": WIDE}, None),
        (EncodeOptions(0), {}, None),
        (EncodeOptions(16, images=True), {"in_channels": 4}, None),
        (EncodeOptions(20), {}, "`size` 20: .* multiple of 8"),
        (EncodeOptions([16, 20]), {}, "`size` 16x20: .* multiple of 8"),
        (EncodeOptions(0, images=True), {}, "`images`: .* give `size`"),
        (EncodeOptions(16, images=True), {"in_channels": 2}, "`images`: .* have 2"),
        (EncodeOptions(16, images=True), {"pixel_range": WIDE}, "`images`: .* 0 to 4095"),
    ],
)
def test_images_that_can_not_be_stored_so_are_refused(options, taken, message):
    usual = {"downscale": 8, "in_channels": 3, "pixel_range": EIGHT_BITS}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        options.check(SimpleNamespace(**{**usual, **taken}))
