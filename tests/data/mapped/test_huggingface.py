from itertools import islice

import pytest

from olvae.config import ConfigError
from olvae.data.mapped.hub import HuggingFaceSource
from tests.data.images import encoded

datasets = pytest.importorskip("datasets")


@pytest.fixture
def table(tmp_path):
    cells = [{"bytes": encoded(n), "path": None} for n in range(20)]
    cells[7] = {"bytes": b"no picture", "path": None}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"picture": cells, "label": list(range(20))}, features)


@pytest.mark.parametrize("kind", ["disk", "parquet", "dict"])
def test_a_column_of_images(table, kind, tmp_path):
    path, arguments = str(tmp_path / "set"), {}
    if kind == "disk":
        table.save_to_disk(path)
    elif kind == "dict":
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(path)
        arguments["val_split"] = "test"
    else:
        table.to_parquet(tmp_path / "a.parquet")
        path, arguments = "parquet", {"data_files": str(tmp_path / "a.parquet")}
    s = HuggingFaceSource(path, 16, 4, column="picture", val_fraction=0.1, max_unreadable=0.2, **arguments)
    assert (s.samples_per_epoch, s.val_images) == ((20, 20) if kind == "dict" else (18, 2))
    loader = s.train_loader()
    assert all(batch["image"].shape == (4, 3, 16, 16) for batch in islice(loader, 10))
    assert s.unreadable.reasons == {"row 7 of picture": "no known picture format"}


def test_an_image_folder(image_folder):
    s = HuggingFaceSource("imagefolder", 16, 4, data_dir=str(image_folder))
    assert s.images == 12
    assert len(list(s.val_loader())) == 1


def test_mistakes(table, tmp_path):
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match="no column image; there are picture, label"):
        HuggingFaceSource(str(tmp_path / "set"), 16, 4)
    with pytest.raises(ConfigError, match=r"label holds .*, not images"):
        HuggingFaceSource(str(tmp_path / "set"), 16, 4, column="label")
