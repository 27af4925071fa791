"""Images to encode, read ahead by threads, in batches of one size."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from torch import Tensor

from olvae.data.faults import Fault
from olvae.data.pixels import image_to_tensor
from olvae.data.reading import Photo, UnreadableImageError
from olvae.data.transforms import center_crop
from olvae.export.encode_inputs import Item

__all__ = ["ReadImage", "read_batches"]


class ReadImage(NamedTuple):
    """An image as it is encoded, uint8 (C, H, W), and the width and height that it had before."""

    item: Item
    pixels: Tensor
    size: tuple[int, int]


def read_batches(
    items: Iterable[Item | Fault], size: int, batch_size: int, threads: int
) -> Iterator[list[ReadImage | Fault]]:
    """Lists of so many images of one size, in order, and the faults between them.

    Args:
        items: the images, and what could not be read of their shard.
        size: of the images after the evaluation's resize and crop; 0 leaves them as they are.
        threads: that read ahead; 0 reads when an image is asked for.
    """
    batch: list[ReadImage | Fault] = []
    shape, count = None, 0
    for image in _ahead(items, size, threads, 2 * batch_size):
        if isinstance(image, ReadImage):
            if count == batch_size or shape not in (None, image.pixels.shape):
                yield batch
                batch, count = [], 0
            shape, count = image.pixels.shape, count + 1
        batch.append(image)
    if batch:
        yield batch


def _ahead(items: Iterable[Item | Fault], size: int, threads: int, depth: int) -> Iterator[ReadImage | Fault]:
    """The images in the items' order, up to ``depth`` of them read ahead."""
    read = partial(_read, size)
    if not threads:
        yield from map(read, items)
        return
    waiting: deque[Future[ReadImage | Fault]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(size: int, item: Item | Fault) -> ReadImage | Fault:
    if isinstance(item, Fault):
        return item
    try:
        opened = item.open()
        picture = opened.read() if isinstance(opened, Photo) else opened
        return ReadImage(item, image_to_tensor(center_crop(picture, size) if size else picture), picture.size)
    except UnreadableImageError as error:
        return Fault(item.key, error.reason)
