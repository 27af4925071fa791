import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.mapped.dataset import HELD_OUT, PHOTOGRAPHS, Photograph, SamplePhotographs, sample_photographs

ALL = (*PHOTOGRAPHS, *HELD_OUT)
FOLDER = ALL[0].path.parent
LICENCES = (FOLDER / "LICENCES.txt").read_text(encoding="utf-8")


def thumbnail(photograph: Photograph) -> np.ndarray:
    with Image.open(photograph.path) as image:
        return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float64)


def test_the_photographs_are_small_plain_jpegs():
    for photograph in ALL:
        with Image.open(photograph.path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB"), photograph
            assert 256 <= min(image.size) <= 320, photograph
            assert not image.getexif(), photograph
            assert not image.info.keys() & {"icc_profile", "exif", "xmp", "comment"}, photograph
    assert sum(photograph.path.stat().st_size for photograph in ALL) <= 3_000_000


def test_every_file_has_its_author_and_an_open_licence():
    assert sorted(photograph.file for photograph in ALL) == sorted(path.name for path in FOLDER.glob("*.jpg"))
    for photograph in ALL:
        entry = LICENCES.split(f"\n\n{photograph.file}\n", 1)[1].split("\n\n", 1)[0]
        fields = [line.strip().split(": ")[0] for line in entry.splitlines()]
        assert [field for field in fields if field != "Address"] == ["Title", "Author", "Source", "Licence", "Changes"]
        assert f"Author: {photograph.author}\n" in entry
        assert f"Licence: {photograph.licence}\n" in entry
        assert re.fullmatch(r"public domain|CC0 1\.0|CC BY(-SA)? \d\.\d", photograph.licence)
        assert f"\n  {photograph.licence} " in LICENCES  # with its address


def test_an_eighth_is_held_out():
    assert (len(PHOTOGRAPHS), len(HELD_OUT)) == (52, 8)
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)
    assert len(sample_photographs()) == 60


def test_models_of_the_first_list_stay_honest():
    """Four were held out and eleven trained on before there were sixty."""
    held_out = {photograph.file for photograph in HELD_OUT}
    assert held_out >= {"camera.jpg", "chelsea.jpg", "coffee.jpg", "flower.jpg"}
    trained_on = "astronaut brick coins grass gravel hubble ihc motorcycle retina rocket china"
    assert not held_out & {f"{name}.jpg" for name in trained_on.split()}


def test_no_held_out_photograph_resembles_a_training_one():
    """The root mean square difference of thumbnails, mirrored or not, in 255ths."""
    train = np.stack([thumbnail(photograph) for photograph in PHOTOGRAPHS])
    for photograph in HELD_OUT:
        for held_out in (thumbnail(photograph), thumbnail(photograph)[:, ::-1]):
            assert np.sqrt(((train - held_out) ** 2).mean((1, 2, 3))).min() > 30, photograph


def test_batches():
    source = SamplePhotographs(size=32, batch_size=8)
    (batch,) = islice(source.train_loader(), 1)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8


def test_an_epoch_has_each_photograph_as_often():
    source = SamplePhotographs(size=8, crops_per_photograph=3, batch_size=1)
    drawn = Counter(batch["key"][0] for batch in islice(source.train_loader(), 3 * 52))
    assert drawn == {photograph.file: 3 for photograph in PHOTOGRAPHS}


def test_the_tiles():
    source = SamplePhotographs(size=64, batch_size=42)
    (batch,) = source.test_loader()
    assert batch["image"].shape == (42, 3, 64, 64)
    assert batch["key"][4] == "chelsea.jpg/0-0"  # after four tiles of camera.jpg
    chelsea = Image.open(FOLDER / "chelsea.jpg").resize((192, 128), Image.Resampling.BICUBIC)
    assert np.array_equal(batch["image"][4].permute(1, 2, 0).numpy(), np.asarray(chelsea.crop((0, 0, 64, 64))))


def test_the_tiles_are_cut_around_the_centre():
    (batch,) = SamplePhotographs(size=64, batch_size=42).test_loader()
    coffee = Image.open(FOLDER / "coffee.jpg").resize((192, 128), Image.Resampling.BICUBIC)  # from 456x304
    place = batch["key"].index("coffee.jpg/1-2")
    expected = np.asarray(coffee.crop((128, 64, 192, 128)))
    assert np.array_equal(batch["image"][place].permute(1, 2, 0).numpy(), expected)
    gateway = Image.open(FOLDER / "gateway-of-india.jpg").resize((171, 128), Image.Resampling.BICUBIC)  # from 405x304
    place = batch["key"].index("gateway-of-india.jpg/0-1")
    expected = np.asarray(gateway.crop((21 + 64, 0, 21 + 128, 64)))  # of the 43 columns left over, 21 on the left
    assert np.array_equal(batch["image"][place].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("size", "tiles"), [(128, 42), (256, 8)])
def test_large_tiles_are_not_enlarged(size, tiles):
    source = SamplePhotographs(size=size, batch_size=8, crops_per_photograph=1)
    loader = source.test_loader()
    assert sum(len(batch["key"]) for batch in loader) == tiles
    assert loader.enlarged == 0


def test_a_tile_of_256_pixels_is_the_centre():
    (batch,) = SamplePhotographs(size=256, batch_size=8).test_loader()
    chelsea = np.asarray(Image.open(FOLDER / "chelsea.jpg"))  # 451x300
    image = batch["image"][batch["key"].index("chelsea.jpg/0-0")].permute(1, 2, 0).numpy()
    assert np.array_equal(image, chelsea[22 : 22 + 256, 97 : 97 + 256])


def test_what_is_smaller_than_a_tile_is_reported_as_enlarged():
    source = SamplePhotographs(size=312, batch_size=8, crops_per_photograph=1)
    loader = source.test_loader()
    (batch,) = loader
    assert batch["image"].shape == (8, 3, 312, 312)
    assert loader.enlarged == 8
