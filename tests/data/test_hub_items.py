"""Items of data sets, one by one: pictures, arrays and tensors, their classes, names and groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.hub import Column, HuggingFaceSource, Items, TorchvisionSource
from olvae.data.image import image_to_tensor
from olvae.data.pixels.size_and_range import AS_STORED, EIGHT_BITS, UNSTATED, PixelRange
from olvae.data.read_errors import UnreadableImageError
from tests.data.images import encoded, write_photos

STATED = PixelRange.from_node([0, 4000])


class Listed:
    def __init__(self, *items: Any, **more: Any) -> None:
        self.items = items
        self.__dict__.update(more)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def read(item: Any, channels: int, pixel_range: PixelRange = EIGHT_BITS) -> torch.Tensor:
    return image_to_tensor(Items(Listed(item), channels, pixel_range)[0].read())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_of_8_bits_are_pictures_of_their_channels(channels):
    array = np.arange(30 * channels, dtype=np.uint8).reshape(5, 6, channels)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    for values in (EIGHT_BITS, AS_STORED):
        for item in (array, expected):
            assert torch.equal(read(item, channels, values), expected)
    photo = Items(Listed(array), channels)[0]
    assert photo.mode == {1: "L", 2: None, 3: "RGB", 4: "RGBA"}[channels]


def test_an_array_of_rows_and_columns_is_grey():
    array = np.arange(30, dtype=np.uint8).reshape(5, 6)
    assert read(array, 1)[0].tolist() == array.tolist()
    assert read(array.astype(np.float32), 1, AS_STORED)[0].tolist() == array.tolist()


@pytest.mark.parametrize(
    ("item", "values", "why"),
    [
        (torch.zeros(5, 6, dtype=torch.uint8), EIGHT_BITS, "is a Tensor, not a picture"),
        (np.zeros((5, 6)), EIGHT_BITS, "is a ndarray, not a picture"),
        ("a word", EIGHT_BITS, "is a str, not a picture"),
        (np.zeros((5, 6), np.int16), EIGHT_BITS, UNSTATED),
        (np.zeros((5, 6), np.uint16), EIGHT_BITS, UNSTATED),
        (Image.new("I", (5, 6)), EIGHT_BITS, UNSTATED),
        (np.zeros((5, 6), np.uint8), STATED, "8 bits per channel, whose range is"),
        (Image.new("RGB", (5, 6)), STATED, "8 bits per channel, whose range is"),
        (np.full((5, 6), 4001, np.uint16), STATED, "4001 at row 0"),
    ],
)
def test_items_that_are_no_picture_of_the_range(item, values, why):
    with pytest.raises(UnreadableImageError) as error:
        Items(Listed(item), 1, values)[0]
    assert error.value.name == "Listed[0]"
    assert why in error.value.reason


def test_a_class_is_an_integer_after_the_picture():
    picture = Image.new("L", (4, 3))
    items = [(picture, 3), (picture, 3, 5), (picture,), (picture, "cat"), [picture, 3], picture]
    found = Items(Listed(*items), 1)
    assert [found.label(index) for index in range(6)] == [3, 3, None, None, None, None]
    assert [found[index].size for index in range(6)] == [(4, 3)] * 6


def test_names_are_of_files_where_a_data_set_knows_them():
    samples = [("/data/cats/1.png", 0), ("/data/dogs/2.png", 1)]
    found = Items(Listed(1, 2, samples=samples, root="/data"))
    assert [found.name(index) for index in (0, 1)] == ["cats/1.png", "dogs/2.png"]
    for others in (["/data/1.png"], (("/data/1.png", 0),), None):
        assert Items(Listed(1, samples=others, root="/data")).name(0) == "00000000"
    assert Items(Listed(1)).name(0) == "00000000"


class Numbered:
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("dataset", [iter([]), Numbered()])
def test_items_need_numbers(dataset):
    with pytest.raises(ValueError, match=f"{type(dataset).__name__}: its items have no numbers"):
        Items(dataset)


@pytest.mark.parametrize("held_out", [None, "own"])
def test_groups_of_two_data_sets_are_compared(tmp_path, caplog, held_out):
    root = write_photos(tmp_path, [f"{folder}/{i}.png" for folder in "ab" for i in range(4)])
    node = {"target": "torchvision.datasets.ImageFolder", "params": {"root": str(root)}}
    arguments: dict[str, Any] = {"channels": 3, "num_workers": 3, "hold_out_by": "folder"}
    TorchvisionSource(node, [8, 9], 2, val_dataset=held_out and node, **arguments)
    assert len(caplog.messages) == (held_out is not None)
    if held_out:
        assert caplog.messages[0].startswith("2 groups by `hold_out_by` with images of training")
    source = TorchvisionSource(
        node, [8, 9], 2, 3, None, 0.5, 0.9, ["box"], False, 0.4, 3, 0.2, None, "file"
    )
    assert (source.size, source.batch_size, source.num_workers) == ((8, 9), 2, 3)
    assert (source.transform.min_fraction, source.transform.filters) == (0.9, ["box"])
    assert (source.transform.flip, source.transform.shuffle_channels) == (False, 0.4)
    assert (source.channels, source.max_unreadable, source.val_images) == (3, 0.2, 4)


datasets = pytest.importorskip("datasets")


def test_cells_are_bytes_or_files_or_empty(tmp_path):
    path = Path(tmp_path / "b.jpg")
    path.write_bytes(encoded(1))
    cells = [{"bytes": encoded(0), "path": "a.jpg"}, {"bytes": None, "path": str(path)}, None]
    features = datasets.Features({"image": datasets.Image(), "other": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells, "other": [1, 2, 3]}, features)
    found = Column(table, "image", 1)
    assert [found.name(index) for index in range(3)] == ["a.jpg", str(path), "00000002"]
    assert [found[index].read().mode for index in (0, 1)] == ["L", "L"]
    assert found[1].content == path
    with pytest.raises(UnreadableImageError, match="the cell is empty") as error:
        found[2]
    assert error.value.name == "row 2 of image"


def test_groups_of_two_splits_are_compared(tmp_path, caplog):
    cells = [
        {"bytes": encoded(number), "path": f"p{number % 2}_{number}.jpg"} for number in range(4)
    ]
    table = datasets.Dataset.from_dict(
        {"image": cells}, datasets.Features({"image": datasets.Image()})
    )
    path = str(tmp_path / "set")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(path)
    pattern = r"(?P<group>p\d)_"
    source = HuggingFaceSource(
        path, [8, 9], 2, 3, val_split="test", hold_out_by=pattern, channels=1, max_unreadable=0.2
    )
    assert len(caplog.messages) == 1
    assert (source.size, source.batch_size, source.num_workers) == ((8, 9), 2, 3)
    assert (source.channels, source.max_unreadable) == (1, 0.2)
    HuggingFaceSource(path, 8, 2, hold_out_by=pattern)
    assert len(caplog.messages) == 1
