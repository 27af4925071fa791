"""Encode images to shards of latents with their statistics; resumable, in one process or several."""

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
from olvae.config import Config, ConfigError, load
from olvae.config.reading import YAML, holds_shards, is_local
from olvae.data.dataset import ImageDataset, MappedSource
from olvae.data.image import MODES, EvalTransform, Photo, image_to_tensor
from olvae.data.opening import holds_masks, open_images, open_source
from olvae.data.packing import usual_shard_size
from olvae.data.picture_folder import Files
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.index import INDEX, find_shards, with_counts
from olvae.data.shards.latent_source import FLIP, LATENT, META, PIXELS, STATS, Latent, pixel_bytes
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.shards.write import ResumableShards, WebDatasetSample
from olvae.data.source import total
from olvae.devices import DTYPES, FULL, autocast
from olvae.files import file_state, lines_sha256, write_json
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, pad_to_multiple
from olvae.modules.base import device_of
from olvae.modules.distributions import in_float32, keyed_generator
from olvae.modules.scaling_factors import Moments
from olvae.runs import entry_of

STATE = (
    ".encode"  # folder beside the shards, with the plan and a description of each finished shard
)

WINDOW_BATCHES, WINDOW_BYTES = (
    8,
    2**28,
)  # images of their own sizes among which those of one size are looked for


class Item(NamedTuple):
    """An image to encode: the name of its files in the shard, its key, how to open it, and files to keep with it."""

    name: str
    key: str
    open: Callable[[], Photo]
    files: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class DatasetInputs:
    """Images by number: output shard i holds those from i * shard_size on, and files are named by the number."""

    images: ImageDataset
    shard_size: int
    classes: Sequence[str] = ()  # names of folders: a file ``.cls`` has the number of the image's
    source: Sequence[str] = ()  # the one SRC of images whose numbers do not say which they are
    transform: EvalTransform | None = None  # of a config

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
            files = {"cls": numbers[key.split("/")[0]]} if numbers else {}
            yield Item(f"{i:08d}", key, partial(self.images.__getitem__, i), files)

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what the shards' bytes depend on, together with the options."""
        images = lines_sha256(
            [*self.source, *(self.images.state(i) for i in range(len(self.images)))]
        )
        return {
            "options": {**options, "shard_size": self.shard_size},
            "images": images,
            "classes": list(self.classes),
        }


@dataclass(frozen=True)
class ShardInputs:
    """One output shard for each input shard; files keep their names, and other files of an image are kept."""

    shards: Sequence[Shard]
    channels: int
    image_key: str | None = None
    pixel_range: PixelRange = EIGHT_BITS
    transform: EvalTransform | None = None  # of a config
    classes: ClassVar[Sequence[str]] = ()  # the .cls files of the shards are kept

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
            else:  # the network may have failed, so this need not be the end of the shard
                raise OSError(
                    f"{entry.name}: {entry.reason}; run the same command again to continue"
                )

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        names = [
            f"{Path(url).name}:{n}:{file_state(url)}" if is_local(url) else f"{url}:{n}:"
            for url, n in ((shard.url, shard.images) for shard in self.shards)
        ]
        return {
            "options": dict(options),
            "images": lines_sha256([*names, *filter(None, [self.image_key])]),
        }


Inputs = DatasetInputs | ShardInputs


def find_inputs(
    src: str,
    channels: int,
    shard_size: int,
    classes: bool = False,
    pixel_range: PixelRange = EIGHT_BITS,
    size: Size | None = None,
) -> Inputs:
    """Find the images of SRC: of a config its test images, cut for ``size`` if given; of any other SRC all, whole.

    ``shard_size`` is the number of images in an output shard, 0 for that of packing, unless SRC is made of shards; with
    ``classes`` the folders of SRC are classes. Raises ConfigError also for a config whose data have another range of
    values.
    """
    images: ImageDataset | ShardInputs
    name, transform = src, None
    if Path(src).suffix in YAML:
        source = open_source(src, size or 1, 1, resized=size is not None)
        name = json.dumps(load([src]).get("data"), sort_keys=True, default=str)
        pixel_range.check_data(source.pixel_range)
        if source.channels != channels:
            raise ConfigError(
                f"{src}: images of {source.channels} channels, and the model takes {channels}"
            )
        transform = source.eval_transform
        if isinstance(source, WebDatasetSource):
            images = ShardInputs(
                source.val, source.channels, source.image_key, source.pixel_range, transform
            )
        elif isinstance(source, MappedSource):
            images = source.val
        else:
            raise ConfigError(
                f"{src}: {type(source).__name__} can't be encoded: name folders or shards, one by one"
            )
    elif holds_shards(src):
        images = ShardInputs(with_counts(find_shards(src)), channels, None, pixel_range)
    else:
        images = open_images(src, channels, pixel_range)
    if isinstance(images, ShardInputs):
        if classes:
            raise ConfigError(
                "`classes` is for folders: encode those; shards keep their .cls files, if they have any"
            )
        return images
    named = () if isinstance(images, Files) else (name,)
    shard_size = shard_size or usual_shard_size(len(images))
    return DatasetInputs(images, shard_size, _classes(images) if classes else (), named, transform)


def usual_transform(inputs: Inputs, config: Config, model: Autoencoder) -> EvalTransform:
    """Choose the resizing as evaluation does: that of a config's source, else the size of the training.

    Masks are resized by nearest, also where only the training, of this config, says that its images are masks.
    """
    trained = entry_of(config, "data.params") or {}
    usual = inputs.transform or EvalTransform(trained.get("size") or model.image_size)
    return replace(usual, resample="nearest") if holds_masks(trained) else usual


def _classes(images: ImageDataset) -> list[str]:
    keys = [images.key(i) for i in range(len(images))]
    if loose := [key for key in keys if "/" not in key]:
        raise ConfigError(f"`classes`: {loose[0]} is not in a folder that could be its class")
    return sorted({key.split("/")[0] for key in keys})


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of encoding."""

    size: Size  # in pixels after resizing and cropping the centre; 0 keeps images' sizes, padded to multiples of f
    moments: bool = True  # store the posterior's mean and standard deviation, else one sample, with noise by the seed
    seed: int = 0
    dtype: str = "float16"  # of the latents, a name of olvae.devices.DTYPES
    flip: bool = False  # store the mirrored image's latent as well
    images: bool = False  # store the pixels that are encoded as well, as PNG
    precision: str = FULL  # that the encoder computes in, a name of olvae.devices.PRECISIONS
    resample: str = "bicubic"  # the filter of resizing, a name of olvae.data.image.FILTERS

    def check(self, model: Autoencoder) -> None:
        """Raise ValueError unless images of a model can be stored like this."""
        if self.size and not Sides.of(self.size).fits(f := model.downscale):
            short = Sides.of(self.size).short
            raise ValueError(
                f"`size` {short}: choose a multiple of {f}, the model's downscaling factor"
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
        picture = item.open().read()
        resized = (
            EvalTransform(options.size, resample=options.resample)(picture)
            if options.size
            else picture
        )
        pixels = image_to_tensor(resized)
        if options.images:
            item = item._replace(files={**item.files, PIXELS: pixel_bytes(pixels)})
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
    """Divide images into lists of this length, shorter where their pixels exceed :data:`WINDOW_BYTES`."""
    window: list[ReadImage | ReadError] = []
    pixels = 0
    for image in images:
        window.append(image)
        pixels += image.pixels.nbytes if isinstance(image, ReadImage) else 0
        if len(window) == length or pixels > WINDOW_BYTES:
            yield window
            window, pixels = [], 0
    if window:
        yield window


@dataclass
class _Statistics:
    """Moments of latents, and their shape, None if it varies; added shard by shard, so that any process may finish."""

    moments: Moments | None = None
    shape: list[int] | None = None

    def add(self, moments: Moments, shape: list[int] | None) -> None:
        self.shape = shape if self.moments is None or shape == self.shape else None
        self.moments = moments if self.moments is None else self.moments + moments

    def details(self) -> dict[str, Any]:
        positions, sums = (0, []) if self.moments is None else self.moments.state()
        return {"positions": positions, "shape": self.shape, "sums": sums}


class EncodeJob:
    """Encode images into a folder of shards, in one process or several.

    Shard i goes to process i modulo their number. Neither interruptions nor the number of processes change a byte; see
    :class:`~olvae.data.shards.write.ResumableShards`. The model is on its device, in evaluation mode; ``describe`` has
    further entries of stats.json, such as the target's name. Raise ConfigError if the folder holds latents of other
    options, images or weights, or something else.
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
        self.model, self.inputs, self.options = model, inputs, options
        self.shards = ResumableShards(folder, STATE)
        weights = tensors_sum(model.state_dict())
        self.describe = {
            **describe,
            "weights": weights,
            "downscale": model.downscale,
            "channels": model.in_channels,
        }
        unusual = {
            name: v
            for name, v in asdict(options).items()
            if (name, v) != ("resample", EvalTransform.resample)
        }
        self._plan = {"weights": weights, **inputs.plan(unusual)}
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

        Encoding images of their own sizes may take ``memory`` bytes; see :meth:`Autoencoder.encode_within`. ``advance``
        is called with the number of further images that are done, including those of finished shards. Raise ValueError
        for latents that are not finite, or too large for the dtype, OSError if a remote shard can't be read now.
        """
        self.shards.begin(self._plan)
        for shard in range(rank, len(self.inputs), world):
            if finished := self.shards.finished(shard):
                advance(finished.record.images + len(finished.unreadable))
                continue
            statistics = _Statistics()
            images = _read_ahead(self.inputs.read(shard), self.options, threads, 2 * batch_size)
            samples = self._samples(images, batch_size, memory, statistics, advance)
            self.shards.write(shard, samples, statistics.details)

    def finish(self) -> dict[str, Any]:
        """Write index.json and last stats.json, whose content is returned; raise ValueError if no image was readable.

        All shards have to be finished, by :meth:`run` of every process.
        """
        finished = [self.shards.finished(number) for number in range(len(self.inputs))]
        statistics, index, unreadable, lost = _Statistics(), dict[str, Any](), [], 0
        for number, shard in enumerate(finished):
            assert shard is not None
            unreadable += [
                {"name": error.name, "reason": error.reason} for error in shard.unreadable
            ]
            if shard.unreadable:  # one of them may be the rest of a shard
                missing = (self.inputs.count(range(number, number + 1)) or 0) - shard.record.images
                lost += max(missing, len(shard.unreadable))
            if positions := shard.details["positions"]:
                statistics.add(
                    Moments.from_state(positions, shard.details["sums"]), shard.details["shape"]
                )
                index[self.shards.path(number).name] = {"images": shard.record.images}
        moments, count = statistics.moments, sum(shard["images"] for shard in index.values())
        if moments is None:
            for number in range(len(finished)):
                self.shards.forget(number)  # so that the same command tries again
            if unreadable:
                raise ValueError(
                    "none of the images could be read: {name}: {reason}".format(**unreadable[0])
                )
            raise ValueError("no images in these shards: an image is a file KEY.jpg, KEY.png, ...")
        scaling_factor, shift_factor = moments.factors()
        stats = {
            "count": count,
            "latent_shape": statistics.shape,
            "shift_factor": shift_factor,
            "scaling_factor": scaling_factor,
            "latents_mean": moments.mean.tolist(),
            "latents_std": moments.std.tolist(),
            "means_std": moments.std_of_means.tolist(),
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
        """Turn images into files of a shard, in their order, and add their latents to the statistics."""
        for window in _windows(images, batch_size * (1 if self.options.size else WINDOW_BATCHES)):
            latents = iter(
                self._encode(
                    [one for one in window if isinstance(one, ReadImage)], batch_size, memory
                )
            )
            for one in window:
                if isinstance(one, ReadError):
                    yield one
                else:
                    sides = next(latents)
                    for mean, std in sides:
                        variance = None if std is None else std.double().square()
                        statistics.add(Moments.of(mean, variance), list(mean.shape))
                    (width, height), (_, h, w) = one.size, one.pixels.shape
                    meta = {"key": one.item.key, "width": width, "height": height, "image": [w, h]}
                    files = {META: json.dumps(meta).encode(), LATENT: latent_bytes(*sides)}
                    yield WebDatasetSample(one.item.name, {**one.item.files, **files})
                advance(1)

    def _encode(
        self, images: Sequence[ReadImage], batch_size: int, memory: int
    ) -> list[list[Latent]]:
        """Encode images in batches of one padded size; each image's latent, then the mirrored image's if stored."""
        latents: list[list[Latent]] = [[] for _ in images]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            groups[
                tuple(-(-side // self.model.downscale) for side in image.pixels.shape[1:])
            ].append(i)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                for ending in ("", "\nflip") if self.options.flip else ("",):
                    pixels = [
                        _mirrored(images[i].pixels) if ending else images[i].pixels for i in batch
                    ]
                    keys = [images[i].item.key + ending for i in batch]
                    for i, latent in zip(batch, self._latents(pixels, keys, memory), strict=True):
                        latents[i].append(latent)
        return latents

    @torch.inference_mode()
    def _latents(self, images: Sequence[Tensor], keys: Sequence[str], memory: int) -> list[Latent]:
        """Encode images that have one size once they are padded, and round to the stored dtype, on the CPU."""
        device = device_of(self.model)
        if not self.options.size:
            images = [pad_to_multiple(image, self.model.downscale) for image in images]
        x = self.model.pixel_range.normalise(torch.stack(list(images)).to(device))  # (B, C, H, W)
        with autocast(device.type, self.options.precision):
            posterior = (
                self.model.encode(x) if self.options.size else self.model.encode_within(x, memory)
            )
        posterior = in_float32(posterior)
        means = posterior.mean.cpu()
        stds = [None] * len(keys) if posterior.deterministic else posterior.std.cpu()
        latents = []
        for key, mean, std in zip(keys, means, stds, strict=True):
            if not self.options.moments:
                mean, std = (
                    Latent(mean, std).draw(keyed_generator(f"{self.options.seed}\n{key}")),
                    None,
                )
            latents.append(Latent(self._rounded(mean), None if std is None else self._rounded(std)))
        return latents

    def _rounded(self, exact: Tensor) -> Tensor:
        precision, rounded = self.options.precision, exact.to(DTYPES[self.options.dtype])
        if not exact.isfinite().all():
            why = (
                "the training run may have diverged"
                if precision == FULL
                else f"set `precision` to {FULL}"
            )
            raise ValueError(f"the latents have non-finite values in {precision}: {why}")
        if not rounded.isfinite().all():
            raise ValueError(
                f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}"
            )
        return rounded


def _mirrored(image: Tensor) -> Tensor:
    """(C, H, W) -> (C, H, W), of any dtype, also uint16, which torch's flip does not take."""
    return image[..., torch.arange(image.shape[-1] - 1, -1, -1)]


def latent_bytes(*sides: Latent) -> bytes:
    """Serialise an image's tensors, with those of the mirrored image if given."""
    tensors: dict[str, Tensor] = {}
    for ending, one in zip(("", FLIP), sides, strict=False):
        parts = {"latent": one.mean} if one.std is None else {"mean": one.mean, "std": one.std}
        tensors |= {f"{name}{ending}": part.contiguous() for name, part in parts.items()}
    return save(tensors)
