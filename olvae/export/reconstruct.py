"""Pictures of any size through an autoencoder, and the files that show how they came out."""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import from_uint8, image_to_tensor, read_picture, to_uint8
from olvae.data.mapped.folder import find_images
from olvae.figures import comparison, error_map
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.large.padding import crop_to, pad_to_multiple
from olvae.models.large.streaming import encode_within
from olvae.models.large.tiling import decode_tiled
from olvae.modules.distributions import Posterior

__all__ = ["Job", "Settings", "collect_images", "plan", "psnr_by_rows", "reconstruct", "run_job"]


@dataclass(frozen=True)
class Settings:
    """How reconstructions are made.

    Attributes:
        device: of the computation.
        memory: bytes for encoding, and for decoding if there is no tile.
        tile: side of the decoder's tiles in latent positions.
        seed: a sample of the posterior is decoded, drawn anew from this seed for every picture; None: its mode.
        autocast: half precision, or None.
    """

    device: torch.device
    memory: int
    tile: int | None = None
    seed: int | None = None
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Job:
    """A picture and where its files go."""

    source: Path
    out: Path
    comparison: Path


def collect_images(given: Iterable[Path], out: Path) -> list[Path]:
    """The files as they are, and those of folders, but for what is in ``out``; each once, in the given order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    found: dict[Path, Path] = {}
    for path in given:
        if path.is_dir():
            inside = [image for image in find_images(path) if out.resolve() not in image.resolve().parents]
            if not inside and path.resolve() != out.resolve():
                raise FileNotFoundError(f"{path}: no images in this folder but those of {out}")
        elif path.exists():
            inside = [path]
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
        for image in inside:
            found.setdefault(image.resolve(), image)
    if not found:
        raise FileNotFoundError(f"{out}: holds the results; name the folder of the images as well")
    return list(found.values())


def plan(images: Sequence[Path], out: Path, suffix: str = ".png") -> list[Job]:
    """Where every picture's files go: NAME.png and NAME_compare.png, with no two the same.

    A name that is taken gets its folder's in front, and a number behind if that is taken as well.

    Raises:
        ConfigError: a result would replace an input.
    """
    taken: set[str] = set()
    jobs: list[Job] = []
    inputs = {image.resolve() for image in images}
    for image in images:
        name = next(
            name for name in _names(image) if not {f"{name}{suffix}".lower(), f"{name}_compare.png".lower()} & taken
        )
        job = Job(image, out / f"{name}{suffix}", out / f"{name}_compare.png")
        for path in (job.out, job.comparison):
            taken.add(path.name.lower())
            if path.resolve() in inputs:
                raise ConfigError(f"--out {out}: {path} is one of the images: choose another folder")
        jobs.append(job)
    return jobs


def _names(image: Path) -> Iterable[str]:
    yield image.stem
    longer = f"{image.resolve().parent.name}_{image.stem}".lstrip("_")
    yield longer
    number = 2
    while True:
        yield f"{longer}_{number}"
        number += 1


@torch.no_grad()
def reconstruct(
    model: Autoencoder, image: Tensor, settings: Settings, progress: Callable[[float], None] | None = None
) -> Tensor:
    """uint8 (C, H, W) of any size -> its reconstruction, uint8 of the same shape, on the CPU.

    Others' autoencoders are run whole, whatever memory that takes.
    """
    size = image.shape[-2], image.shape[-1]
    x = from_uint8(pad_to_multiple(image[None].to(settings.device), model.downscale))
    with torch.autocast(settings.device.type, settings.autocast, enabled=settings.autocast is not None):
        posterior: Posterior
        if isinstance(model, LiteVAE):
            posterior = encode_within(model, x, settings.memory, progress and (lambda done: progress(0.3 * done)))
        else:
            posterior = model.encode(x)
        del x
        if settings.seed is None:
            z = posterior.mode()
        else:
            z = posterior.sample(torch.Generator(settings.device).manual_seed(settings.seed))
        memory = settings.memory if settings.tile is None else None
        if isinstance(model, LiteVAE):
            y = decode_tiled(model, z, settings.tile, memory, progress and (lambda done: progress(0.3 + 0.7 * done)))
        else:
            y = model.decode(z)
    if not torch.isfinite(y).all():
        raise ValueError("the reconstruction has values that are not finite: use --precision 32 or look at the weights")
    return _by_rows(lambda rows: to_uint8(rows).cpu(), crop_to(y, size)[0])


def _by_rows(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """A function of single pixels of (C, H, W), without its intermediate results for all of them at once."""
    return torch.cat([function(*rows) for rows in zip(*(image.split(64, 1) for image in images), strict=True)], dim=1)


def psnr_by_rows(x: Tensor, y: Tensor) -> float:
    """PSNR in dB of two uint8 (C, H, W), as :func:`olvae.metrics.pixel.psnr` but with little memory."""
    error = sum(int((a.int() - b.int()).square().sum()) for a, b in zip(x.split(64, 1), y.split(64, 1), strict=True))
    return 10.0 * math.log10(255.0**2 * x.numel() / error) if error else math.inf


def run_job(model: Autoencoder, job: Job, settings: Settings, progress: Callable[[float], None] | None = None) -> float:
    """Read, reconstruct, write both files; the PSNR in dB.

    Raises:
        ValueError: the image can't be read, or not reconstructed; it is named, and nothing is written.
        OSError: a file can't be written.
    """
    x = image_to_tensor(read_picture(job.source, model.in_channels))
    try:
        y = reconstruct(model, x, settings, progress)
    except ValueError as error:
        raise ValueError(f"{job.source}: {error}") from error
    value = psnr_by_rows(x, y)
    size = f"{x.shape[-1]}x{x.shape[-2]}"
    figure = comparison(
        {
            f"input {size}": x,
            f"output {value:.2f} dB": y,
            "error, white: 64/255": _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y),
        }
    )
    _write(job.out, lambda path: _save(y, path))
    _write(job.comparison, lambda path: figure.save(path))
    return value


def _save(image: Tensor, path: Path) -> None:
    array = image.permute(1, 2, 0).contiguous().numpy()
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Under another name first, so that no half of a file is left behind."""
    with tempfile.TemporaryDirectory(prefix=".olvae-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save(draft)
        os.replace(draft, path)  # noqa: PTH105
