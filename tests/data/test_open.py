import pytest

from olvae import config as cfg
from olvae.config import ConfigError
from olvae.data.opening import holds_shards, open_images, open_source
from tests.conftest import tiny_config
from tests.data.images import encoded, write_shards


def count(src: object, **arguments: int) -> int:
    return sum(len(b["key"]) for b in open_source(str(src), 16, 4, **arguments).test_loader(4))


def test_what_stands_for_a_source(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (2, 3))
    (tmp_path / "list.txt").write_text("# two\nphotos/class0/0.png\n\nphotos/class1/1.png\n")
    cfg.save(tiny_config(image_folder), tmp_path / "config.yaml")
    for src, expected in {
        image_folder: 12,
        tmp_path / "list.txt": 2,
        image_folder / "**" / "1*.png": 3,
        tmp_path / "shards": 5,
        tmp_path / "shards" / "{000..001}.tar": 5,
        f"pipe:cat {tmp_path}/shards/001.tar": 3,
        "torchvision:FakeData,size=5,image_size=[3, 20, 20]": 5,
        "torchvision:FakeData,size=6": 6,
        f"hf:imagefolder,data_dir={image_folder}": 12,
        "samples": 42,
        tmp_path / "config.yaml": None,
    }.items():
        if expected is not None:
            assert count(src) == expected, src
    assert count(tmp_path / "config.yaml") == open_source(str(tmp_path / "config.yaml"), 1, 1).val_images


def test_unreadable_images_are_skipped_however_many(image_folder):
    for path in sorted(image_folder.rglob("*.png"))[:5]:
        path.write_bytes(b"")
    source = open_source(str(image_folder), 16, 4)
    assert sum(len(b["key"]) for b in source.test_loader(4)) == 7
    assert len(source.unreadable.reasons) == 5


def test_lists(image_folder, tmp_path):
    assert len(open_images("samples")) == 60
    images = open_images(str(image_folder))
    assert images.key(0) == "class0/0.png"
    assert images[0].size == (48, 40)
    write_shards(tmp_path / "shards", (2,))
    with pytest.raises(ConfigError, match="shards already"):
        open_images(str(tmp_path / "shards"))


def test_shards_are_told_from_images(tmp_path, image_folder):
    assert holds_shards("s3://bucket/{000..010}.tar")
    assert holds_shards("pipe:aws s3 cp s3://bucket/1.tar -")
    assert holds_shards("data/*.tar")
    assert not holds_shards("torchvision:CIFAR10,root=data")
    assert not holds_shards("hf:cifar10")
    assert not holds_shards(str(image_folder))
    assert not holds_shards("photos/*.jpg")


def test_mistakes(tmp_path):
    (tmp_path / "one.jpg").write_bytes(encoded(1))
    for src, error, text in (
        (tmp_path / "nowhere", FileNotFoundError, "no such folder"),
        (tmp_path / "list.txt", FileNotFoundError, "no such list"),
        (tmp_path / "*.png", FileNotFoundError, "no images of this name"),
        (tmp_path / "x.tar", FileNotFoundError, "no shards"),
        ("torchvision:Nothing", ConfigError, "does not import"),
        ("torchvision:FakeData,size", ConfigError, "size is not key=value"),
        (tmp_path / "config.yaml", ConfigError, "no such config file"),
    ):
        with pytest.raises(error, match=text):
            open_source(str(src), 16, 4)
    cfg.save({"model": {}}, tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match="has no data"):
        open_source(str(tmp_path / "empty.yaml"), 16, 4)
