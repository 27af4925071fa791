"""Read the images of a folder at any depth, of a pattern, or of a list of files."""

import glob
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from olvae.data.dataset import (
    ONE_GROUP,
    VAL_FRACTION,
    ImageDataset,
    MappedSource,
    bound_held_out,
    usual_groups,
)
from olvae.data.image import ALL_FILTERS, Augment, Photo, RandomScaleCrop
from olvae.data.order.groups import FILE, Grouping, look_like_slices
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, RangeNode, Size
from olvae.data.places import EXTENSIONS, is_image_file, is_shard, names_volume
from olvae.data.read_errors import ReadError
from olvae.files import counted, file_state, legible, nearest_path, warn_once

ESCAPED = re.compile(r"\[([*?[])\]")  # a character that a pattern means as it is: glob.escape's
# Names of the two parts of a data set, in upper or lower case; an earlier one comes first.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test")
# What a folder has besides its images.
BROKEN = "links to no file"
OF_OTHERS = "shards or volumes, which a pattern of their names takes"


class Files(ImageDataset):
    """Pictures in files; a key is the path below ``root``.

    By default root is the deepest folder that holds all of them. ``closed`` are folders that could
    not be opened. Names of groups are found in paths below ``below``, by default root.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        channels: int = 3,
        closed: Sequence[ReadError] = (),
        pixel_range: PixelRange = EIGHT_BITS,
        root: str | Path | None = None,
        below: Path | None = None,
    ) -> None:
        self.paths = list(paths)
        self.channels = channels
        self.pixel_range = pixel_range
        self.closed = closed
        folders = {path.parent for path in paths} if root is None else [root]
        absolute = [os.path.abspath(folder) for folder in folders]  # noqa: PTH100
        self.root = os.path.commonpath(absolute)
        self.below = below

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        below = os.path.relpath(self.paths[index], self.root)
        return legible(Path(below).as_posix())

    def name(self, index: int) -> str:
        if self.below is None:
            return self.key(index)
        return name_below(self.paths[index], self.below)

    def state(self, index: int) -> str:
        return f"{self.key(index)}\0{file_state(self.paths[index])}"

    def identity(self, index: int) -> str:
        # The time is left out: it is another one in a copy.
        return f"{self.key(index)} {file_state(self.paths[index]).partition(' ')[0]}"

    def __getitem__(self, index: int) -> Photo:
        path = self.paths[index]
        return Photo(path, legible(str(path)), self.channels, self.pixel_range)


class FolderSource(MappedSource):
    """Images of a folder; validation images are in another folder, or a fixed part of the first.

    Args:
        root: a folder, searched at any depth for files with an image's extension; a pattern, for
            example ``photos/**/*.jpg``; or a .txt file with one path per line, relative to the
            file's folder, in which lines that begin with # are comments.
        size, batch_size, num_workers, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        val_root: the validation and test images, in the same three ways. Without it, if root has
            the folders ``train`` and ``val`` (or ``valid``, ``validation``, or ``test``, in any
            case), those are the two parts; the log names what else is there.
        val_fraction: without either, the share of the images that is held out, by a hash of the
            path below root, so that it does not change when images are added. By default 5 %, at
            least 20 images or, of fewer than 100, a fifth, and at most 10,000: up to about 400
            images, and above 200,000, adding some may change which ones.
        hold_out_by: which images are held out together: each ``file`` alone; those of a ``folder``;
            or those in whose paths a regular expression finds the same ``group``, for example
            ``(?P<group>patient\\d+)``. Whole groups are held out, by a hash of the group's name,
            until they have the share's images.
        min_fraction, filters, flip, shuffle_channels, augment: see :class:`RandomScaleCrop`.
        channels: of the images: 1, 3, 4 or any other number, see
            :func:`~olvae.data.image.read_picture`.

    Raises FileNotFoundError: a folder is missing, or has no images. ValueError: a batch is larger
    than the data.
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
        hold_out_by: str = FILE,
        augment: Augment | None = None,
    ) -> None:
        # The files of both parts: of two folders, or of one, a fixed part of it held out.
        train_paths, val_paths = find_parts(root, val_root, val_fraction, hold_out_by)
        if val_root is None:
            say_parts(root, "trains on {train}, and {val} is held out")
            root, val_root = split_folders(root)
        own_split = val_root is None
        if val_root is None:
            val_root = root
            self.note_bound(len(val_paths), val_fraction)

        values = PixelRange.from_node(range)
        train = Files(train_paths, channels, (), values, find_folder(root), naming_folder(root))
        val = Files(val_paths, channels, (), values, find_folder(val_root), naming_folder(val_root))
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels, augment)
        super().__init__(
            train,
            val,
            transform,
            batch_size,
            num_workers,
            channels,
            max_unreadable,
            range=range,
            hold_out_by=hold_out_by,
        )
        if not own_split:
            self.warn_of_shared_groups()
        elif hold_out_by == FILE:
            warn_of_slices([train, val])


def warn_of_slices(parts: Sequence[Files]) -> None:
    """Warn if files, each held out alone, look like slices of a few things by their names."""
    names: list[str] = []
    for part in parts:
        folder = f"{part.below or part.root}/"
        names += [str(path).removeprefix(folder) for path in part.paths]
    slices = look_like_slices(names)
    if slices is not None:
        warn_once(slices)


def find_images(
    root: str | Path,
    closed: list[ReadError] | None = None,
    wanted: Callable[[str], bool] = is_image_file,
    extensions: Sequence[str] = EXTENSIONS,
) -> list[Path]:
    """Find files of images: in a folder at any depth, by a pattern, or listed in a text file.

    Folders and patterns give files with an image's extension, sorted, through symbolic links as
    well, but no hidden ones, and no .npz or .exr beside another image of its name. A list gives
    its paths in its order, whether or not they exist.

    ``closed``: gets the folders below root that can't be opened; the log names each once.
    ``wanted``: whether a path is an image's; ``extensions`` are those that an error names.

    Raises FileNotFoundError: the folder or list is missing or empty. PermissionError: root can't
    be opened.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        if closed is None:
            closed = []
        paths = _without_sidecars(sorted(_walk(path, closed, wanted)))
    elif path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{root}: no such list of images")
        # File names may be other than UTF-8.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
        # os.path leaves ~x as it is if there is no such user: it may be a file's name.
        paths = [
            path.parent / os.path.expanduser(line)  # noqa: PTH111
            for line in lines
            if line and not line.startswith("#")
        ]
        if not paths:
            raise FileNotFoundError(f"{root}: this list names no file: write one path per line")
    elif glob.has_magic(str(root)):
        # Path.glob would need the pattern's folder apart.
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207
        found = (Path(name) for name in names)
        paths = _without_sidecars(sorted(one for one in found if _is_image(one, wanted)))
    elif path.exists():
        raise FileNotFoundError(f"{root}: this is a file: name a folder, a pattern or a .txt list")
    else:
        raise FileNotFoundError(f"{root}: no such folder{nearest_path(path)}")
    if not paths:
        where = "in this folder" if path.is_dir() else "of this name"
        raise FileNotFoundError(
            f"{root}: no images {where} (looked for {', '.join(extensions)}){_other_files(path)}"
        )
    return paths


def _other_files(folder: Path) -> str:
    """End of a message that counts the files of a folder by their extensions, if there are any."""
    kinds: Counter[str] = Counter()
    for top, _, files in os.walk(folder):
        for name in files:
            if not os.path.exists(os.path.join(top, name)):  # noqa: PTH110, PTH118
                continue
            stem, kind = os.path.splitext(name)  # noqa: PTH122
            if kind in (".gz", ".bz2", ".xz"):
                kind = os.path.splitext(stem)[1] + kind  # noqa: PTH122
            kinds[kind.lower() or "without an extension"] += 1
    if not kinds:
        return ""
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f": it has {found}; convert them first, to PNG or TIFF for example"


def find_folder(root: str | Path) -> Path | None:
    """The folder that a root names; None if it is a pattern or a list."""
    path = Path(root).expanduser()
    return path if path.is_dir() else None


def _walk(folder: Path, closed: list[ReadError], wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Find images at any depth; each folder once, however many links lead to it."""
    seen = set()  # folders, with links resolved
    left_out = defaultdict[str, list[str]](list)
    waiting = [str(folder)]
    while waiting:
        top = waiting.pop()
        try:
            with os.scandir(top) as found:
                entries = list(found)
        except OSError as error:
            if top == str(folder):
                raise PermissionError(
                    f"{folder}: this folder can't be opened: {error.strerror}"
                ) from error
            name = legible(top)
            reason = error.strerror or str(error)
            closed.append(ReadError(name, reason, lost=False))
            warn_once(f"skipped the folder {name} and everything in it: {reason}")
            continue
        real = Path(top).resolve()
        if real in seen:
            continue
        seen.add(real)

        # What an entry is was listed with its name: only a link is asked for it.
        folders = []
        for entry in entries:
            try:
                is_folder = entry.is_dir()
                is_image = wanted(entry.path) and entry.is_file()
            except OSError:
                is_folder = False
                is_image = _is_image(Path(entry.path), wanted)
            if is_folder and not entry.name.startswith("."):
                folders.append(entry.path)
            elif is_image:
                yield Path(entry.path)
            elif entry.is_symlink() and wanted(entry.path):
                left_out[BROKEN].append(legible(entry.path))
            elif entry.name[0] != "." and (is_shard(entry.name) or names_volume(entry.name)):
                left_out[OF_OTHERS].append(legible(entry.path))
        waiting += sorted(folders, reverse=True)
    for kind, names in left_out.items():
        warn_once(f"{folder}: {len(names)} left out, as {min(names)}: {kind}")


def has_images(folder: str | Path) -> bool:
    """Whether :func:`find_images` finds any in a folder; it stops at the first one."""
    return next(_walk(Path(folder), [], is_image_file), None) is not None


def _is_image(path: Path, wanted: Callable[[str], bool]) -> bool:
    try:
        return wanted(str(path)) and path.is_file()
    except OSError:  # in a folder that can be listed but not entered: counted as unreadable later
        return True


def _without_sidecars(paths: list[Path]) -> list[Path]:
    """Leave out features or depths of a picture: a.npz and a_0048x0040_sd.npz beside a.jpg."""
    beside = {path for path in paths if path.suffix.lower() in (".npz", ".exr")}
    if not beside:
        return paths
    pictures = {path.with_suffix("") for path in paths if path not in beside}

    def is_beside(path: Path) -> bool:
        words = path.stem.split("_")
        return any(path.with_name("_".join(words[: i + 1])) in pictures for i in range(len(words)))

    return [path for path in paths if path not in beside or not is_beside(path)]


def split_folders(root: str | Path) -> tuple[str | Path, str | Path | None]:
    """The folders of training and of validation images, if a data set has both."""
    folder = Path(root).expanduser()
    names = _folders_in(folder, TRAIN_FOLDERS + VAL_FOLDERS)

    def first_of(parts: Sequence[str]) -> str | None:
        found = [name for name in names if name.lower() in parts]
        if not found:
            return None
        return str(folder / min(found, key=lambda name: parts.index(name.lower())))

    train = first_of(TRAIN_FOLDERS)
    held_out = first_of(VAL_FOLDERS)
    return (train, held_out) if train and held_out else (root, None)


def say_parts(root: str | Path, rule: str) -> None:
    """Log what a command takes of a data set that has both parts, and what it leaves out.

    ``rule`` has ``{train}`` and ``{val}`` in place of the parts' names, ``{path}`` of val's path.
    """
    train, val = (Path(part or root) for part in split_folders(root))
    if train == val:
        return
    # The path last: it may have braces itself.
    rule = rule.replace("{train}", f"{train.name}/").replace("{val}", f"{val.name}/")
    line = f"{root}: {rule.replace('{path}', str(val))}"

    # Other folders, and images beside both parts.
    folder = Path(root).expanduser()
    others = [f"{name}/" for name in _folders_in(folder) if name not in (train.name, val.name)]
    images = sum(is_image_file(name) for name in os.listdir(folder))  # noqa: PTH208
    if images:
        others.append(f"{counted(images, 'image')} beside them")
    if others:
        line += f"; left out: {', '.join(others)}"
    warn_once(line)


def _folders_in(folder: Path, parts: Sequence[str] | None = None) -> list[str]:
    """The names of the folders in a folder, sorted; of ``parts`` alone, in any case, if given.

    None of them if the folder can't be opened.
    """
    # os.path.isdir is False in a folder that can't be entered, where Path.is_dir raises an error.
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []
    # By name first: a folder may have a million images, and each question takes a while.
    wanted = [n for n in names if n[0] != "." and (parts is None or n.lower() in parts)]
    return [name for name in wanted if os.path.isdir(folder / name)]  # noqa: PTH112


def naming_folder(root: str | Path) -> Path:
    """The folder below which names count: root, a list's folder, or a pattern's fixed parts."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix.lower() == ".txt":
        return folder.parent
    fixed = takewhile(lambda part: not glob.has_magic(ESCAPED.sub("", part)), folder.parts)
    return Path(*(ESCAPED.sub(r"\1", part) for part in fixed))


def name_below(path: Path, folder: Path) -> str:
    """A path below a folder, with ``/``; the whole path if it is elsewhere."""
    try:
        return path.relative_to(folder).as_posix()
    except ValueError:
        return path.as_posix()


def find_parts(
    root: str | Path,
    val_root: str | Path | None = None,
    val_fraction: float | None = None,
    hold_out_by: str = FILE,
) -> tuple[list[Path], list[Path]]:
    """The files of training and of validation images; arguments as of :class:`FolderSource`."""
    if val_root is None:
        root, val_root = split_folders(root)
    paths = find_images(root)
    if val_root is not None:
        return paths, find_images(val_root)

    # Hold out about `val_fraction` of the paths, by their names' hash; defaults as hold_out().
    if len(paths) < 2:
        raise ValueError(
            f"{root}: one image can't be split into training and validation: "
            "set data.params.val_root"
        )

    # Each group has a place in [0, 1): the hash of its name.
    folder = naming_folder(root)
    groups = Grouping(hold_out_by).members(name_below(path, folder) for path in paths)
    if len(groups) < 2:
        raise ValueError(f"{root}: {ONE_GROUP}")
    places = {}
    for name in groups:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        places[name] = int.from_bytes(digest[:8], "big") / 2**64

    _, numbers = usual_groups([len(group) for group in groups.values()], len(paths), val_fraction)
    names = list(groups)
    usual = [names[number] for number in numbers]

    # The first groups are held out, until they have the images, so adding some changes few of them.
    share = 0
    for name in usual:
        if places[name] < (val_fraction or VAL_FRACTION):
            # A list may name a file twice.
            share += len({paths[place] for place in groups[name]})
    count = bound_held_out(share, len(paths), val_fraction)
    held_out: set[int] = set()
    for name in sorted(usual, key=places.__getitem__)[: len(groups) - 1]:
        if len(held_out) >= count:
            break
        held_out.update(groups[name])
    train = [path for place, path in enumerate(paths) if place not in held_out]
    return train, [paths[place] for place in sorted(held_out)]
