"""Data sets of torchvision and of the Hugging Face hub (the latter with ``datasets``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from olvae.config import ConfigError, Node, import_extra, instantiate
from olvae.data.dataset import ImageDataset, MappedSource, hold_out
from olvae.data.image import (
    ALL_FILTERS,
    Augment,
    MultiBand,
    Photo,
    Picture,
    RandomScaleCrop,
    array_to_picture,
    stated_picture,
)
from olvae.data.order.groups import FILE, Grouping
from olvae.data.picture_folder import name_below
from olvae.data.pixels.size_and_range import (
    AS_STORED,
    EIGHT_BIT_FILE,
    EIGHT_BITS,
    PixelRange,
    RangeNode,
    Size,
)
from olvae.data.read_errors import UnreadableImageError


class Items(ImageDataset):
    """Pictures of a data set whose items are a picture, or begin with one."""

    def __init__(
        self, dataset: Any, channels: int = 3, pixel_range: PixelRange = EIGHT_BITS
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"{type(dataset).__name__}: its items have no numbers")
        self.dataset = dataset
        self.channels = channels
        self.pixel_range = pixel_range

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        # Folders of torchvision keep the paths of their files.
        samples = getattr(self.dataset, "samples", None)
        if not isinstance(samples, list) or not isinstance(samples[index], tuple):
            return self.file(index)
        return name_below(Path(samples[index][0]), Path(self.dataset.root))

    def label(self, index: int) -> int | None:
        """An item's second part, if that is an integer: its class."""
        item = self.dataset[index]
        if isinstance(item, tuple) and len(item) > 1 and isinstance(item[1], int):
            return item[1]
        return None

    def __getitem__(self, index: int) -> Photo:
        name = f"{type(self.dataset).__name__}[{index}]"
        try:
            item = self.dataset[index]
            if isinstance(item, tuple | list):
                item = item[0]
            picture = _picture(item, self.pixel_range)
            return Photo(picture, name, self.channels, self.pixel_range)
        except ImportError:  # a decoder that is not installed reads no image
            raise
        except Exception as error:  # the data set's own decoder raises all kinds
            raise UnreadableImageError(name, str(error)) from error


def _picture(item: Any, pixel_range: PixelRange) -> Picture:
    """Convert an item to a picture: one of Pillow, a tensor (C, H, W), or an array (H, W, C)."""
    # A picture; in Pillow's modes I and F one channel of more than 8 bits, so read it as an array.
    if isinstance(item, Image.Image) and item.mode[0] in "IF" and not pixel_range.eight_bits:
        item = np.asarray(item)
    if isinstance(item, Image.Image) and pixel_range not in (EIGHT_BITS, AS_STORED):
        raise ValueError(EIGHT_BIT_FILE)
    if isinstance(item, Image.Image | MultiBand):
        return item

    # An array of values in the stated range. Without one, 16 bits get the advice to state it.
    array = item
    if isinstance(item, Tensor) and item.dim() == 3:
        array = item.permute(1, 2, 0).numpy()
    dtype = str(getattr(array, "dtype", None))
    if pixel_range == AS_STORED:
        plain = dtype == "uint8"
    else:
        plain = pixel_range.eight_bits and not dtype.endswith("int16")
    if isinstance(array, np.ndarray) and not plain:
        return stated_picture(np.atleast_3d(array), pixel_range)

    # An array of 8 bits: Pillow's picture if it has the channels of one.
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise ValueError(
            f"an item is a {type(item).__name__}, not a picture: leave out the data set's transform"
        )
    if array.ndim == 2 or array.shape[2] in (1, 3, 4):
        return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
    return array_to_picture(array)


class TorchvisionSource(MappedSource):
    """Images of torchvision's data sets, or of others with numbered pictures, without labels.

    Args:
        dataset: the node of the training images, for example ``{target:
            torchvision.datasets.CIFAR10, params: {root: data, download: true}}``; the data set must
            give pictures, so leave its ``transform`` out.
        val_dataset: the node of the validation and test images; without it a part of the first is
            held out.
        val_fraction: size of that part, see :func:`~olvae.data.dataset.hold_out`.
        hold_out_by: which images are held out together, by the names of files that the data set
            knows; see :class:`~olvae.data.order.groups.Grouping`.
        size, batch_size, num_workers, channels, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        min_fraction, filters, flip, shuffle_channels, augment: see
            :class:`~olvae.data.image.RandomScaleCrop`.
    """

    def __init__(
        self,
        dataset: Node,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_dataset: Node | None = None,
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
        values = PixelRange.from_node(range)
        train: ImageDataset = Items(instantiate(dataset), channels, values)
        if val_dataset is None:
            train, val = hold_out(train, val_fraction, Grouping(hold_out_by))
            self.note_bound(len(val), val_fraction)
        else:
            val = Items(instantiate(val_dataset), channels, values)
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
        if val_dataset is not None:
            self.warn_of_shared_groups()


class Column(ImageDataset):
    """Pictures of a column of a Hugging Face data set, undecoded."""

    def __init__(
        self, table: Any, column: str, channels: int = 3, pixel_range: PixelRange = EIGHT_BITS
    ) -> None:
        from datasets import Image

        if column not in table.column_names:
            raise ConfigError(
                f"data.params.column: no column {column}; there are {', '.join(table.column_names)}"
            )
        if not isinstance(table.features[column], Image):
            raise ConfigError(
                f"data.params.column: {column} holds {table.features[column]}, not images"
            )
        self.table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column = column
        self.channels = channels
        self.pixel_range = pixel_range

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        # Beside an image's bytes there may be the name of the file that they are from.
        cell = self.table[index][self.column] or {}
        return cell.get("path") or self.file(index)

    def __getitem__(self, index: int) -> Photo:
        cell = self.table[index][self.column] or {"bytes": None, "path": None}
        name = f"row {index} of {self.column}"
        content = cell["bytes"] or cell["path"]
        if not content:
            raise UnreadableImageError(name, "the cell is empty")
        if isinstance(content, str):
            content = Path(content)
        return Photo(content, name, self.channels, self.pixel_range)


class HuggingFaceSource(MappedSource):
    """Images of a data set, read by the ``datasets`` library.

    Args:
        path: its id on the hub, for example ``cifar10``; a folder that ``save_to_disk`` wrote; or a
            builder's name, for example ``parquet`` or ``imagefolder``, with ``data_files`` or
            ``data_dir``.
        column: of the images.
        split: for training.
        val_split: for validation and test; without it a part of the training split is held out.
        val_fraction: size of that part, see :func:`~olvae.data.dataset.hold_out`.
        hold_out_by: which images are held out together, by the names of files that the data set
            knows; see :class:`~olvae.data.order.groups.Grouping`.
        name, data_files, data_dir, revision: passed on to ``datasets.load_dataset``.
        size, batch_size, num_workers, channels, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        min_fraction, filters, flip, shuffle_channels, augment: see
            :class:`~olvae.data.image.RandomScaleCrop`.

    Raises ConfigError: the library is not installed, or the column holds no images.
    """

    def __init__(
        self,
        path: str | Path,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        column: str = "image",
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float | None = None,
        name: str | None = None,
        data_files: str | Path | Sequence[str | Path] | None = None,
        data_dir: str | Path | None = None,
        revision: str | None = None,
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
        values = PixelRange.from_node(range)
        arguments = {
            "name": name,
            "data_files": data_files,
            "data_dir": data_dir,
            "revision": revision,
        }
        table = load_table(path, split, **arguments)
        train: ImageDataset = Column(table, column, channels, values)
        if val_split is None:
            train, val = hold_out(train, val_fraction, Grouping(hold_out_by))
            self.note_bound(len(val), val_fraction)
        else:
            table = load_table(path, val_split, **arguments)
            val = Column(table, column, channels, values)
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
        if val_split is not None:
            self.warn_of_shared_groups()


def load_table(path: str | Path, split: str, **arguments: Any) -> Any:
    """Load a split of a data set; one without splits has ``train``.

    ``arguments`` are passed on to ``datasets.load_dataset``. Raises ConfigError: a saved folder has
    no such split.
    """
    datasets = import_extra("datasets", "datasets", "HuggingFaceSource")

    # A folder that save_to_disk wrote; load_dataset does not read those.
    if Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if not isinstance(splits, datasets.DatasetDict):
            splits = {"train": splits, str(splits.split or "train"): splits}
        if split not in splits:
            raise ConfigError(f"{path}: has no split {split}, only {', '.join(splits)}")
        return splits[split]
    return datasets.load_dataset(str(path), split=split, **arguments)
