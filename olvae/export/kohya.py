"""Latents as the caches of kohya's sd-scripts: one .npz file beside each image.

Names and arrays are those that library/strategy_base.py and strategy_{sd,sd3,flux}.py of kohya-ss/sd-scripts read at
commit ab0d534 and after (February 2026; docs/encode.md says what was read).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import ShardRecord
from olvae.data.shards.latent_source import STATS, Latent
from olvae.export.inputs import Inputs, ShardInputs
from olvae.export.writers import Encoded, EncodeOptions, LatentWriter, check_one_latent
from olvae.files import atomic_write, safe_path
from olvae.models.autoencoder import Autoencoder

__all__ = ["KOHYA", "Architecture", "KohyaWriter"]

STRIDE = 8
"""Pixels per latent position along each side, the same in all these models."""


class Architecture(NamedTuple):
    """A diffusion model: what its caches' names end with, its latent channels, and whether its caches are scaled."""

    suffix: str
    channels: int
    scaled: bool = False


KOHYA = {
    "kohya-sd": Architecture("_sd.npz", 4),
    "kohya-sdxl": Architecture("_sdxl.npz", 4),
    "kohya-sd3": Architecture("_sd3.npz", 16),
    "kohya-flux": Architecture("_flux.npz", 16, scaled=True),
}
"""By format. The trainer scales what it reads of the first three by its own constants."""


@dataclass(frozen=True)
class KohyaWriter(LatentWriter):
    """One file for each image, at the image's path below the folder; a shard's own file lists them with their sizes.

    Args:
        architecture: that the caches are for.
        shift, scale: for scaled caches, the latent's shift_factor and scaling_factor.
    """

    architecture: Architecture = KOHYA["kohya-sd"]
    shift: float = 0.0
    scale: float = 1.0

    def path(self, number: int) -> Path:
        return self.folder / self.state / f"{number:06d}.files"

    def check_options(self, model: Autoencoder, inputs: Inputs, options: EncodeOptions) -> None:
        check_one_latent(options)
        if options.dtype != "float32":
            raise ConfigError(f"--dtype {options.dtype}: {options.format} is float32: leave it out")
        if (model.latent_channels, model.downscale) != (self.architecture.channels, STRIDE):
            raise ConfigError(
                f"--format {options.format}: that model takes {self.architecture.channels} channels at 1/{STRIDE} of "
                f"the image's size, but this autoencoder has {model.latent_channels} at 1/{model.downscale}"
            )
        if self.architecture.scaled and model.latents_mean is not None:
            raise ConfigError(f"--format {options.format}: the latents have factors per channel, and it has one of all")
        if isinstance(inputs, ShardInputs):
            raise ConfigError(f"--format {options.format}: its files lie beside images: give a folder, not shards")
        if inputs.classes:
            raise ConfigError(f"--classes: {options.format} has no place for labels: leave it out")
        names = set[str]()
        for number in range(len(inputs.images)):
            name = str(PurePosixPath(key := inputs.images.key(number)).with_suffix(""))
            if name in names:
                raise ConfigError(f"{key}: another image has this name, so {options.format} has one file for both")
            names.add(name)

    def plan(self) -> Mapping[str, Any]:
        return {"factors": [self.shift, self.scale]} if self.architecture.scaled else {}

    def accept(self, encoded: Encoded) -> Encoded | ReadError:
        if encoded.turned:  # the trainer reads pixels as they lie in the file
            return ReadError(encoded.item.key, "it is turned by its EXIF orientation: store it upright")
        width, height = encoded.size
        if width % STRIDE or height % STRIDE:
            return ReadError(encoded.item.key, f"{width}x{height} pixels would be padded to multiples of {STRIDE}")
        return encoded

    def pack(self, path: Path, samples: Iterator[Encoded]) -> None:
        sizes = {}
        for encoded in samples:
            width, height = encoded.original
            name = f"{safe_path(encoded.item.key).with_suffix('')}_{width:04d}x{height:04d}{self.architecture.suffix}"
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place, self.folder / self.state) as partial:
                np.savez(partial, **self._arrays(encoded))  # type: ignore[arg-type]  # any name could be allow_pickle
            sizes[name] = place.stat().st_size
        path.write_text(json.dumps(sizes), encoding="utf-8")

    def intact(self, number: int, record: ShardRecord) -> bool:
        if not super().intact(number, record):
            return False
        sizes = json.loads(self.path(number).read_text(encoding="utf-8"))
        places = ((self.folder / name, size) for name, size in sizes.items())
        return all(place.is_file() and place.stat().st_size == size for place, size in places)

    def any_stored(self) -> bool:
        return any(self.folder.rglob(f"*{self.architecture.suffix}"))

    def holds_others(self) -> bool:
        """Images and captions may be there already: caches and statistics of something else may not."""
        return self.any_stored() or (self.folder / STATS).exists()

    def finish(self, stats: Mapping[str, Any], images: Mapping[str, int]) -> None:
        """The trainer reads the caches alone."""

    def _arrays(self, encoded: Encoded) -> dict[str, NDArray[Any]]:
        own = encoded.latents[0].mean
        arrays = {
            "latents": self._scaled(encoded.latents[0]),
            "original_size": np.array(encoded.original),
            "crop_ltrb": np.array(_crop(encoded.original, encoded.size)),
        }
        if len(encoded.latents) > 1:
            arrays["latents_flipped"] = self._scaled(encoded.latents[1])
        return {f"{name}_{own.shape[1]}x{own.shape[2]}": array for name, array in arrays.items()}

    def _scaled(self, latent: Latent) -> NDArray[Any]:
        z = latent.mean.float()
        scaled: NDArray[Any] = ((z - self.shift) * self.scale if self.architecture.scaled else z).numpy()
        return scaled


def _crop(original: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the original when it is fitted into the encoded size: what the trainer computes."""
    width, height = size
    if width * original[1] > height * original[0]:
        fitted: tuple[float, float] = height * original[0] / original[1], height
    else:
        fitted = width, width * original[1] / original[0]
    left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    return left, top, left + fitted[0], top + fitted[1]
