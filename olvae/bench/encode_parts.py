"""Measure `olvae encode` with a network of no cost: its parts alone, and the whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from olvae.bench.measure import Case, Setting
from olvae.data.dataset import Subset
from olvae.devices import now
from olvae.export.encode_inputs import (
    DatasetInputs,
    EncodeOptions,
    Inputs,
    Reader,
    Units,
    find_inputs,
)
from olvae.export.encoding import EncodeJob
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB
from olvae.modules.distributions import DiagonalGaussian

# Images of a source that are encoded, some of them several times; or its first shard.
IMAGES_A_SHARD = 256


class FreeEncoder(Autoencoder):
    """An autoencoder that computes nothing: its latents are every eighth pixel."""

    in_channels = 3
    downscale = 8
    latent_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(()))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(x[..., ::8, ::8].repeat(1, 8, 1, 1))

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def encode_cases(setting: Setting) -> list[Case]:
    """Time the parts of encoding alone, in this process, and the whole, by reader processes."""
    cases = []
    for name in setting.sources:
        # The images: one output shard.
        inputs = find_inputs(name, FreeEncoder.in_channels, IMAGES_A_SHARD)
        if isinstance(inputs, DatasetInputs):
            numbers = [i % len(inputs.images) for i in range(IMAGES_A_SHARD)]
            inputs = replace(inputs, images=Subset(inputs.images, numbers), grouped=None)
        else:
            inputs = replace(inputs, shards=inputs.shards[:1])

        # The whole has its share of the rate at which so many readers would read.
        variants = ["reading", "starting", "writing", *setting.workers]
        size = (setting.size, setting.batch_size)
        read: Mapping[str, Case] = {}
        for variant in variants:
            workers = 0
            shown = str(variant)
            if isinstance(variant, int):
                workers = variant
                shown = f"whole, {workers} readers"
            run = partial(time_part, setting, inputs, shown, workers)
            work = 1 / max(1, workers)
            case = Case(name, shown, "uint8", run, 1, *size, work, "images", read)
            if shown == "reading":
                read = {"of_reading": case}
            cases.append(case)
    return cases


def time_part(setting: Setting, inputs: Inputs, part: str, workers: int) -> list[float]:
    """Return the seconds of an image in a part of encoding, in a folder that is removed."""
    model = FreeEncoder().to(setting.device)
    options = EncodeOptions(setting.size)
    batch_size = setting.batch_size
    with TemporaryDirectory() as folder:
        job = EncodeJob(model, inputs, options, Path(folder) / "latents", {})

        # What the part is given.
        reader = Reader(inputs, options)
        units = Units(inputs, options, [0], batch_size)
        sent = list(units)
        images = []
        started = []
        if part in ("starting", "writing"):
            images = list(units.images([reader[unit] for unit in sent]))
            started = list(job.started(images, batch_size, GIB))

        works: Mapping[str, Callable[[], object]] = {
            "reading": lambda: [reader[unit] for unit in sent],
            "starting": lambda: list(job.started(images, batch_size, GIB)),
            "writing": lambda: job.write(started, lambda _: None),
        }
        whole = partial(job.run, batch_size=batch_size, workers=workers)
        with job.shards.locked("olvae bench"):
            start = now(setting.device)
            works.get(part, whole)()
            return [(now(setting.device) - start) / sum(len(unit) for unit in sent)]
