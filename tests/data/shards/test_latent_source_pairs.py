"""Images with a teacher's moments.

The teacher is pointwise, so encoding a crop gives the crop of the latent.
"""

import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from olvae.config import instantiate
from olvae.data.image import EvalTransform, Photo, image_to_tensor
from olvae.data.mix import MixSource
from olvae.data.pixels.size_and_range import Sides, from_uint8
from olvae.data.read_errors import TooManyUnreadableError, UnreadableImageError
from olvae.data.shards.latent_files import LATENT, LATENT_PIXELS, Latent, pixel_bytes
from olvae.data.shards.latent_source import PairSource
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.export.encoding import latent_bytes
from tests.data.images import encoded, rewrite, take, write_classes
from tests.export.latents import Blocks, Shrunk, encode

COUNTS = (7, 9, 4, 3)  # images of the shards; the last one is held out
SIDE = 32  # of the encoded images, so that crops of 16 pixels have 5 x 5 places


@pytest.fixture(scope="session")
def encoded_once(tmp_path_factory) -> Path:
    """A folder of shards, and pairs of them."""
    root = tmp_path_factory.mktemp("pairs")
    options = {"size": SIDE, "flip": True, "dtype": "float32", "images": True}
    encode(write_classes(root / "shards", COUNTS), root / "pairs", Blocks(), **options)
    return root


@pytest.fixture
def pairs(encoded_once, tmp_path) -> Path:
    shutil.copytree(encoded_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "pairs"


def source(folder: Path, **arguments) -> PairSource:
    return PairSource(str(folder), **{"batch_size": 4, "size": 16, "shuffle": 5, **arguments})


@cache
def original(key: str) -> Tensor:
    """The pixels that were encoded."""
    number = int(key.split("/")[1])
    return image_to_tensor(EvalTransform(SIDE)(Photo(encoded(number), "x.jpg").read()))


def place(image: Tensor, key: str) -> tuple[bool, int, int]:
    """Where an image was cut from, at any pixel: mirrored or not, top, left."""
    size, found = image.shape[1], []
    for mirrored, whole in ((False, original(key)), (True, original(key).flip(-1))):
        windows = whole.unfold(1, size, 1).unfold(2, size, 1)  # (C, places, places, size, size)
        equal = (windows == image[:, None, None]).flatten(3).all(3).all(0)
        found += [(mirrored, *position) for position in equal.nonzero().tolist()]
    (only,) = found
    return only


def damage_0011(pairs: Path, **changed: bytes | None) -> None:
    rewrite(
        pairs / "000001.tar", {f"0011.latent.{name}": content for name, content in changed.items()}
    )


@pytest.mark.parametrize("size", [8, 16, SIDE, [12, 24]])
def test_moments_are_those_of_the_crop_mirrored_or_not(pairs, size):
    model = Blocks()
    height, width = Sides.of(size)
    for batch in take(source(pairs, size=size).train_loader(seed=0), 30):
        assert batch["image"].shape == (4, 3, height, width)
        assert batch["image"].dtype == torch.uint8
        assert batch["moments"].shape == (4, 96, height // 4, width // 4)
        assert batch["moments"].dtype == torch.float32
        with torch.inference_mode():
            posterior = model.encode(from_uint8(batch["image"]))
        mean, logvar = batch["moments"].chunk(2, dim=1)
        assert torch.equal(mean, posterior.mean)
        assert torch.allclose(logvar, posterior.logvar, rtol=0, atol=1e-5)


def test_every_window_of_a_pair_and_both_sides_come(pairs):
    seen, keys = set(), set()
    for batch in take(source(pairs, size=24).train_loader(seed=0), 60):
        keys |= set(batch["key"])
        seen |= {place(image, key) for image, key in zip(batch["image"], batch["key"], strict=True)}
    assert seen == {
        (flip, 4 * row, 4 * column)
        for flip in (False, True)
        for row in range(3)
        for column in range(3)
    }
    assert len(keys) == 20
    assert not any(key.startswith("003/") for key in keys)  # held out


@pytest.mark.parametrize(("encoded_too", "flip"), [(False, True), (True, False)])
def test_pairs_are_not_mirrored_without_mirrored_latents_or_if_not_wanted(
    tmp_path, encoded_too, flip
):
    images = write_classes(tmp_path / "shards", COUNTS)
    encode(images, tmp_path / "pairs", Blocks(), size=SIDE, flip=encoded_too, images=True)
    s = source(tmp_path / "pairs", flip=flip)
    for batch in take(s.train_loader(seed=0), 20):
        assert not any(
            place(image, key)[0] for image, key in zip(batch["image"], batch["key"], strict=True)
        )
    assert s.describe() == (
        "20 training images in 3 shards, 3 validation and test images, with the latents of tiny"
    )


def test_validation_of_pairs_is_the_centre_of_each_held_out_image_once_in_order(pairs):
    s, model = source(pairs), Blocks()
    for loader in (s.val_loader(), s.test_loader(2)):
        batches = list(loader)
        assert [key for batch in batches for key in batch["key"]] == [
            f"003/{n:04d}" for n in (20, 21, 22)
        ]
        for batch in batches:
            for image, key in zip(batch["image"], batch["key"], strict=True):
                assert place(image, key) == (False, 8, 8)
            with torch.inference_mode():
                assert torch.equal(
                    batch["moments"][:, :48], model.encode(from_uint8(batch["image"])).mean
                )
            assert batch["label"].tolist() == [int(key.split("/")[1]) % 5 for key in batch["key"]]
    assert (s.samples_per_epoch, s.val_images, s.images) == (20, 3, 23)
    assert s.describe().startswith(
        "20 training images in 3 shards, half of them mirrored, 3 validation"
    )
    assert s.describe_val_images() == (
        "at 32 pixels: bicubic antialiased resize of the shorter side (Pillow), centre crop, "
        "then a central crop of 16 pixels, which begins at a multiple of 4"
    )
    assert source(pairs, size=SIDE).describe_val_images() == (
        "at 32 pixels: bicubic antialiased resize of the shorter side (Pillow), centre crop"
    )
    odd = next(iter(source(pairs, size=20).val_loader()))  # 3 places: the one in the middle
    assert place(odd["image"][0], odd["key"][0]) == (False, 4, 4)
    even = next(iter(source(pairs, size=28).val_loader()))  # 2 places: the first
    assert place(even["image"][0], even["key"][0]) == (False, 0, 0)


def test_pairs_are_whole_images_by_default_and_another_folder_may_validate(pairs, tmp_path):
    encode(write_classes(tmp_path / "more", (5,)), tmp_path / "val", Blocks(), size=40, images=True)
    s = PairSource(str(pairs), batch_size=4, val_folder=str(tmp_path / "val"))
    assert (s.size.node, s.channels, s.samples_per_epoch, s.val_images) == (SIDE, 3, 23, 5)
    (batch,) = take(s.train_loader(), 1)
    assert {
        place(image, key)[1:] for image, key in zip(batch["image"], batch["key"], strict=True)
    } == {(0, 0)}
    assert [batch["image"].shape for batch in s.val_loader()] == [
        (4, 3, SIDE, SIDE),
        (1, 3, SIDE, SIDE),
    ]
    assert s.describe_val_images().startswith("at 40 pixels: ")


def test_a_deviation_of_0_is_the_smallest_log_variance(pairs):
    """Rounding to float16 makes zeros of the smallest deviations."""
    plain, mirrored = (
        Latent(torch.ones(48, 8, 8).half(), torch.zeros(48, 8, 8).half()) for _ in range(2)
    )
    damage_0011(pairs, safetensors=latent_bytes(plain, mirrored))
    for batch in take(source(pairs).train_loader(seed=0), 10):
        assert batch["moments"].isfinite().all()
        if "001/0011" in batch["key"]:
            logvar = batch["moments"][batch["key"].index("001/0011"), 48:]
            assert torch.equal(logvar, torch.full_like(logvar, -30.0))
            return
    pytest.fail("the image did not come in two epochs")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixel_bytes_are_png_without_loss(channels):
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    content = pixel_bytes(pixels)
    assert Image.open(io.BytesIO(content)).format == "PNG"
    assert torch.equal(image_to_tensor(Photo(content, "x.png", channels).read()), pixels)


@pytest.mark.parametrize(
    "damage", ["no picture", "other pixels", "no pixels", "no latent", "no mirrored latent"]
)
def test_a_broken_pair_is_counted_and_another_one_stands_in(pairs, damage):
    latent = Latent(torch.ones(48, 8, 8), torch.ones(48, 8, 8))
    changed = {
        "no picture": {"png": b"no picture"},
        "other pixels": {"png": pixel_bytes(torch.zeros(3, 16, 16, dtype=torch.uint8))},
        "no pixels": {"png": None},
        "no latent": {"safetensors": b"broken"},
        "no mirrored latent": {"safetensors": latent_bytes(latent)},
    }
    damage_0011(pairs, **changed[damage])
    loader = source(pairs, max_unreadable=0.1).train_loader()
    batches = take(loader, 20)
    assert all(len(batch["key"]) == 4 for batch in batches)
    if damage != "no mirrored latent":
        assert not any("001/0011" in batch["key"] for batch in batches)
    assert loader.read_errors.lost == 1
    with pytest.raises(TooManyUnreadableError, match="1 of 23"):
        take(source(pairs, max_unreadable=0.0).train_loader(), 20)


def test_a_mix_of_pairs_carries_moments(pairs):
    node = {
        "target": "olvae.data.shards.latent_source.PairSource",
        "params": {"folder": str(pairs), "size": 16},
    }
    node["params"]["batch_size"] = 1
    assert isinstance(instantiate(node), PairSource)
    s = MixSource([node, node], size=16, batch_size=4)
    (batch,) = take(s.train_loader(), 1)
    with torch.inference_mode():
        assert torch.equal(
            batch["moments"][:, :48], Blocks().encode(from_uint8(batch["image"])).mean
        )


def test_pair_source_refuses_latents_without_images_or_moments(pairs, tmp_path):
    images = tmp_path / "shards"
    encode(images, tmp_path / "plain", Blocks(), size=SIDE)
    with pytest.raises(ValueError, match=r"plain: .*images"):
        source(tmp_path / "plain")
    encode(images, tmp_path / "sampled", Blocks(), size=SIDE, moments=False, images=True)
    encode(images, tmp_path / "points", Shrunk(), size=SIDE, images=True)
    for name in ("sampled", "points"):
        with pytest.raises(ValueError, match="each image"):
            source(tmp_path / name)
    for size, text in (
        (18, "18 is not a multiple of 4"),
        (36, "36 pixels, but .* have 32"),
        ([36, 32], "pixels, but .* have 32"),
        ([32, 36], "pixels, but .* have 32"),
        (0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            source(pairs, size=size)
    encode(images, tmp_path / "small", Blocks(), size=16, images=True)
    with pytest.raises(ValueError, match=r"32 pixels.*small have 16"):
        source(pairs, size=None, val_folder=str(tmp_path / "small"))
    encode(images, tmp_path / "others", Blocks(0.5), size=SIDE, images=True)
    with pytest.raises(ValueError, match=r"others .*other weights.*pairs"):
        source(pairs, val_folder=str(tmp_path / "others"))
    write_classes(tmp_path / "one", (5,))
    encode(tmp_path / "one", tmp_path / "single", Blocks(), size=SIDE, images=True)
    with pytest.raises(ValueError, match=r"one shard .*data\.params\.val_folder"):
        source(tmp_path / "single")
    stats = json.loads((pairs / "stats.json").read_text())
    for name in ("weights", "flip", "target"):
        (pairs / "stats.json").write_text(
            json.dumps({key: stats[key] for key in stats if key != name})
        )
        with pytest.raises(ValueError, match=rf"stats\.json: .*without {name}"):
            source(pairs)


def test_a_pairs_image_does_not_change_without_its_latent(pairs):
    with pytest.raises(ValueError, match=r"augment: .*latent"):
        source(pairs, augment={"turns": True})


def test_a_pair_that_does_not_fit_is_named(encoded_once):
    s = source(encoded_once / "pairs")
    (entry, *_) = read_shard(Shard(str(encoded_once / "pairs" / "000001.tar")), LATENT)
    pixels = f"{entry.name.removesuffix(LATENT)}{LATENT_PIXELS}"

    def refused(entry: Entry) -> str:
        with pytest.raises(UnreadableImageError) as error:
            s.val_sample(entry)
        return error.value.name

    def with_pixels(height: int, width: int) -> Entry:
        content = pixel_bytes(torch.zeros(3, height, width, dtype=torch.uint8))
        return entry._replace(files={**entry.files, LATENT_PIXELS: content})

    files = {name: content for name, content in entry.files.items() if name != LATENT_PIXELS}
    assert refused(entry._replace(files=files)) == entry.name
    latent = Latent(torch.ones(48, 8, 8), None)
    assert refused(entry._replace(data=latent_bytes(latent))) == entry.name
    assert s.val_sample(with_pixels(SIDE, SIDE)).image.shape == (3, 16, 16)
    for sides in ((SIDE, 28), (28, SIDE)):
        assert refused(with_pixels(*sides)) == pixels
    for sides in (Sides(36, 16), Sides(16, 36)):
        s.size = sides
        assert refused(entry) == pixels
    s.size = Sides(16, 16)
    s.stats = {**s.stats, "latents_mean": [0.0] * 47}
    assert refused(entry) == pixels
