"""Read the images of a folder at any depth, of a pattern, or of a list of files."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from olvae.config.reading import EXTENSIONS, is_image_file
from olvae.data.dataset import VAL_FRACTION, ImageDataset, MappedSource, bound_held_out
from olvae.data.image import ALL_FILTERS, Photo, RandomScaleCrop
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, RangeNode, Size
from olvae.data.read_errors import ReadError
from olvae.files import file_state, legible, nearest_path, warn_once

ESCAPED = re.compile(r"\[([*?[])\]")  # a character that a pattern means as it is: glob.escape's
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "training"), ("val", "validation", "test")


class Files(ImageDataset):
    """Pictures in files; a key is the path below ``root``, by default the deepest folder that holds all of them.

    ``closed`` are folders that could not be opened.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        channels: int = 3,
        closed: Sequence[ReadError] = (),
        pixel_range: PixelRange = EIGHT_BITS,
        root: str | Path | None = None,
    ) -> None:
        self.paths = list(paths)
        self.channels, self.pixel_range = channels, pixel_range
        self.closed = closed
        folders = {path.parent for path in paths} if root is None else [root]
        self.root = os.path.commonpath([os.path.abspath(folder) for folder in folders])  # noqa: PTH100

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return legible(os.path.relpath(self.paths[index], self.root))

    def state(self, index: int) -> str:
        return f"{self.key(index)}\0{file_state(self.paths[index])}"

    def __getitem__(self, index: int) -> Photo:
        return Photo(path := self.paths[index], legible(str(path)), self.channels, self.pixel_range)


class FolderSource(MappedSource):
    """Images of a folder; validation images come from another folder, or are a fixed part of the first.

    Args:
        root: a folder, searched at any depth for files with an image's extension; a pattern, for example
            ``photos/**/*.jpg``; or a .txt file with one path per line, relative to the file's folder, in which lines
            that begin with # are comments.
        size, batch_size, num_workers, max_unreadable, range: see :class:`~olvae.data.source.Source`.
        val_root: the validation and test images, in the same three ways. Without it, if root has the folders
            ``train`` and ``val`` (or ``validation``, or ``test``), those are the two parts.
        val_fraction: without either, the share of the images that is held out, by a hash of the path below root, so
            that it does not change when images are added. By default 5 %, and at least 20 images or, of
            fewer than 100, a fifth: up to about 400 images, adding some may change which ones.
        min_fraction, filters, flip, shuffle_channels: see :class:`RandomScaleCrop`.
        channels: of the images: 1, 3, 4 or any other number, see :func:`~olvae.data.image.read_picture`.

    Raises FileNotFoundError: a folder is missing, or has no images. ValueError: a batch is larger than the data.
    """

    def __init__(
        self,
        root: str | Path,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_root: str | Path | None = None,
        val_fraction: float | None = None,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ALL_FILTERS,
        flip: bool = True,
        shuffle_channels: float = 0.0,
        channels: int = 3,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
    ) -> None:
        root, val_root = split_folders(root) if val_root is None else (root, val_root)
        train = find_images(root)
        train, val = (
            _split(root, train, val_fraction)
            if val_root is None
            else (train, find_images(val_root))
        )
        values = PixelRange.from_node(range)
        parts = (
            Files(train, channels, (), values, find_folder(root)),
            Files(val, channels, (), values, find_folder(root if val_root is None else val_root)),
        )
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels)
        super().__init__(
            *parts, transform, batch_size, num_workers, channels, max_unreadable, range=range
        )


def find_images(root: str | Path, closed: list[ReadError] | None = None) -> list[Path]:
    """Find files of images: in a folder at any depth, by a pattern, or listed in a text file.

    Folders and patterns give files with an image's extension, sorted, through symbolic links as well, without hidden
    ones, or a .npz or .exr beside another image of its name. A list gives its paths in its order, whether they exist.

    ``closed``: gets the folders below root that can't be opened; the log names each once.

    Raises FileNotFoundError: the folder or list is missing or empty. PermissionError: root can't be opened.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        paths = _without_sidecars(sorted(_walk(path, [] if closed is None else closed)))
    elif path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{root}: no such list of images")
        text = path.read_bytes().decode(
            "utf-8-sig", "surrogateescape"
        )  # of names, which may be other than UTF-8
        lines = [
            line
            for line in map(str.strip, re.split(r"[\r\n]+", text))
            if line and not line.startswith("#")
        ]
        paths = [path.parent / os.path.expanduser(line) for line in lines]  # noqa: PTH111  (~x may be a name)
        if not paths:
            raise FileNotFoundError(f"{root}: this list names no file: write one path per line")
    elif glob.has_magic(str(root)):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  (a Path's own needs the folder apart)
        paths = _without_sidecars(sorted(found for name in names if _is_image(found := Path(name))))
    else:
        what = (
            "this is a file: name a folder, a pattern or a .txt list"
            if path.exists()
            else "no such folder"
        )
        raise FileNotFoundError(f"{root}: {what}{'' if path.exists() else nearest_path(path)}")
    if not paths:
        where = "in this folder" if path.is_dir() else "of this name"
        raise FileNotFoundError(f"{root}: no images {where} (looked for {', '.join(EXTENSIONS)})")
    return paths


def find_folder(root: str | Path) -> Path | None:
    """The folder that a root names, not by a pattern or a list."""
    return path if (path := Path(root).expanduser()).is_dir() else None


def _walk(folder: Path, closed: list[ReadError]) -> Iterator[Path]:
    """Find images at any depth; each folder once, however many links lead to it."""

    def leave_out(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise PermissionError(
                f"{folder}: this folder can't be opened: {error.strerror}"
            ) from error
        name, reason = legible(str(error.filename)), error.strerror or str(error)
        closed.append(ReadError(name, reason, lost=False))
        warn_once(f"skipped the folder {name} and everything in it: {reason}")

    seen = set()
    for top, folders, files in os.walk(folder, onerror=leave_out, followlinks=True):
        real = Path(top).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in files if _is_image(path := Path(top) / name))


def _is_image(path: Path) -> bool:
    try:
        return is_image_file(path.name) and path.is_file()
    except OSError:  # in a folder that can be listed but not entered: counted as unreadable later
        return True


def _without_sidecars(paths: list[Path]) -> list[Path]:
    """Leave out features or depths that have a picture beside them: a.npz and a_0048x0040_sd.npz of a.jpg."""
    if not (beside := {path for path in paths if path.suffix.lower() in (".npz", ".exr")}):
        return paths
    pictures = {path.with_suffix("") for path in paths if path not in beside}

    def is_beside(path: Path) -> bool:
        words = path.stem.split("_")
        return any(path.with_name("_".join(words[: i + 1])) in pictures for i in range(len(words)))

    return [path for path in paths if path not in beside or not is_beside(path)]


def split_folders(root: str | Path) -> tuple[str | Path, str | Path | None]:
    """The folders of training and of validation images, if a data set has both."""
    folder = Path(root).expanduser()
    train, held_out = (
        [str(folder / name) for name in names if os.path.isdir(folder / name)]  # noqa: PTH112  (False where closed)
        for names in (TRAIN_FOLDERS, VAL_FOLDERS)
    )
    return (train[0], held_out[0]) if train and held_out else (root, None)


def _split(
    root: str | Path, paths: Sequence[Path], fraction: float | None
) -> tuple[list[Path], list[Path]]:
    """Hold out about ``fraction`` of the paths, by the hash of their names; by default as hold_out()."""
    if len(paths) < 2:
        raise ValueError(
            f"{root}: one image can't be split into training and validation: set data.params.val_root"
        )
    below = _fixed_part(Path(root).expanduser())
    places = {path: _place(below, path) for path in paths}
    share = sum(place < (fraction or VAL_FRACTION) for place in places.values())
    held_out = set(
        sorted(paths, key=places.__getitem__)[: bound_held_out(share, len(paths), fraction)]
    )
    return [path for path in paths if path not in held_out], [
        path for path in paths if path in held_out
    ]


def _fixed_part(root: Path) -> Path:
    """The folder below which names are hashed: root, that of a list, or of a pattern the parts before it varies."""
    if root.is_dir():
        return root
    fixed = takewhile(lambda part: not glob.has_magic(ESCAPED.sub("", part)), root.parts)
    return (
        root.parent
        if root.suffix.lower() == ".txt"
        else Path(*(ESCAPED.sub(r"\1", part) for part in fixed))
    )


def _place(root: Path, path: Path) -> float:
    """A number in [0, 1) for each path: the hash of its name below root."""
    name = path.relative_to(root) if path.is_relative_to(root) else path
    digest = hashlib.sha256(name.as_posix().encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
