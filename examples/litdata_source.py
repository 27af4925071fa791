"""Train on images in LitData's format, in LitData's own order.

    python -m pytest tests/examples/test_litdata_source.py

makes such folders and trains on them, after: pip install litdata. To train on yours, put examples/
in PYTHONPATH, and these lines in a config::

    data:
      target: litdata_source.LitDataSource
      params: {folder: chunks/train, val_folder: chunks/val, size: 64, batch_size: 16}

LitData chooses the chunks and the shuffled order of each loader process, and deals the rest of an
epoch to other processes when a run continues with these. Written for LitData 0.2.76; names with an
underscore are not part of its documented interface.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from litdata import StreamingDataset
from litdata.utilities.env import _DistributedEnv, _WorkerEnv

from olvae.data.image import Photo, RandomScaleCrop, image_to_tensor
from olvae.data.pixels.size_and_range import Size
from olvae.data.read_errors import UnreadableImageError
from olvae.data.source import LoaderLayout, LoaderProcess, Sample, Source, eval_sample


class LitDataSource(Source):
    """Images of folders that litdata.optimize wrote, as a file's bytes and a key by name.

    Args:
        folder, val_folder: images of training, and of validation and test.
        size, batch_size, num_workers, channels, max_unreadable: see
            :class:`~olvae.data.source.Source`.
        image, name: keys of the bytes and of the name in a sample.
    """

    def __init__(
        self,
        folder: str,
        val_folder: str,
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        channels: int = 3,
        max_unreadable: float = 0.01,
        image: str = "image",
        name: str = "key",
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable)
        self.folder = folder
        self.val_folder = val_folder
        self.image = image
        self.name = name
        self.transform = RandomScaleCrop(size)
        self.eval_transform = self.transform.evaluation
        self._images = len(StreamingDataset(folder))
        self._val_images = len(StreamingDataset(val_folder))
        self.check_batch()

    @property
    def samples_per_epoch(self) -> int:
        return self._images

    @property
    def val_images(self) -> int:
        return self._val_images

    def describe(self) -> str:
        return f"{self._images} training images of LitData, {self._val_images} held out"

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        share = self._images // process.count
        epoch, used = divmod(position, share)
        for number in count(epoch):
            dataset = self._dataset(seed, number, process.index, process.count)
            if used:
                dataset.load_state_dict(dataset.state_dict(used, 1, 1))
            for content in islice(dataset, share - used):
                yield self._train_sample(content, (seed, process.index, process.count, position))
                position += 1
            used = 0

    def continued_stream(
        self, seed: int, start: int, process: LoaderProcess, layouts: Sequence[LoaderLayout]
    ) -> Iterator[Sample]:
        if len(layouts) < 2:
            yield from super().continued_stream(seed, start, process, layouts)
            return

        # LitData deals what the first processes have left of the epoch, as all used it equally.
        epoch, used = divmod(layouts[-1].start, self._images)
        first = layouts[0].processes
        state = self._dataset(seed, epoch, 0, first).state_dict(used // first, 1, 1)
        process, position = process.resumed(start - layouts[-1].start)
        dataset = self._dataset(seed, epoch, process.index, process.count)
        dataset.load_state_dict(state)
        read = 0
        for content in dataset:
            if read >= position:
                numbers = (seed, process.index, process.count, read, len(layouts))
                yield self._train_sample(content, numbers)
            read += 1

        # Whole epochs after it.
        share = self._images // process.count
        later = max(0, position - read)
        yield from self.stream(seed, (epoch + 1) * share + later, process)

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        dataset = StreamingDataset(self.val_folder)
        for number in range(process.index, self._val_images, process.count):
            content = dataset[number]
            key = content[self.name]
            try:
                yield eval_sample(self._photo(content), key, self.eval_transform)
            except UnreadableImageError as error:
                yield Sample(None, key, (error.read_error(),))

    def _dataset(self, seed: int, epoch: int, index: int, processes: int) -> Any:
        """One process's part of an epoch; LitData counts epochs from 1."""
        dataset = StreamingDataset(self.folder, shuffle=True, seed=seed, drop_last=True)
        # A loader process here is what LitData calls a rank of one worker.
        dataset.distributed_env = _DistributedEnv(processes, index, 1)
        dataset._forced_worker_env = _WorkerEnv(1, 0)
        dataset.set_epoch(epoch + 1)
        return dataset

    def _train_sample(self, content: dict[str, Any], numbers: Sequence[int]) -> Sample:
        key = content[self.name]
        try:
            image = self.transform(self._photo(content), np.random.default_rng(numbers))
        except UnreadableImageError as error:
            # A training batch has to be full: see read_or_replace for a way to replace it.
            raise ValueError(f"{self.folder}: {key} can't be read: {error.reason}") from error
        return Sample(image_to_tensor(image), key)

    def _photo(self, content: dict[str, Any]) -> Photo:
        return Photo(content[self.image], content[self.name], self.channels, self.pixel_range)
