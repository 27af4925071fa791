"""The contract of a source: batches, order and processes make no difference.

It continues anywhere, at any batch size, on two ranks, by the seed.
"""

from functools import partial
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from olvae.data.dataset import SamplePhotographs
from olvae.data.hub import HuggingFaceSource, TorchvisionSource
from olvae.data.mix import MixSource
from olvae.data.picture_folder import FolderSource
from olvae.data.scenes.scene_source import SceneSource
from olvae.data.shards.latent_source import LatentSource, PairSource
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess, Sample, Source
from olvae.data.volumes.volume_source import VolumeSource
from tests.data.images import (
    be_rank,
    encoded,
    keys_of,
    same,
    saved,
    take,
    write_classes,
    write_shards,
    write_tar,
)
from tests.data.scenes.geotiffs import geotiff, ground
from tests.data.volumes.scans import WINDOW, hounsfield, nifti, nrrd_file
from tests.export.latents import Blocks, encode

COUNTS = (5, 9, 1, 14, 7, 3, 11)  # 50 images


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """Shards of 50 images and 7 to validate, a folder of 24, scenes, volumes of 7 slices each,
    latents of 23 images beside them.
    """
    root = tmp_path_factory.mktemp("sources")
    write_shards(root / "shards", COUNTS)
    write_shards(root / "val", (4, 3))
    (root / "photos").mkdir()
    for n in range(24):
        # one is broken
        (root / "photos" / f"{n:02d}.jpg").write_bytes(encoded(n)[: 100 if n == 3 else None])
    for n in range(3):
        array = ground(n, channels=3)
        array[:40, :20] = 0
        geotiff(root / "scenes" / f"{n}.tif", array, nodata=0)
    for n in range(2):
        nifti(root / "scans" / f"{n}.nii.gz", hounsfield(n))
        nrrd_file(root / "scans" / f"{n}.nrrd", hounsfield(2 + n))
    images = write_classes(root / "classes", (7, 9, 4, 3))
    encode(images, root / "latents", Blocks(), size=32, flip=True, dtype="float32", images=True)
    return root


def folder(root: Path, **arguments: Any) -> Source:
    return FolderSource(root / "photos", 16, val_fraction=0.2, max_unreadable=1.0, **arguments)


def scenes(root: Path, **arguments: Any) -> Source:
    return SceneSource(root / "scenes", 16, max_unreadable=1.0, range=[0, 10_000], **arguments)


def volumes(root: Path, **arguments: Any) -> Source:
    return VolumeSource(root / "scans", 16, range=WINDOW, val_fraction=0.3, **arguments)


def samples(_: Path, **arguments: Any) -> Source:
    return SamplePhotographs(16, **arguments)


def data_set(_: Path, **arguments: Any) -> Source:
    fake = {"size": 30, "image_size": [3, 24, 20]}
    node = {"target": "torchvision.datasets.FakeData", "params": fake}
    return TorchvisionSource(node, 16, **arguments)


def known_shards(root: Path, **arguments: Any) -> Source:
    return WebDatasetSource(
        str(root / "shards"), 16, val_shards=str(root / "val"), shuffle=6, **arguments
    )


def unknown_shards(root: Path, **arguments: Any) -> Source:
    urls = [f"pipe:cat {path}" for path in sorted((root / "shards").iterdir())]
    return WebDatasetSource(urls, 16, val_shards=str(root / "val"), shuffle=6, **arguments)


def latents(root: Path, **arguments: Any) -> Source:
    return LatentSource(root / "latents", shuffle=5, **arguments)


def pairs(root: Path, **arguments: Any) -> Source:
    return PairSource(root / "latents", size=16, shuffle=5, **arguments)


def mix(root: Path, **arguments: Any) -> Source:
    photos = {"root": str(root / "photos"), "size": 16, "batch_size": 1, "max_unreadable": 1.0}
    shards = {
        "shards": str(root / "shards"),
        "size": 16,
        "batch_size": 1,
        "val_shards": str(root / "val"),
    }
    nodes = [
        {"target": "olvae.data.picture_folder.FolderSource", "params": photos},
        {
            "target": "olvae.data.shards.webdataset.WebDatasetSource",
            "params": {**shards, "shuffle": 4},
        },
    ]
    return MixSource(nodes, size=16, weights=[1, 2], max_unreadable=1.0, **arguments)


@pytest.fixture(
    params=[
        folder,
        scenes,
        volumes,
        samples,
        data_set,
        known_shards,
        unknown_shards,
        latents,
        pairs,
        mix,
    ],
    ids=lambda make: make.__name__,
)
def make(request, material) -> "partial[Source]":
    return partial(request.param, material, batch_size=4)


def same_samples(a: list[Sample], b: list[Sample]) -> bool:
    return all(
        (x.key, x.label, x.errors) == (y.key, y.label, y.errors)
        and torch.equal(x.image, y.image)
        and (x.moments is None or torch.equal(x.moments, y.moments))
        for x, y in zip(a, b, strict=True)
    )


FOLLOWING = 12
"""Samples that are compared after a place: twice what a source shuffles at a time."""


@pytest.mark.parametrize("place", [(0, 1), (1, 2), (2, 3)])
def test_a_sources_stream_continues_anywhere(make, place):
    """Within an epoch and in the next one."""
    s, process = make(), LoaderProcess(*place)
    count = 60 // place[1] + 4  # an epoch has at most 50
    whole = list(islice(s.stream(5, 0, process), count))
    for position in (0, 1, 5, 6, count // 3, count // 2 + 3, count - 10):
        expected = whole[position : position + FOLLOWING]
        assert same_samples(list(islice(s.stream(5, position, process), len(expected))), expected)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_a_sources_loader_continues_at_any_batch(make, batch_size):
    s = make(batch_size=batch_size)
    whole = take(s.train_loader(3), 9)
    for batches in (1, 2, 7):
        rest = whole[batches : batches + 3]
        assert same(take(s.train_loader(3, batches * batch_size), len(rest)), rest)
    assert not same(take(s.train_loader(4), 3), whole[:3])


@pytest.mark.parametrize("make", [scenes, volumes], indirect=True)
def test_loader_processes_make_no_difference(make):
    """Of images by number; those of shards come in another order, as each process has its own."""
    whole = take(make().train_loader(5), 6)
    rest = take(make(num_workers=2).train_loader(5, 3 * 4), 3)
    assert same(rest, whole[3:])


@pytest.mark.parametrize(
    "make", [folder, known_shards, pytest.param(mix, marks=pytest.mark.slow)], indirect=True
)
def test_loader_processes_continue_for_each_of_two_ranks(make, monkeypatch):
    """With two workers per rank; the ranks share the validation images."""
    seen: list[set[str]] = []
    validated: list[str] = []
    for rank in (0, 1):
        be_rank(monkeypatch, rank)
        s = make(batch_size=2, num_workers=2)
        whole = take(s.train_loader(3), 8)
        assert same(take(s.train_loader(3, 3 * 2 * 2), 5), whole[3:])
        seen.append({*keys_of(whole[:4])})
        validated += keys_of(s.val_loader())
    if make.func is not mix:  # of the first epoch; in the folder, one replaces the broken one
        assert len(seen[0] & seen[1]) <= (make.func is folder)
    monkeypatch.undo()
    assert sorted(validated) == sorted(keys_of(make().val_loader()))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_is_each_image_once_in_order(make, batch_size):
    s = make()
    keys = keys_of(s.test_loader(batch_size))
    assert keys == [sample.key for sample in s.once(LoaderProcess()) if sample.image is not None]
    assert len(keys) == len(set(keys)) == s.val_images - len(s.unreadable.lost)


@pytest.mark.parametrize(
    "kind", [FolderSource, WebDatasetSource, TorchvisionSource, HuggingFaceSource]
)
def test_colours_are_changed_for_training_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    colour = (250, 100, 0)
    files = [(f"{n}.png", saved(Image.new("RGB", (20, 20), colour), "PNG")) for n in range(8)]
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for name, content in files:
        (tmp_path / "photos" / "one" / name).write_bytes(content)
    photos, shard = str(tmp_path / "photos"), str(write_tar(tmp_path / "0.tar", files))
    where: dict[type[Source], dict[str, Any]] = {
        FolderSource: {"root": photos},
        WebDatasetSource: {"shards": shard, "val_shards": shard},
        TorchvisionSource: {
            "dataset": {"target": "torchvision.datasets.ImageFolder", "params": {"root": photos}}
        },
        HuggingFaceSource: {"path": "imagefolder", "data_dir": photos},
    }

    def colours(loader: Any) -> set[tuple[int, ...]]:
        return {
            tuple(image[:, 0, 0].tolist())
            for batch in islice(loader, 20)
            for image in batch["image"]
        }

    s = kind(size=16, batch_size=2, shuffle_channels=0.5, **where[kind])
    assert colours(s.train_loader()) == set(permutations(colour))
    assert colours(s.val_loader()) == {colour}
    assert colours(kind(size=16, batch_size=2, **where[kind]).train_loader()) == {colour}
    darker = kind(size=16, batch_size=2, augment={"intensity_scale": 0.5}, **where[kind])
    assert len(colours(darker.train_loader())) > 2
    assert colours(darker.val_loader()) == {colour}
