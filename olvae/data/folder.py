"""A folder of images, nested as deep as you like."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from olvae.data.pixels import Picture, read_picture
from olvae.data.source import ImageList, Source
from olvae.data.transforms import RandomScaleCrop

__all__ = ["EXTENSIONS", "Files", "FolderSource", "find_images"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".npy")


class Files(ImageList):
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path], channels: int = 3) -> None:
        self.paths = list(paths)
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        return read_picture(self.paths[index], self.channels)


class FolderSource(Source):
    """Images of a folder; validation and test images are a folder of their own, or a fixed part of the first.

    Args:
        root: the folder, searched at any depth for files with an image's extension.
        size, batch_size, num_workers: see :class:`Source`.
        val_root: a folder of validation and test images.
        val_fraction: without val_root, the part of the images that is held out. Which ones is decided by a
            hash of the path below root, so that it does not change when images are added.
        min_fraction, filters, flip: see :class:`RandomScaleCrop`.
        channels: of the images; see :func:`read_picture` for what 1, 3, 4 and any other number mean.

    Raises:
        FileNotFoundError: a folder is missing, or has no images.
        ValueError: a batch is larger than the data.
    """

    def __init__(
        self,
        root: str,
        size: int,
        batch_size: int,
        num_workers: int = 0,
        val_root: str | None = None,
        val_fraction: float = 0.05,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ("box", "bilinear", "bicubic", "lanczos"),
        flip: bool = True,
        channels: int = 3,
    ) -> None:
        paths = find_images(root)
        if val_root is not None:
            train, val = paths, find_images(val_root)
        else:
            if not 0.0 < val_fraction < 1.0:
                raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
            train, val = _split(Path(root), paths, val_fraction)
        super().__init__(
            Files(train, channels),
            Files(val, channels),
            Files(val, channels),
            size,
            batch_size,
            num_workers,
            RandomScaleCrop(size, min_fraction, filters, flip),
            channels=channels,
        )


def find_images(root: str | Path) -> list[Path]:
    """Every file below ``root`` with an image's extension, sorted; hidden files are left out.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise FileNotFoundError(f"{root}: no images in this folder (looked for {', '.join(EXTENSIONS)} at any depth)")
    return paths


def _split(root: Path, paths: Sequence[Path], fraction: float) -> tuple[list[Path], list[Path]]:
    """Hold out about ``fraction`` of the paths, at least one, by the hash of their names."""
    if len(paths) < 2:
        raise ValueError(f"{root}: one image can't be split into training and validation: set data.params.val_root")
    root = root.expanduser()

    def place(path: Path) -> float:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    held_out = {path for path in paths if place(path) < fraction} or {min(paths, key=place)}
    train = [path for path in paths if path not in held_out]
    return train, [path for path in paths if path in held_out]
