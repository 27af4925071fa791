"""``make fuzz``: mutated files through what reads them.

FUZZ_INPUTS and FUZZ_SECONDS bound it, together.

What fails is kept in ``examples`` beside this file and tried first the next time.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from PIL import Image, features
from safetensors.torch import save_file

from olvae import LiteVAE
from olvae.checkpoint import read_weights
from olvae.config import save
from olvae.data.image import EvalTransform, Photo, RandomScaleCrop
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.scenes.georeference import read_georeference
from olvae.data.scenes.rasters import find_scenes
from olvae.data.scenes.scene_source import SceneSource
from olvae.data.shards.index import INDEX, Index, known_shards
from olvae.data.shards.latent_source import LatentSource, PairSource
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess, eval_sample
from olvae.data.volumes.volume_source import VolumeSlices, find_volumes
from olvae.models.loading.targets import find_target
from tests.conftest import tiny_config
from tests.data.images import picture, saved, write_shard, write_tar
from tests.data.pixels.files import exr, npy, npz, png, tiff, values
from tests.data.scenes.geotiffs import geotiff, ground
from tests.data.volumes.scans import WINDOW, dicom, hounsfield, nifti, nrrd_file
from tests.export.latents import encode
from tests.export.rasters import jpeg_2000
from tests.export.tiny import tiny_litevae
from tests.fuzz.mutations import CHANGES, mutate

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]

INPUTS = int(os.environ.get("FUZZ_INPUTS", "10000"))

DATABASE = DirectoryBasedExampleDatabase(Path(__file__).parent / "examples")


def inputs(share: float) -> Callable[[Any], Any]:
    """A test of this share of the inputs, each of changes to one of the seeds."""

    count, checks = max(1, round(share * INPUTS)), list(HealthCheck)
    limit = settings(
        max_examples=count, deadline=None, database=DATABASE, suppress_health_check=checks
    )

    def decorate(test: Any) -> Any:
        limited = limit(
            example(changes=[], which=0)(given(changes=CHANGES, which=st.integers(0, 999))(test))
        )
        limited.share = share
        return limited

    return decorate


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
IMAGES = [
    *(
        (f"a.{kind.lower()}", saved(picture(0), kind))
        for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    ),
    *((("a.avif", saved(picture(0), "AVIF")),) if features.check("avif") else ()),
    ("sixteen.png", saved(Image.fromarray(np.full((20, 24), 25_700, dtype=np.uint16)), "PNG")),
    ("alpha.png", saved(picture(0).convert("RGBA"), "PNG")),
    ("palette.png", saved(picture(0).quantize(4), "PNG", transparency=0)),
    ("progressive.jpg", saved(picture(0), "JPEG", progressive=True)),
    ("turned.jpg", saved(picture(0), "JPEG", exif=TURNED)),
    ("packed.tif", saved(picture(0), "TIFF", compression="tiff_lzw")),
    ("a.npy", npy(np.zeros((20, 24, 3), dtype=np.uint8))),
]


U16, F32 = values("uint16"), values("float32")
ARRAYS = [
    ("a.npy", npy(U16)),
    ("a.npz", npz(F32)),
    ("a.png", png(U16)),
    ("a.tif", tiff(U16, "rgb")),
    ("packed.tif", tiff(U16, "rgb", compression="lzw", tile=(16, 16))),
    ("float.tif", tiff(F32, "rgb", compression="deflate", predictor=3)),
    ("pages.tif", tiff(np.moveaxis(U16, -1, 0))),
]


@inputs(0.1)
def test_mutated_arrays_are_read_or_refused(watch, tmp_path_factory, changes, which):
    name, seed = (*ARRAYS, ("a.exr", half(tmp_path_factory.getbasetemp())))[
        which % (len(ARRAYS) + 1)
    ]
    data = mutate(seed, changes, [content for _, content in ARRAYS])
    stated = PixelRange.from_node({"pairs": [0, 65535], "outside": "clip"})
    watch(lambda: RandomScaleCrop(16)(Photo(data, name, 3, stated), np.random.default_rng(0)))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """A folder with two good scenes, which a mutated one is put between, and files to mutate."""
    folder = tmp_path_factory.mktemp("scenes")
    array = ground(0, (96, 130))
    array[:40, :40] = 0
    options = ({"compress": "deflate"}, {"interleave": "band"}, {"driver": "COG", "blocksize": 128})
    for number, kind in enumerate(options):
        geotiff(folder / "seeds" / f"{number}.tif", array, nodata=0, **kind)
    jpeg_2000(folder / "seeds" / "a.jp2", array)
    for name in ("good", "other"):
        geotiff(folder / "all" / f"{name}.tif", array, nodata=0)
    return folder / "all", [path.read_bytes() for path in sorted((folder / "seeds").iterdir())]


@inputs(0.1)
def test_mutated_scenes_are_read_or_refused(watch, scenes, changes, which):
    folder, seeds = scenes
    file = folder / "mutated.tif"
    file.write_bytes(mutate(seeds[which % len(seeds)], changes, seeds))

    def use() -> None:
        stated = PixelRange.from_node({"pairs": [0, 10_000], "outside": "clip"})
        kept = read_georeference(file, stated)
        if kept is not None:
            tifffile.imwrite(BytesIO(), np.zeros((1, 2), np.float32), extratags=kept.tags)
        (scene,) = find_scenes(file, 4)
        if scene.broken is None:
            for place in ((0, 0), (scene.height - 1, scene.width - 1)):
                with suppress(UnreadableImageError):
                    scene.read((*place, 1, 1))
        source = SceneSource(
            folder, 64, 1, channels=4, max_unreadable=1.0, range=stated.as_node(), max_nodata=1.0
        )
        list(islice(source.stream(which, 0, LoaderProcess()), 4))
        list(islice(source.once(LoaderProcess()), 4))

    try:
        watch(use)
    finally:
        file.unlink()


@cache
def half(folder: Path) -> bytes:
    return exr({"RGB": values("float16")}, folder / "half.exr")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    """A small file of each format of volumes."""
    folder = tmp_path_factory.mktemp("scans")
    small = hounsfield(0, (4, 8, 9))
    return [
        nifti(folder / "a.nii", small),
        nifti(folder / "a.nii.gz", small),
        nrrd_file(folder / "a.nrrd", small),
        nrrd_file(folder / "raw.nrrd", small, encoding="raw"),
        dicom(folder / "a.dcm", small[1]),
        dicom(folder / "frames.dcm", small),
    ]


@inputs(0.1)
def test_mutated_volumes_are_read_or_refused(watch, scans, tmp_path_factory, changes, which):
    folder = tmp_path_factory.getbasetemp() / "volumes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seed = scans[which % len(scans)]
    others = [path.read_bytes() for path in scans]
    (folder / seed.name).write_bytes(mutate(seed.read_bytes(), changes, others))
    stated = PixelRange.from_node({"pairs": WINDOW, "outside": "clip"})

    def use() -> None:
        for axis in ("acquired", "sagittal"):
            images = VolumeSlices(find_volumes(folder), stated, axis)
            for number in (0, len(images) - 1):
                images[number].read()
        for volume in images.volumes:
            values = np.zeros(volume.shape, dtype=np.float32)
            volume.write(values, folder / "written")

    watch(use)


@inputs(0.1)
def test_mutated_images_are_read_or_refused(watch, changes, which):
    name, seed = IMAGES[which % len(IMAGES)]
    data = mutate(seed, changes, [content for _, content in IMAGES])

    def use() -> None:
        eval_sample(Photo(data, name), "a", EvalTransform(16))
        RandomScaleCrop(16)(Photo(data, name), np.random.default_rng(0))

    watch(use)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with a good shard, which a mutated one is put beside."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "good.tar", range(3))
    return folder


@inputs(0.15)
def test_mutated_shards_are_read_or_refused(watch, shards, changes, which):
    import gzip

    file = shards / ("mutated.tar.gz" if which % 4 == 0 else "mutated.tar")
    seed = write_shard(shards / "seed.tar", range(3)).read_bytes()
    (shards / "seed.tar").unlink()
    data = mutate(seed, changes, [seed, bytes(3000), IMAGES[1][1]])
    if which % 4 == 0:
        data = gzip.compress(data, 1)
        data = mutate(data, changes[:1], [data]) if which % 8 == 0 else data
    file.write_bytes(data)

    def use() -> None:
        for entry in read_shard(Shard(str(file))):
            if not isinstance(entry, ReadError):
                try:
                    Photo(entry.data, entry.name).read()
                except UnreadableImageError:
                    continue
        source = WebDatasetSource(
            str(shards / "good.tar"), 8, 1, val_shards=str(file), max_unreadable=1.0
        )
        assert len(list(source.val_loader())) <= 1000
        source = WebDatasetSource(
            [str(file)], 8, 1, val_shards=str(shards / "good.tar"), max_unreadable=1.0
        )
        list(islice(source.stream(0, 0, LoaderProcess()), 8))

    try:
        watch(use)
    finally:
        file.unlink()


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture(scope="module")
def model() -> LiteVAE:
    torch.manual_seed(0)
    return tiny_litevae()


@pytest.fixture(scope="module")
def checkpoints(
    model, tmp_path_factory
) -> tuple[Path, list[tuple[bytes, dict[str, bytes] | None]]]:
    """A folder with the config, and files of torch: whole,
    or a pickle with the other records of its archive."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = tiny_config()
    save({"model": config["model"]}, folder / "a.yaml")
    content = {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "hyper_parameters": {"a": [1, 2.5, None]},
        "s": {1, 2},
    }
    torch.save(content, folder / "seed.pt")
    seeds: list[tuple[bytes, dict[str, bytes] | None]] = [((folder / "seed.pt").read_bytes(), None)]
    small = dict(islice(model.state_dict().items(), 3))
    for one in (
        content,
        small,
        {**small, "x": bytearray(8)},
        {**small, "x": Harmful()},
        {**small, "x": np.zeros(3)},
    ):
        torch.save(one, folder / "seed.pt")
        with zipfile.ZipFile(folder / "seed.pt") as archive:
            records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        seeds.append((records.pop("data.pkl"), records))
    (folder / "seed.pt").unlink()
    return folder, seeds


@inputs(0.2)
def test_mutated_checkpoints_are_read_or_refused(watch, checkpoints, changes, which):
    folder, seeds = checkpoints
    seed, records = seeds[which % len(seeds)]
    data = mutate(
        seed, changes, [content for content, _ in seeds] + [pickle.dumps(bytearray(3), 2)]
    )
    file = folder / "a.ckpt"
    if records is None:
        file.write_bytes(data)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {"data.pkl": data, **records}.items():
                archive.writestr(f"a/{name}", content)

    watch(
        lambda: (read_weights(file), LiteVAE.from_pretrained(file, allow_mismatch=which % 2 == 0))
    )


@inputs(0.1)
def test_mutated_safetensors_are_read_or_refused(watch, model, tmp_path_factory, changes, which):
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    state = {f"olvae.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, file, metadata={"format": "pt", "config": json.dumps(model.export_config())})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if which % 3:  # the header alone, with its right length
        header = mutate(whole[8 : 8 + length], changes, [whole[8 : 8 + length]])
        data = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    else:
        data = mutate(whole, changes, [whole])
    file.write_bytes(data)

    watch(lambda: find_target(file, allow_mismatch=which % 2 == 0).load())


@inputs(0.1)
def test_mutated_configs_are_read_or_refused(watch, model, tmp_path_factory, changes, which):
    folder = tmp_path_factory.getbasetemp() / "config"
    shutil.rmtree(folder, ignore_errors=True)
    if which % 2:
        model.save_pretrained(folder)
        file = folder / "config.json"
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "a.safetensors")
        file = folder / "a.yaml"
        save({"model": tiny_config()["model"]}, file)
    seed = file.read_bytes()
    others = [seed, b"&a [*a, *a]", b"${a}", b"include: a.yaml\n", b"!!python/name:os.system"]
    file.write_bytes(mutate(seed, changes, others))

    watch(lambda: find_target(folder, allow_mismatch=which % 3 == 0).load())


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A small folder of ``olvae encode --images --flip``."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "photos").mkdir()
    for number in range(4):
        picture(number).save(folder / "photos" / f"{number}.png")
    encode(folder / "photos", folder / "seed", shard_size=2, images=True, flip=True)
    return folder


@inputs(0.1)
def test_mutated_latents_are_read_or_refused(watch, latents, changes, which):
    import tarfile

    folder = latents / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(latents / "seed", folder)
    shard = sorted(folder.glob("*.tar"))[0]
    if which % 4 == 0:
        file = folder / "stats.json"
        file.write_bytes(mutate(file.read_bytes(), changes, [file.read_bytes()]))
    elif which % 4 == 1:
        shard.write_bytes(mutate(shard.read_bytes(), changes, [shard.read_bytes()]))
    else:
        with tarfile.open(shard) as archive:
            files = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
        one = which // 4 % len(files)
        files[one] = (
            files[one][0],
            mutate(files[one][1], changes, [content for _, content in files]),
        )
        write_tar(shard, files)

    def use() -> None:
        latents = LatentSource(folder, 2, max_unreadable=1.0, per_channel=which % 2 == 0)
        for source in (latents, PairSource(folder, 2, max_unreadable=1.0)):
            list(source.val_loader())
            list(islice(iter(source.train_loader()), 6))

    watch(use)


@inputs(0.05)
def test_mutated_indexes_are_read_or_refused(watch, tmp_path_factory, changes, which):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        if not (folder / f"{name}.tar").is_file():
            write_shard(folder / f"{name}.tar", range(3))
    shards = {f"{name}.tar": {"images": 3, "bytes": 10, "sha256": "0" * 64} for name in ("a", "b")}
    seed = json.dumps(
        {"version": 1, "images": 6, "shards": shards, "unreadable": [], "plan": None}
    ).encode()
    (folder / INDEX).write_bytes(mutate(seed, changes, [seed, b"[" * 3000]))

    def use() -> None:
        known_shards([str(folder / "a.tar")])
        source = WebDatasetSource(folder, 8, 1, max_unreadable=1.0)
        list(islice(iter(source.val_loader()), 8))
        list(islice(source.stream(0, 0, LoaderProcess()), 8))
        Index.read(folder / INDEX)

    watch(use)
