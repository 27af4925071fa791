"""Encode images to shards of latents with statistics: readers, encoder and writer in a pipeline.

Processes read images, a few at a time. The main thread sends their pixels to the device, where they
become floats, and starts the encoder. Another thread waits for the latents and writes the shards,
while the device is at the next batch. Every stage keeps the order, so that files do not depend on
which stage is ahead.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from os import getpid
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.data.image import EvalTransform
from olvae.data.order.groups import GROUP
from olvae.data.read_errors import ReadError, worker_death
from olvae.data.shards.index import INDEX
from olvae.data.shards.latent_files import (
    FLIP,
    LATENT,
    LATENT_META,
    STATS,
    Latent,
)
from olvae.data.shards.write import ResumableShards, WebDatasetSample
from olvae.data.source import total
from olvae.devices import DTYPES, FULL, autocast
from olvae.export.encode_inputs import (
    EncodeOptions,
    Inputs,
    Reader,
    ReadImage,
    Units,
    Window,
    windows_of,
)
from olvae.files import counted, write_json
from olvae.launcher import POLL_S, check_others
from olvae.library_internals import stop_workers
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, pad_to_multiple
from olvae.modules.base import device_of
from olvae.modules.distributions import in_float32, keyed_generator
from olvae.modules.moments import Moments
from olvae.pool import Cancelled, start_worker

# Folder beside the shards, with the plan and a description of each finished shard.
STATE = ".encode"

# Images of several sizes are grouped by size within a window of this many batches.
WINDOW_BATCHES = 8

# Batches of latents that wait for the writer.
UNWRITTEN = 4

# Added to the key of a mirrored image, so that its noise is another; no key has a line break.
MIRRORED = "\nflip"


# Waits for tensors that are on their way to the CPU.
Arriving = Callable[[], Sequence[Tensor]]


def fetch(tensors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> Arriving:
    """Copy tensors to the CPU, from a GPU on a stream that does not hold up what it does next."""
    if stream is None:
        copies = [tensor.cpu() for tensor in tensors]
        return lambda: copies
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        # To pinned memory, without waiting.
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        copied = torch.cuda.Event(blocking=True)
        copied.record(stream)
    for tensor in tensors:
        tensor.record_stream(stream)

    def arriving() -> Sequence[Tensor]:
        copied.synchronize()
        return copies

    return arriving


class _Batch(NamedTuple):
    """Images of one padded size that are being encoded."""

    places: Sequence[int]  # in their window
    keys: Sequence[str]
    latents: Arriving  # means, and deviations unless the autoencoder is deterministic


# A shard's number, some of its images, and their batches.
Started = tuple[int, Window, Sequence[_Batch]]


@dataclass
class _Statistics:
    """Moments of latents, and their shape, None if it varies.

    They are summed shard by shard, so that any process may finish a folder.
    """

    moments: Moments | None = None
    shape: list[int] | None = None

    def add(self, moments: Moments, shape: list[int] | None) -> None:
        if self.moments is None:
            self.moments = moments
            self.shape = shape
            return
        self.moments = self.moments + moments
        if shape != self.shape:
            self.shape = None

    def details(self) -> dict[str, Any]:
        positions, sums = (0, []) if self.moments is None else self.moments.state()
        return {"positions": positions, "shape": self.shape, "sums": sums}


class EncodeJob:
    """Encode images into a folder of shards, in one process or several.

    Shard i goes to process i modulo their number. Other jobs may do other parts of the shards at
    the same time, each by its ``part``, a range of their numbers. Neither interruptions nor the
    number of processes or parts change a byte; see
    :class:`~olvae.data.shards.write.ResumableShards`. The model is on its device, in evaluation
    mode; ``describe`` has further entries of stats.json, such as the target's name. Raise
    ConfigError if the folder holds latents of other options, images or weights, or something else,
    or if there are no shards of some of the part's numbers.
    """

    def __init__(
        self,
        model: Autoencoder,
        inputs: Inputs,
        options: EncodeOptions,
        folder: Path,
        describe: Mapping[str, Any],
        part: range | None = None,
    ) -> None:
        options.check(model)
        self.model = model
        self.inputs = inputs
        self.options = options
        self.shards = ResumableShards(folder, STATE, part)
        self.numbers = range(len(inputs)) if part is None else part
        if self.numbers.stop > len(inputs):
            raise ConfigError(
                f"`shards` {self.numbers[0]}-{self.numbers[-1]}: these images make "
                f"{counted(len(inputs), 'shard')} of latents, 0-{len(inputs) - 1}"
            )
        # The stream of a GPU on which latents come back.
        device = device_of(model)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

        # Entries of stats.json, beside the options and what is measured.
        weights = tensors_sum(model.state_dict())
        self.describe = {
            **describe,
            "weights": weights,
            "downscale": model.downscale,
            "channels": model.in_channels,
        }

        # The plan leaves out the default filter, as plans of folders begun before it could be
        # chosen: these can be continued.
        planned = asdict(options)
        if options.resample == EvalTransform.resample:
            del planned["resample"]
        self._plan = {"weights": weights, **inputs.plan(planned)}
        self.shards.check(self._plan)

    def run(
        self,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 8,
        workers: int = 2,
        memory: int = 4 * GIB,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Encode this process's shards, except those that are finished.

        ``workers`` processes read the images, or fewer if these are few; with 0 this one does.
        Encoding images of their own sizes may take ``memory`` bytes; see
        :meth:`Autoencoder.encode_within`. ``advance`` is called with the number of further images
        that are done, including the images of finished shards; not before the readers are forked,
        so it may start threads. Raise ValueError for latents that are not finite, or too large for
        the dtype, OSError if a remote shard can't be read now, ChildProcessError if a reader was
        killed.
        """
        self.shards.begin(self._plan)

        # Leave out what is finished.
        shards = []
        done = 0
        for shard in self.numbers[rank::world]:
            finished = self.shards.finished(shard)
            if finished is None:
                shards.append(shard)
            else:
                done += finished.record.images + len(finished.unreadable)

        # Start the readers, and then the writer's thread.
        units = Units(self.inputs, self.options, shards, batch_size)
        images = total([self.inputs.count(range(shard, shard + 1)) for shard in shards])
        if images is not None:
            workers = min(workers, -(-images // units.length))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of more processes than cores
            loader: DataLoader[Any] = DataLoader(
                Reader(self.inputs, self.options),
                batch_size=None,
                sampler=units,
                num_workers=workers,
                collate_fn=list,  # which leaves arrays as they are
                worker_init_fn=partial(start_worker, getpid()),
            )
            read = iter(loader)
        if done:
            advance(done)
        try:
            self._write_behind(self.started(units.images(read), batch_size, memory), advance)
        except (RuntimeError, ConnectionError, EOFError, TypeError) as error:
            death = worker_death(error, "lower `threads`")
            if death is None:
                raise
            raise ChildProcessError(death) from error
        finally:
            if workers:
                stop_workers(read)

    def is_complete(self) -> bool:
        """Whether other jobs' parts are finished, once this one's is."""
        # The numbers after this part first: an array of jobs mostly begins parts in their order.
        after = range(self.numbers.stop, len(self.inputs))
        others = chain(after, range(self.numbers.start))
        return all(self.shards.finished(number) is not None for number in others)

    def finish(self) -> dict[str, Any]:
        """Write index.json, then stats.json, and return its content.

        Every process has to have finished its shards by :meth:`run`. Raise ValueError if no image
        was readable.
        """
        # Merge the descriptions of the shards; one without a readable image has no file.
        finished = [self.shards.finished(number) for number in range(len(self.inputs))]
        statistics = _Statistics()
        index: dict[str, dict[str, int]] = {}
        unreadable: list[dict[str, str]] = []
        lost = 0
        for number, shard in enumerate(finished):
            assert shard is not None
            for error in shard.unreadable:
                unreadable.append({"name": error.name, "reason": error.reason})
            if shard.unreadable:
                # One of them may stand for the rest of a shard.
                missing = (self.inputs.count(range(number, number + 1)) or 0) - shard.record.images
                lost += max(missing, len(shard.unreadable))
            positions = shard.details["positions"]
            if positions:
                moments = Moments.from_state(positions, shard.details["sums"])
                statistics.add(moments, shard.details["shape"])
                index[self.shards.path(number).name] = {"images": shard.record.images}

        # Nothing was encoded: forget the shards, so that the same command tries again.
        measured = statistics.moments
        if measured is None:
            for number in range(len(finished)):
                self.shards.forget(number)
            if unreadable:
                first = unreadable[0]
                raise ValueError(
                    f"none of the images could be read: {first['name']}: {first['reason']}"
                )
            raise ValueError("no images in these shards: an image is a file KEY.jpg, KEY.png, ...")

        # Write stats.json last: a folder without it is not complete.
        count = sum(shard["images"] for shard in index.values())
        scaling_factor, shift_factor = measured.factors()
        stats = {
            "count": count,
            "latent_shape": statistics.shape,
            "shift_factor": shift_factor,
            "scaling_factor": scaling_factor,
            "latents_mean": measured.mean.tolist(),
            "latents_std": measured.std.tolist(),
            "means_std": measured.std_of_means.tolist(),
            **asdict(self.options),
            **self.describe,
            "classes": list(self.inputs.classes),
            "unreadable": {"count": lost, "images": unreadable},
        }
        if self.shards.part is None:
            self.shards.remove_partials()
        stored = [n for n in range(len(finished)) if self.shards.path(n).name in index]
        content = {
            "version": 1,
            "images": count,
            "offsets": self.shards.write_offsets(stored),
            "image_key": LATENT,
            "shards": index,
        }
        write_json(content, self.shards.folder / INDEX)
        write_json(stats, self.shards.folder / STATS)
        return stats

    def started(
        self,
        images: Iterable[tuple[int, Sequence[ReadImage | ReadError]]],
        batch_size: int,
        memory: int,
    ) -> Iterator[Started]:
        """Start the encoder on windows of a shard's images; the first window of each is empty."""
        # Images of one size make a batch as they come. Of images of their own sizes, a longer
        # window is collected, in which enough of them have the same size.
        length = batch_size * (1 if self.options.size else WINDOW_BATCHES)
        for shard, units in groupby(images, itemgetter(0)):
            yield shard, [], []
            for window in windows_of((image for _, unit in units for image in unit), length):
                yield shard, window, self.begin_window(window, batch_size, memory)

    def begin_window(self, window: Window, batch_size: int, memory: int) -> list[_Batch]:
        """Encode a window in batches of one padded size: images, then the same ones mirrored."""
        # Images are batched by the height and width of their latents; i is the place in the window.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        readable: dict[int, ReadImage] = {}
        for i, image in enumerate(window):
            if isinstance(image, ReadImage):
                readable[i] = image
                sides = [-(-side // self.model.downscale) for side in image.pixels.shape[1:]]
                groups[tuple(sides)].append(i)

        batches = []
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                places = group[start : start + batch_size]
                images = [readable[i].pixels for i in places]
                keys = [readable[i].item.key for i in places]
                batches.append(_Batch(places, keys, self._latents(images, memory)))
                if self.options.flip:
                    keys = [key + MIRRORED for key in keys]
                    latents = self._latents([mirrored(image) for image in images], memory)
                    batches.append(_Batch(places, keys, latents))
        return batches

    @torch.inference_mode()
    def _latents(self, images: Sequence[Tensor], memory: int) -> Arriving:
        """Encode images of one size after padding, and fetch the means and the deviations."""
        # The pixels, as they were read; from pinned memory a GPU takes them while it computes.
        device = device_of(self.model)
        if not self.options.size:
            images = [pad_to_multiple(image, self.model.downscale) for image in images]
        pixels = torch.stack(list(images))
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        x = self.model.pixel_range.normalise(pixels.to(device, non_blocking=True))  # (B, C, H, W)

        # Encode the batch: tiled, if images of their own sizes need more memory than given.
        with autocast(device.type, self.options.precision):
            if self.options.size:
                posterior = self.model.encode(x)
            else:
                posterior = self.model.encode_within(x, memory)
        posterior = in_float32(posterior)
        if posterior.deterministic:
            return fetch([posterior.mean], self._copies)
        return fetch([posterior.mean, posterior.std], self._copies)

    def _write_behind(self, started: Iterable[Started], advance: Callable[[int], None]) -> None:
        """Write shards in a thread, while this one starts the encoder on what comes next."""
        queue: Queue[Started | Cancelled | None] = Queue(UNWRITTEN)
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(self.write, taken_from(queue), advance)

            def put(item: Started | Cancelled | None) -> None:
                # The queue stays full if writing has failed.
                while not writing.done():
                    with suppress(Full):
                        queue.put(item, timeout=POLL_S)
                        return

            try:
                for window in started:
                    check_others()
                    put(window)
                    if writing.done():
                        break
                put(None)
            except BaseException:
                put(Cancelled())
                raise
            writing.result()

    def write(self, started: Iterable[Started], advance: Callable[[int], None]) -> None:
        """Write shards, as far as their latents arrive."""
        for shard, windows in groupby(started, itemgetter(0)):
            statistics = _Statistics()
            samples = self._samples(windows, statistics, advance)
            self.shards.write(shard, samples, statistics.details)

    def _samples(
        self,
        windows: Iterable[Started],
        statistics: _Statistics,
        advance: Callable[[int], None],
    ) -> Iterator[WebDatasetSample | ReadError]:
        """Turn images into the files of a shard, in order, and add their latents to statistics."""
        for _, window, batches in windows:
            # An image's latent, then the mirrored image's if that is stored.
            latents: list[list[Latent]] = [[] for _ in window]
            for batch in batches:
                for i, latent in zip(batch.places, self.latents_of(batch), strict=True):
                    latents[i].append(latent)

            for image, sides in zip(window, latents, strict=True):
                if isinstance(image, ReadError):
                    yield image
                    advance(1)
                    continue

                # Statistics: z varies by the posterior's variance around its mean.
                for mean, std in sides:
                    variance = None if std is None else std.double().square()
                    statistics.add(Moments.of(mean, variance), list(mean.shape))

                # Files: the original size, the size that the latent stands for, and the latent.
                width, height = image.size
                _, h, w = image.pixels.shape
                meta = {"key": image.item.key, "width": width, "height": height, "image": [w, h]}
                if image.item.group is not None:
                    meta[GROUP] = image.item.group
                files = {LATENT_META: json.dumps(meta).encode(), LATENT: latent_bytes(*sides)}
                yield WebDatasetSample(image.item.name, {**image.item.files, **files})
                advance(1)

    def latents_of(self, batch: _Batch) -> list[Latent]:
        """Wait for a batch's latents, and round them: the Gaussian, or one sample of it.

        Raise ValueError for values that are not finite or too large.
        """
        exact = batch.latents()
        if not self.options.moments:
            drawn = []
            for key, *parts in zip(batch.keys, *exact, strict=True):
                # Noise depends on seed and key alone, not on batches, order or processes.
                noise = keyed_generator(f"{self.options.seed}\n{key}")
                drawn.append(Latent(*parts).draw(noise))
            exact = [torch.stack(drawn)]

        # All at once; image by image only to name the first that can't be stored. Not a number is
        # the least and the largest of all.
        dtype = self.options.dtype
        rounded = [part.to(DTYPES[dtype]) for part in exact]
        ends = torch.stack([end for part in rounded for end in part.aminmax()])
        if ends.isfinite().all():
            return [Latent(*parts) for parts in zip(*rounded, strict=True)]
        first = next(
            part
            for parts in zip(*exact, strict=True)
            for part in parts
            if not part.to(DTYPES[dtype]).isfinite().all()
        )
        if first.isfinite().all():
            raise ValueError(f"latents of up to {first.abs().max():.3g} are too large for {dtype}")
        precision = self.options.precision
        why = f"set `precision` to {FULL}"
        if precision == FULL:
            why = "the training run may have diverged"
        raise ValueError(f"the latents have non-finite values in {precision}: {why}")


def taken_from(queue: "Queue[Started | Cancelled | None]") -> Iterator[Started]:
    """Take windows from a queue until None comes."""
    while True:
        item = queue.get()
        if item is None:
            return
        if isinstance(item, Cancelled):
            raise item
        yield item


def mirrored(image: Tensor) -> Tensor:
    """Mirror pixels, whole; torch's flip does not take uint16."""
    if image.dtype == torch.uint16:
        return image.view(torch.int16).flip(-1).view(torch.uint16)
    return image.flip(-1)


def latent_bytes(*sides: Latent) -> bytes:
    """Serialise an image's latent and, if given, the mirrored image's."""
    tensors: dict[str, Tensor] = {}
    for ending, latent in zip(("", FLIP), sides, strict=False):
        if latent.std is None:
            tensors[f"latent{ending}"] = latent.mean.contiguous()
        else:
            tensors[f"mean{ending}"] = latent.mean.contiguous()
            tensors[f"std{ending}"] = latent.std.contiguous()
    return save(tensors)
