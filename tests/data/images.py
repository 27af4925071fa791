"""Small pictures and shards of them for the tests of data sources."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def noise(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_photos(root: Path, names: Sequence[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(root / name)
    return root


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def encoded(seed: int, file_format: str = "JPEG") -> bytes:
    return saved(picture(seed), file_format)


def close_folders(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """As if permissions kept them from being listed, which root, as tests may run,
    is allowed everywhere."""
    scandir = os.scandir

    def refused(path: str | Path) -> object:
        if Path(path) in folders:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def rewrite(path: Path, changed: Mapping[str, bytes | None]) -> None:
    """Other bytes for some files of a shard; None leaves one out."""
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]
    write_tar(path, [(n, new) for n, old in files if (new := changed.get(n, old)) is not None])


def write_shard(
    path: Path, numbers: Sequence[int], broken: Mapping[int, bytes] | None = None
) -> Path:
    """JPEGs ``NNNN.jpg``, each with a ``NNNN.json``; ``broken`` has other bytes for some."""
    files = []
    for n in numbers:
        files += [
            (f"{n:04d}.jpg", (broken or {}).get(n, encoded(n))),
            (f"{n:04d}.json", json.dumps({"n": n}).encode()),
        ]
    return write_tar(path, files)


def write_shards(folder: Path, counts: Sequence[int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    first, paths = 0, []
    for i, count in enumerate(counts):
        paths.append(write_shard(folder / f"{i:03d}.tar", range(first, first + count)))
        first += count
    return paths


def write_classes(folder: Path, counts: Sequence[int]) -> Path:
    """Shards of JPEGs ``NNNN.jpg``, each with a ``NNNN.cls``."""
    folder.mkdir()
    first = 0
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        groups = [
            ((f"{n:04d}.jpg", encoded(n)), (f"{n:04d}.cls", f"{n % 5}".encode())) for n in numbers
        ]
        write_tar(folder / f"{shard:03d}.tar", [file for group in groups for file in group])
        first += count
    return folder


def take(loader: Any, count: int) -> list[dict[str, Any]]:
    return list(islice(loader, count))


def keys_of(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) if k != "key" else x[k] == y[k] for k in x)
        for x, y in zip(a, b, strict=True)
    )


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)


def members(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """By name in the source: the file and what is said about it; read with tarfile."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive}
        for name, data in files.items():
            if name.endswith(".json"):
                details = json.loads(data)
                details |= (
                    {"cls": files[name[:-4] + "cls"].decode()} if name[:-4] + "cls" in files else {}
                )
                (image,) = (
                    n for n in files if n.startswith(name[:-4]) and n[-4:] not in ("json", ".cls")
                )
                assert details["name"] not in found
                found[details["name"]] = (files[image], {**details, "file": image})
    return found
