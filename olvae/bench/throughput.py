"""Images per second from files: training loaders beside decoding alone, `olvae encode` beside a plain loop."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import transforms

from olvae.bench.measure import Case, Setting, Work, per_image
from olvae.config import ConfigError
from olvae.data.dataset import HELD_OUT, PHOTOGRAPHS, MappedSource
from olvae.data.image import Photo, Picture, image_to_tensor
from olvae.data.mix import MixSource
from olvae.data.opening import open_source
from olvae.data.picture_folder import Files
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.tar_reading import Entry, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Source
from olvae.devices import autocast
from olvae.export.encoding import EncodeJob, EncodeOptions
from olvae.export.inputs import DatasetInputs
from olvae.models.autoencoder import LiteVAE
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder

SECONDS = 1.0
"""Of a loader, or of decoding alone, in each round."""

FLOOR_IMAGES = 256
"""Images that are kept undecoded in memory and decoded in turn."""


def data_cases(setting: Setting) -> list[Case]:
    """Training loaders beside decoding and cropping the same images in memory, one by one.

    Raises:
        ConfigError: a source can't be shared by that many workers, or can't be timed.
        ValueError: no image of a source can be read.
    """
    cases = []
    for name in setting.sources:
        source = open_source(name, setting.size, setting.batch_size)
        source.batch_size = setting.batch_size
        sizes = source.size, setting.batch_size
        decode = partial(per_image, _floor(name, source), 1, SECONDS)
        floor = Case("decoding alone", "limit", "uint8", decode, 1, source.size, 1, 1, "images")
        cases.append(floor)
        for workers in setting.workers:
            source.num_workers = workers
            try:
                source.check_processes(1)
            except ValueError as error:
                raise ConfigError(f"`workers` {workers}: {name}: {error}") from error
            run, share = _loader(source, workers), 1 / max(1, workers)
            limits = {"of_floor": floor}
            cases.append(Case(name, f"{workers} workers", "uint8", run, 1, *sizes, share, "images", limits))
    return cases


def _loader(source: Source, workers: int) -> Work:
    """Take batches of a source's training loader, once its processes have started and their queues are empty."""
    seeds = count()

    def run() -> list[float]:
        source.num_workers = workers
        batches = iter(source.train_loader(seed=next(seeds)))
        for _ in islice(batches, 2 * max(1, workers) + 1):
            pass
        return per_image(lambda: next(batches), source.batch_size, SECONDS)

    return run


Decode = Callable[[np.random.Generator], Tensor]


def _floor(name: str, source: Source) -> Callable[[], Tensor]:
    rng, images = np.random.default_rng(0), list[Decode]()
    for decode in islice(_undecoded(source), FLOOR_IMAGES):
        with contextlib.suppress(UnreadableImageError):
            decode(rng)
            images.append(decode)
    if not images:
        raise ValueError(f"{name}: no image of it can be read")
    turns = cycle(images)
    return lambda: next(turns)(rng)


def _undecoded(source: Source) -> Iterator[Decode]:
    """Training images, in memory; those of a mix in the shares of its sources."""

    def decoder(data: bytes | Picture, name: str) -> Decode:
        assert isinstance(source, MappedSource | WebDatasetSource)
        channels, transform = source.channels, source.transform
        return lambda rng: image_to_tensor(transform(Photo(data, name, channels), rng))

    if isinstance(source, WebDatasetSource):
        for shard in source.train:
            entries = read_shard(shard, source.image_key)
            yield from (decoder(entry.data, entry.name) for entry in entries if isinstance(entry, Entry))
    elif isinstance(source, MappedSource):
        for i in np.random.default_rng(0).permutation(len(source.train)):
            with contextlib.suppress(UnreadableImageError):
                photo = source.train[int(i)]
                yield decoder(photo.undecoded(), photo.name)
    elif isinstance(source, MixSource):
        turns = [cycle(list(islice(_undecoded(part), FLOOR_IMAGES))) for part in source.sources]
        for i in np.random.default_rng(0).permutation(np.repeat(np.arange(len(turns)), source.shares)):
            yield from islice(turns[i], 1)
    else:
        raise ConfigError(f"data.target: {type(source).__name__} can't be timed against decoding alone")


def encode_cases(setting: Setting) -> list[Case]:
    """`olvae encode`, from files to files, beside a plain loop with the same network, and the network alone."""
    on_cpu = setting.device == "cpu"
    scale: Literal["S", "B"] = "S" if on_cpu else "B"
    paths = [photograph.path for photograph in (*PHOTOGRAPHS, *HELD_OUT)][: 24 if on_cpu else None]
    model = LiteVAE(LiteVAE_Encoder(8, scale), LiteVAE_Decoder(32, 4)).eval().to(setting.device)
    places = _new_folders()
    x, n, sizes = setting.images(), len(paths), (setting.size, setting.batch_size)
    cases = []
    for precision in setting.precisions:
        options = EncodeOptions(setting.size, precision=precision)
        alone = setting.inference(partial(model.encoder, x), precision)
        limit = Case(f"encoder {scale}", "limit", precision, alone, sizes[1], *sizes, sizes[1], "images")
        peer = None
        for name, encode in (("plain loop", _loop), ("olvae encode", _encode)):
            run = setting.inference(partial(encode, model, paths, options, setting.batch_size, places))
            limits = {"of_encoder": limit}
            peer = Case(name, "files to files", precision, run, n, *sizes, n, "images", limits, peer)
            cases.append(peer)
        cases.append(limit)
    return cases


def _new_folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="olvae-") as folder:
        yield from (Path(folder) / str(number) for number in count())


def _encode(
    model: LiteVAE, paths: Sequence[Path], options: EncodeOptions, batch_size: int, places: Iterator[Path]
) -> None:
    job = EncodeJob(model, DatasetInputs(Files(paths), 1000), options, next(places), {})
    job.run(batch_size=batch_size)
    job.finish()


def _loop(
    model: LiteVAE, paths: Sequence[Path], options: EncodeOptions, batch_size: int, places: Iterator[Path]
) -> None:
    """Encode as one would without a library: Pillow, torchvision, a file of mean and deviation per image."""
    folder = next(places)
    folder.mkdir()
    device = next(model.parameters()).device
    resize = transforms.Resize(options.size, transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
    transform = transforms.Compose([resize, transforms.CenterCrop(options.size), transforms.ToTensor(), normalise])
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        x = torch.stack([transform(Image.open(path).convert("RGB")) for path in batch]).to(device)
        with autocast(device.type, options.precision):
            posterior = model.encode(x)
        for path, mean, std in zip(batch, posterior.mean.half().cpu(), posterior.std.half().cpu(), strict=True):
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, folder / f"{path.stem}.safetensors")
