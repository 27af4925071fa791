from itertools import islice

import numpy as np
import pytest
import torchvision
from PIL import Image

from olvae.config import ConfigError
from olvae.data import dataset
from olvae.data.dataset import hold_out
from olvae.data.hub import Column, HuggingFaceSource, Items, TorchvisionSource, load_table
from olvae.data.image import image_to_tensor
from olvae.data.order.groups import Grouping
from olvae.data.pixels.size_and_range import AS_STORED, PixelRange
from olvae.data.read_errors import UnreadableImageError
from tests.data.images import encoded

FAKE = {
    "target": "torchvision.datasets.FakeData",
    "params": {"size": 30, "image_size": [3, 24, 20]},
}


def test_torchvision_source_trains_and_validates():
    s = TorchvisionSource(FAKE, size=16, batch_size=4, val_fraction=0.1)
    assert (s.samples_per_epoch, s.val_images) == (27, 3)
    (batch,) = islice(s.train_loader(), 1)
    assert batch["image"].shape == (4, 3, 16, 16)
    keys = [key for batch in s.val_loader() for key in batch["key"]]
    assert keys == ["00000000", "00000014", "00000029"]
    assert not set(keys) & {key for batch in islice(s.train_loader(), 6) for key in batch["key"]}
    s = TorchvisionSource(
        FAKE, 16, 4, val_dataset={**FAKE, "params": {**FAKE["params"], "size": 5}}
    )
    assert (s.samples_per_epoch, s.val_images) == (30, 5)


def test_a_share_that_was_bounded_is_in_the_description(monkeypatch, image_folder):
    """Of the 30 or 12 images a fifth would be held out; here no more than 2 are."""
    monkeypatch.setattr(dataset, "MAX_VAL_IMAGES", 2)
    bound = "2 validation and test images (at most 10,000 without data.params.val_fraction)"
    assert TorchvisionSource(FAKE, 16, 4).describe() == f"28 training, {bound}"
    given = TorchvisionSource(FAKE, 16, 4, val_fraction=0.1)
    assert given.describe() == "27 training, 3 validation and test images"
    folder = {"path": "imagefolder", "data_dir": str(image_folder)}
    assert HuggingFaceSource(size=16, batch_size=4, **folder).describe() == f"10 training, {bound}"


def test_torchvision_source_replaces_a_broken_image(image_folder):
    (image_folder / "class1" / "1.png").write_bytes(b"")
    node = {"target": "torchvision.datasets.ImageFolder", "params": {"root": str(image_folder)}}
    s = TorchvisionSource(node, 16, 4, max_unreadable=0.5)
    loader = s.train_loader()
    assert all(len(batch["key"]) == 4 for batch in islice(loader, 6))
    assert loader.read_errors.lost == 1
    items = Items(torchvision.datasets.ImageFolder(str(image_folder)))
    assert [items.label(i) for i in (0, len(items) - 1)] == [0, 2]


def test_an_image_that_torchvisions_own_decoder_cannot_read(image_folder):
    (image_folder / "class1" / "1.png").write_bytes(b"no picture")
    params = {
        "root": str(image_folder),
        "loader": torchvision.io.read_image,
        "extensions": (".png",),
    }
    items = Items(torchvision.datasets.DatasetFolder(**params))
    assert items[0].read().size == (48, 40)
    with pytest.raises(UnreadableImageError, match=r"DatasetFolder\[4\]: .*image"):
        items[4]


class Dataset:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_decoder_that_is_not_installed_is_no_broken_image():
    class Undecoded(Dataset):
        def __getitem__(self, index):
            raise self.items[index]

    items = Items(Undecoded([ImportError("no decoder"), RuntimeError("cut off")]))
    with pytest.raises(ImportError, match="no decoder"):
        items[0]
    with pytest.raises(UnreadableImageError, match=r"Undecoded\[1\]: .*cut off"):
        items[1]


def test_items_may_be_arrays_tensors_and_tuples():
    array = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    import torch

    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for item in (array, tensor, (Image.fromarray(array), "label"), [tensor, 3]):
        assert np.array_equal(np.asarray(Items(Dataset([item]))[0].read()), array)
    assert np.array_equal(
        np.asarray(Items(Dataset([array[..., :1]]), channels=1)[0].read()), array[..., 0]
    )
    with pytest.raises(UnreadableImageError, match="is a Tensor"):
        Items(Dataset([torch.zeros(3, 8, 9)]))[0]
    with pytest.raises(ValueError, match="no numbers"):
        Items(iter([]))


def test_items_of_pictures_and_arrays_have_the_stated_range():
    stated = PixelRange.from_node([0, 4000])
    deep = np.full((8, 9), 3000, dtype=np.uint16)
    for item, kind in (
        (Image.fromarray(deep), "uint16"),
        (Image.fromarray(deep.astype(np.float32)), "float32"),
        (deep, "uint16"),
    ):
        for values in (stated, AS_STORED):
            tensor = image_to_tensor(Items(Dataset([item]), 1, values)[0].read())
            assert (str(tensor.dtype), tensor.shape) == (f"torch.{kind}", (1, 8, 9))
            assert (tensor.float() == 3000).all()
    eight = Image.new("L", (9, 8), 12)
    for item in (eight, eight.convert("RGB"), np.asarray(eight)):
        with pytest.raises(UnreadableImageError, match="8 bits"):
            Items(Dataset([item]), 1, stated)[0]
        tensor = image_to_tensor(Items(Dataset([item]), 1, AS_STORED)[0].read())
        assert (str(tensor.dtype), tensor.unique().tolist()) == ("torch.uint8", [12])
    with pytest.raises(UnreadableImageError, match="3000 at row 0"):
        Items(Dataset([Image.fromarray(deep)]), 1, PixelRange.from_node([0, 255]))[0]


datasets = pytest.importorskip("datasets")


@pytest.fixture
def table(tmp_path):
    cells = [{"bytes": encoded(n), "path": None} for n in range(20)]
    cells[7] = {"bytes": b"no picture", "path": None}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"picture": cells, "label": list(range(20))}, features)


@pytest.mark.parametrize("kind", ["disk", "parquet", "dict"])
def test_hugging_face_source_reads_a_column_of_images(table, kind, tmp_path):
    path, arguments = str(tmp_path / "set"), {}
    if kind == "disk":
        table.save_to_disk(path)
    elif kind == "dict":
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(path)
        arguments["val_split"] = "test"
    else:
        table.to_parquet(tmp_path / "a.parquet")
        path, arguments = "parquet", {"data_files": str(tmp_path / "a.parquet")}
    s = HuggingFaceSource(
        path, 16, 4, column="picture", val_fraction=0.1, max_unreadable=0.2, **arguments
    )
    assert (s.samples_per_epoch, s.val_images) == ((20, 20) if kind == "dict" else (18, 2))
    loader = s.train_loader()
    assert all(batch["image"].shape == (4, 3, 16, 16) for batch in islice(loader, 10))
    assert s.unreadable.reasons == {"row 7 of picture": "no known picture format"}


def test_hugging_face_source_refuses_missing_columns_and_splits(table, tmp_path):
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"column image; .*picture, label"):
        HuggingFaceSource(str(tmp_path / "set"), 16, 4)
    with pytest.raises(ConfigError, match=r"set: .*split test.* train"):
        HuggingFaceSource(str(tmp_path / "set"), 16, 4, column="picture", val_split="test")
    datasets.Dataset.from_dict({"picture": [1, 2]}, split="test").save_to_disk(tmp_path / "own")
    assert len(load_table(tmp_path / "own", "test")) == 2
    with pytest.raises(ConfigError, match="label holds"):
        HuggingFaceSource(str(tmp_path / "set"), 16, 4, column="label")


def test_data_sets_hold_out_groups_by_the_names_of_their_files(image_folder):
    """Of twelve images in three folders, those of one; of columns, by the names beside bytes."""
    node = {"target": "torchvision.datasets.ImageFolder", "params": {"root": str(image_folder)}}
    s = TorchvisionSource(node, 16, 4, hold_out_by="folder")
    assert s.shared_groups() is None
    assert {group for batch in s.val_loader() for group in batch["group"]} == {"class0"}
    content = [{"bytes": encoded(n), "path": f"p{n // 4}_{n}.jpg"} for n in range(12)]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": content}, features=features)
    train, val = hold_out(Column(table, "image"), 0.1, Grouping(r"(?P<group>p\d)_"))
    assert [part.name(i)[:2] for part in (val, train) for i in range(len(part))] == (
        ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4
    )
    with pytest.raises(ValueError, match=r"no group .*'00000000'"):
        TorchvisionSource(FAKE, 16, 4, hold_out_by=r"(?P<group>p\d)")
