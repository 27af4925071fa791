"""Encode images to shards of latents with statistics; resumable, in one process or several."""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from olvae.checkpoint import tensors_sum
from olvae.config import Config, ConfigError
from olvae.config.reading import YAML, is_local
from olvae.data.dataset import ImageDataset
from olvae.data.image import MODES, EvalTransform, Photo, image_to_tensor
from olvae.data.opening import holds_masks, open_source, open_training_images
from olvae.data.packing import usual_shard_size
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.places import holds_shards, load
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import INDEX, find_shards, with_counts
from olvae.data.shards.latent_files import (
    FLIP,
    LATENT,
    LATENT_META,
    LATENT_PIXELS,
    STATS,
    Latent,
    pixel_bytes,
)
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.write import ResumableShards, WebDatasetSample
from olvae.data.source import total
from olvae.devices import DTYPES, FULL, autocast
from olvae.files import counted, file_state, lines_sha256, write_json
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, pad_to_multiple
from olvae.modules.base import device_of
from olvae.modules.distributions import in_float32, keyed_generator
from olvae.modules.moments import Moments
from olvae.runs import entry_of

# Folder beside the shards, with the plan and a description of each finished shard.
STATE = ".encode"

# Images of several sizes are grouped by size within a window: this many batches, or fewer if their
# pixels exceed this many bytes.
WINDOW_BATCHES = 8
WINDOW_BYTES = 2**28

# Added to the key of a mirrored image, so that its noise is another; no key has a line break.
MIRRORED = "\nflip"


# Inputs: which images go into which output shard


class Item(NamedTuple):
    """An image to encode: the name of its files in the shard, its key, how to open it.

    ``files`` are kept beside its latent.
    """

    name: str
    key: str
    open: Callable[[], Photo]
    files: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class DatasetInputs:
    """Images by number: output shard i holds ``shard_size`` of them from i * shard_size on.

    Files are named by the number.
    """

    images: ImageDataset
    shard_size: int
    # Names of folders; a file ``.cls`` has the number of the image's folder.
    classes: Sequence[str] = ()
    # SRC, for images whose states do not say where they are from, as a data set's.
    source: Sequence[str] = ()
    # The evaluation's resizing, if SRC is a config.
    transform: EvalTransform | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.shard_size)

    def _range(self, shard: int) -> range:
        return range(len(self.images))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def count(self, shards: range) -> int:
        return sum(len(self._range(shard)) for shard in shards)

    def read(self, shard: int) -> Iterator[Item]:
        numbers = {name: str(n).encode() for n, name in enumerate(self.classes)}
        for i in self._range(shard):
            key = self.images.key(i)
            files = {}
            if numbers:
                files["cls"] = numbers[key.split("/")[0]]
            yield Item(f"{i:08d}", key, partial(self.images.__getitem__, i), files)

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        states = [self.images.state(i) for i in range(len(self.images))]
        return {
            "options": {**options, "shard_size": self.shard_size},
            "images": lines_sha256([*self.source, *states]),
            "classes": list(self.classes),
        }


@dataclass(frozen=True)
class ShardInputs:
    """One output shard for each input shard; files keep their names, and an image's others stay."""

    shards: Sequence[Shard]
    channels: int
    image_key: str | None = None
    pixel_range: PixelRange = EIGHT_BITS
    # The evaluation's resizing, if SRC is a config.
    transform: EvalTransform | None = None
    # None here: the .cls files of the shards are kept.
    classes: ClassVar[Sequence[str]] = ()

    def __len__(self) -> int:
        return len(self.shards)

    def count(self, shards: range) -> int | None:
        """Count the images of output shards; None if that is unknown before reading."""
        return total([self.shards[shard].images for shard in shards])

    def read(self, shard: int) -> Iterator[Item | ReadError]:
        source = self.shards[shard]
        for entry in read_shard(source, self.image_key):
            if not isinstance(entry, ReadError):
                name = entry.key.removeprefix(f"{source.name}/")
                photo = partial(Photo, entry.data, entry.name, self.channels, self.pixel_range)
                yield Item(name, entry.key, photo, entry.files)
            elif is_local(source.url):
                yield entry
            else:
                # The network may have failed, so this need not be the end of the shard.
                raise OSError(
                    f"{entry.name}: {entry.reason}; run the same command again to continue"
                )

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        lines = []
        for shard in self.shards:
            if is_local(shard.url):
                lines.append(f"{Path(shard.url).name}:{shard.images}:{file_state(shard.url)}")
            else:
                lines.append(f"{shard.url}:{shard.images}:")
        if self.image_key:
            lines.append(self.image_key)
        return {"options": dict(options), "images": lines_sha256(lines)}


Inputs = DatasetInputs | ShardInputs


def find_inputs(
    src: str,
    channels: int,
    shard_size: int,
    classes: bool = False,
    pixel_range: PixelRange = EIGHT_BITS,
    size: Size | None = None,
) -> Inputs:
    """Find the images of SRC: a config's test images, cut for ``size`` if given, else all, whole.

    ``shard_size`` is the number of images in an output shard, 0 for the size that packing takes; an
    SRC of shards ignores it. With ``classes``, the folders of SRC are classes. Raise ConfigError if
    SRC can't be encoded, also for a config whose data have another range of values.
    """
    # The images, their resizing if SRC is a config, and what the plan calls SRC.
    images: ImageDataset | ShardInputs
    transform = None
    name = src
    if Path(src).suffix in YAML:
        source = open_source(src, size or 1, 1, resized=size is not None)
        name = json.dumps(load([src]).get("data"), sort_keys=True, default=str)
        pixel_range.check_data(source.pixel_range)
        if source.channels != channels:
            raise ConfigError(
                f"{src}: images of {counted(source.channels, 'channel')}, "
                f"and the model takes {channels}"
            )
        transform = source.eval_transform
        images = source.test_set
        if isinstance(images, Sequence):
            images = ShardInputs(
                images, source.channels, source.image_key, source.pixel_range, transform
            )
        elif images is None:
            raise ConfigError(
                f"{src}: {type(source).__name__} can't be encoded: name folders or shards, one by "
                "one"
            )
    elif holds_shards(src):
        images = ShardInputs(with_counts(find_shards(src)), channels, None, pixel_range)
    else:
        images = open_training_images(src, channels, pixel_range)

    # Shards become one output shard each, and keep the classes that are in them.
    if isinstance(images, ShardInputs):
        if classes:
            raise ConfigError(
                "`classes` is for folders: encode those; shards keep their .cls files, if they "
                "have any"
            )
        return images

    # Other images are divided into shards by number. Only the state of a file says which it is; a
    # class is a first folder.
    named = () if isinstance(images, Files) else (name,)
    shard_size = shard_size or usual_shard_size(len(images))
    folders: list[str] = []
    if classes:
        keys = [images.key(i) for i in range(len(images))]
        loose = [key for key in keys if "/" not in key]
        if loose:
            raise ConfigError(f"`classes`: {loose[0]} is not in a folder that could be its class")
        folders = sorted({key.split("/")[0] for key in keys})
    return DatasetInputs(images, shard_size, folders, named, transform)


def usual_transform(inputs: Inputs, config: Config, model: Autoencoder) -> EvalTransform:
    """Choose the resizing as evaluation does: SRC's own if it is a config, else by training's size.

    Masks are resized by nearest, also where only ``config``, the training's, says that they are.
    """
    trained = entry_of(config, "data.params") or {}
    usual = inputs.transform or EvalTransform(trained.get("size") or model.image_size)
    if holds_masks(trained):
        return replace(usual, resample="nearest")
    return usual


# Reading: images in order, some of them ahead


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of encoding."""

    # In pixels after resizing and cropping the centre; 0 keeps images' sizes, padded to multiples
    # of f.
    size: Size
    # Store the posterior's mean and standard deviation, else one sample, with noise by the seed.
    moments: bool = True
    seed: int = 0
    # Of the latents, a name of olvae.devices.DTYPES.
    dtype: str = "float16"
    # Store the mirrored image's latent as well.
    flip: bool = False
    # Store the pixels that are encoded as well, as PNG.
    images: bool = False
    # That the encoder computes in, a name of olvae.devices.PRECISIONS.
    precision: str = FULL
    # The filter of resizing, a name of olvae.data.image.FILTERS.
    resample: str = "bicubic"

    def check(self, model: Autoencoder) -> None:
        """Raise ValueError unless images of a model can be stored like this."""
        if self.size:
            sides = Sides.of(self.size)
            factor = model.downscale
            if not sides.fits(factor):
                raise ValueError(
                    f"`size` {sides.short}: choose a multiple of {factor}, the model's downscaling "
                    "factor"
                )
        if self.images and not self.size:
            raise ValueError(
                "`images`: images that are stored beside latents have one size: give `size`"
            )
        if self.images and model.in_channels not in MODES:
            raise ValueError(
                f"`images`: PNG stores 1, 3 or 4 channels, but the images have {model.in_channels}"
            )
        if self.images and not model.pixel_range.eight_bits:
            raise ValueError(
                f"`images`: they are stored with 8 bits, but have values of {model.pixel_range}"
            )


class ReadImage(NamedTuple):
    """An image ready to be encoded, (C, H, W), and its original width and height."""

    item: Item
    pixels: Tensor
    size: tuple[int, int]


def _read(options: EncodeOptions, item: Item | ReadError) -> ReadImage | ReadError:
    if isinstance(item, ReadError):
        return item
    try:
        picture = item.open().read(masks=options.resample == "nearest")
        resized = picture
        if options.size:
            resized = EvalTransform(options.size, resample=options.resample)(picture)
        pixels = image_to_tensor(resized)
        if options.images:
            item = item._replace(files={**item.files, LATENT_PIXELS: pixel_bytes(pixels)})
        return ReadImage(item, pixels, picture.size)
    except UnreadableImageError as error:
        return ReadError(item.key, error.reason)


def _read_ahead(
    items: Iterable[Item | ReadError], options: EncodeOptions, threads: int, depth: int
) -> Iterator[ReadImage | ReadError]:
    """Yield images in order, up to ``depth`` of them read ahead in threads."""
    waiting: deque[Future[ReadImage | ReadError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(_read, options, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _windows(
    images: Iterable[ReadImage | ReadError], length: int
) -> Iterator[list[ReadImage | ReadError]]:
    """Divide images into lists of this length, shorter where they exceed :data:`WINDOW_BYTES`."""
    window: list[ReadImage | ReadError] = []
    pixels = 0
    for image in images:
        window.append(image)
        if isinstance(image, ReadImage):
            pixels += image.pixels.nbytes
        if len(window) == length or pixels > WINDOW_BYTES:
            yield window
            window = []
            pixels = 0
    if window:
        yield window


# Encoding: latents, their files and statistics


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

    Shard i goes to process i modulo their number. Neither interruptions nor the number of processes
    change a byte; see :class:`~olvae.data.shards.write.ResumableShards`. The model is on its
    device, in evaluation mode; ``describe`` has further entries of stats.json, such as the target's
    name. Raise ConfigError if the folder holds latents of other options, images or weights, or
    something else.
    """

    def __init__(
        self,
        model: Autoencoder,
        inputs: Inputs,
        options: EncodeOptions,
        folder: Path,
        describe: Mapping[str, Any],
    ) -> None:
        options.check(model)
        self.model = model
        self.inputs = inputs
        self.options = options
        self.shards = ResumableShards(folder, STATE)

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
        threads: int = 2,
        memory: int = 4 * GIB,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Encode this process's shards, except those that are finished.

        Encoding images of their own sizes may take ``memory`` bytes; see
        :meth:`Autoencoder.encode_within`. ``advance`` is called with the number of further images
        that are done, including the images of finished shards. Raise ValueError for latents that
        are not finite, or too large for the dtype, OSError if a remote shard can't be read now.
        """
        self.shards.begin(self._plan)
        for shard in range(rank, len(self.inputs), world):
            finished = self.shards.finished(shard)
            if finished:
                advance(finished.record.images + len(finished.unreadable))
                continue
            statistics = _Statistics()
            images = _read_ahead(self.inputs.read(shard), self.options, threads, 2 * batch_size)
            samples = self._samples(images, batch_size, memory, statistics, advance)
            self.shards.write(shard, samples, statistics.details)

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
        self.shards.remove_partials()
        write_json({"version": 1, "images": count, "shards": index}, self.shards.folder / INDEX)
        write_json(stats, self.shards.folder / STATS)
        return stats

    def _samples(
        self,
        images: Iterable[ReadImage | ReadError],
        batch_size: int,
        memory: int,
        statistics: _Statistics,
        advance: Callable[[int], None],
    ) -> Iterator[WebDatasetSample | ReadError]:
        """Turn images into the files of a shard, in order, and add their latents to statistics."""
        # Images of one size make a batch as they come. Of images of their own sizes, a longer
        # window is collected, in which enough of them have the same size.
        batches = 1 if self.options.size else WINDOW_BATCHES
        for window in _windows(images, batch_size * batches):
            latents = self._encode(window, batch_size, memory)
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
                files = {LATENT_META: json.dumps(meta).encode(), LATENT: latent_bytes(*sides)}
                yield WebDatasetSample(image.item.name, {**image.item.files, **files})
                advance(1)

    def _encode(
        self, window: Sequence[ReadImage | ReadError], batch_size: int, memory: int
    ) -> list[list[Latent]]:
        """Encode a window in batches of one padded size.

        Return a list for each image: its latent, then the mirrored image's if that is stored. The
        list of an unreadable image is empty.
        """
        # Images are batched by the height and width of their latents; i is the place in the window.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        readable: dict[int, ReadImage] = {}
        for i, image in enumerate(window):
            if isinstance(image, ReadImage):
                readable[i] = image
                sides = [-(-side // self.model.downscale) for side in image.pixels.shape[1:]]
                groups[tuple(sides)].append(i)

        latents: list[list[Latent]] = [[] for _ in window]
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                images = [readable[i].pixels for i in batch]
                keys = [readable[i].item.key for i in batch]
                encoded = [self._latents(images, keys, memory)]
                if self.options.flip:
                    # Mirrored by an index: torch's flip does not take uint16.
                    images = [x[..., torch.arange(x.shape[-1] - 1, -1, -1)] for x in images]
                    keys = [key + MIRRORED for key in keys]
                    encoded.append(self._latents(images, keys, memory))
                for n, i in enumerate(batch):
                    latents[i] = [side[n] for side in encoded]
        return latents

    @torch.inference_mode()
    def _latents(self, images: Sequence[Tensor], keys: Sequence[str], memory: int) -> list[Latent]:
        """Encode images of one size after padding; round to the stored dtype, on the CPU."""
        # Encode the batch: tiled, if images of their own sizes need more memory than given.
        device = device_of(self.model)
        if not self.options.size:
            images = [pad_to_multiple(image, self.model.downscale) for image in images]
        x = self.model.pixel_range.normalise(torch.stack(list(images)).to(device))  # (B, C, H, W)
        with autocast(device.type, self.options.precision):
            if self.options.size:
                posterior = self.model.encode(x)
            else:
                posterior = self.model.encode_within(x, memory)
        posterior = in_float32(posterior)

        # What is stored of each image: the Gaussian, or one sample of it.
        means = posterior.mean.cpu()
        stds = [None] * len(keys) if posterior.deterministic else posterior.std.cpu()
        latents = []
        for key, mean, std in zip(keys, means, stds, strict=True):
            latent = Latent(mean, std)
            if not self.options.moments:
                # Noise depends on seed and key alone, not on batches, order or processes.
                noise = keyed_generator(f"{self.options.seed}\n{key}")
                latent = Latent(latent.draw(noise))
            latents.append(Latent(*[self._rounded(part) for part in latent if part is not None]))
        return latents

    def _rounded(self, exact: Tensor) -> Tensor:
        """Round to the stored dtype; ValueError for values that are not finite or too large."""
        precision = self.options.precision
        rounded = exact.to(DTYPES[self.options.dtype])
        if not exact.isfinite().all():
            why = f"set `precision` to {FULL}"
            if precision == FULL:
                why = "the training run may have diverged"
            raise ValueError(f"the latents have non-finite values in {precision}: {why}")
        if not rounded.isfinite().all():
            raise ValueError(
                f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}"
            )
        return rounded


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
