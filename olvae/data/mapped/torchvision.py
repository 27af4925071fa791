"""Any data set of torchvision, or another one whose pictures are numbered."""

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from olvae.config import Node, instantiate
from olvae.data.errors import UnreadableImageError
from olvae.data.image import Bands, Photo, Picture, array_to_picture
from olvae.data.mapped.base import ImageDataset, MappedSource, hold_out
from olvae.data.transforms import RandomScaleCrop

__all__ = ["Items", "TorchvisionSource"]


class Items(ImageDataset):
    """Pictures of a data set whose items are a picture, or begin with one."""

    def __init__(self, dataset: Any, channels: int = 3) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"{type(dataset).__name__}: its items can't be asked for by number")
        self.dataset = dataset
        self.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def label(self, index: int) -> int | None:
        """An item's second part, if that is an integer: its class."""
        item = self.dataset[index]
        return item[1] if isinstance(item, tuple) and len(item) > 1 and isinstance(item[1], int) else None

    def __getitem__(self, index: int) -> Photo:
        name = f"{type(self.dataset).__name__}[{index}]"
        try:
            item = self.dataset[index]
            return Photo(_picture(item[0] if isinstance(item, tuple | list) else item), name, self.channels)
        except ImportError:  # a decoder that is not installed reads no image
            raise
        except Exception as error:  # the data set's own decoder raises all kinds
            raise UnreadableImageError(name, str(error)) from error


class TorchvisionSource(MappedSource):
    """Images of torchvision's data sets, without their labels.

    Args:
        dataset: the node of the training images, for example ``{target: torchvision.datasets.CIFAR10, params: {root:
            data, download: true}}``; the data set must give pictures, so leave its ``transform`` out.
        val_dataset: the node of the validation and test images; without it a part of the first is held out.
        val_fraction: how large a part, evenly spread; by default 5 %, and at least 20 images or, of fewer than 100, a
            fifth.
        size, batch_size, num_workers, channels, max_unreadable: see :class:`~olvae.data.source.Source`.
        min_fraction, filters, flip: see :class:`RandomScaleCrop`.
    """

    def __init__(
        self,
        dataset: Node,
        size: int,
        batch_size: int,
        num_workers: int = 0,
        val_dataset: Node | None = None,
        val_fraction: float | None = None,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ("box", "bilinear", "bicubic", "lanczos"),
        flip: bool = True,
        channels: int = 3,
        max_unreadable: float = 0.01,
    ) -> None:
        train = Items(instantiate(dataset), channels)
        parts = (
            hold_out(train, val_fraction) if val_dataset is None else (train, Items(instantiate(val_dataset), channels))
        )
        transform = RandomScaleCrop(size, min_fraction, filters, flip)
        super().__init__(*parts, transform, batch_size, num_workers, channels, max_unreadable)


def _picture(item: Any) -> Picture:
    if isinstance(item, Image.Image | Bands):
        return item
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.dim() == 3 else item
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise ValueError(f"an item is a {type(item).__name__}, not a picture: leave out the data set's transform")
    if array.shape[2:] in ((), (1,), (3,), (4,)) or (array is item and array.shape[2:] == (2,)):
        return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    return array_to_picture(array)
