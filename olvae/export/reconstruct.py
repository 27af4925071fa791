"""``olvae reconstruct``: images of any size through an autoencoder, and the files that show the result."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import from_uint8, image_to_tensor, read_picture, to_uint8
from olvae.data.mapped.picture_folder import find_images
from olvae.figures import comparison, error_map, save_image
from olvae.files import atomic_write
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import crop_to, pad_to_multiple

__all__ = [
    "ReconstructOptions",
    "collect_images",
    "comparison_path",
    "name_outputs",
    "psnr_by_rows",
    "reconstruct",
    "reconstruct_file",
]


@dataclass(frozen=True)
class ReconstructOptions:
    """How reconstructions are made.

    Args:
        device: to compute on.
        memory: bytes for encoding, and for decoding unless ``tile`` is given.
        tile: side of the decoder's tiles in latent positions.
        seed: decode a sample of the posterior, with the same seed for every image; None decodes the mode.
        autocast: half precision, or None.
    """

    device: torch.device
    memory: int
    tile: int | None = None
    seed: int | None = None
    autocast: torch.dtype | None = None


def collect_images(given: Iterable[Path], out: Path) -> list[Path]:
    """The given files, and the images in the given folders except those in ``out``; each once, in the given order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    found: dict[Path, Path] = {}
    for path in given:
        if path.is_dir():
            inside = [image for image in find_images(path) if out.resolve() not in image.resolve().parents]
            if not inside and path.resolve() != out.resolve():
                raise FileNotFoundError(f"{path}: no images in this folder except those of {out}")
        elif path.exists():
            inside = [path]
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
        for image in inside:
            found.setdefault(image.resolve(), image)
    if not found:
        raise FileNotFoundError(f"{out}: is the folder of the results: name one of images as well")
    return list(found.values())


def name_outputs(images: Sequence[Path], out: Path, suffix: str = ".png") -> dict[Path, Path]:
    """Where every image's result goes, NAME.png beside NAME_compare.png, all different.

    A name that is taken is prefixed with that of its folder, and numbered if that is taken as well.

    Raises:
        ConfigError: a result would overwrite an input.
    """
    taken: set[str] = set()
    outputs: dict[Path, Path] = {}
    inputs = {image.resolve() for image in images}
    for image in images:
        for name in _names(image):
            result = out / f"{name}{suffix}"
            files = {path.name.lower(): path for path in (result, comparison_path(result))}
            if not files.keys() & taken:
                break
        taken |= files.keys()
        for path in files.values():
            if path.resolve() in inputs:
                raise ConfigError(f"--out {out}: {path} is one of the images: choose another folder")
        outputs[image] = result
    return outputs


def comparison_path(result: Path) -> Path:
    return result.with_name(f"{result.stem}_compare.png")


def _names(image: Path) -> Iterable[str]:
    longer = f"{image.resolve().parent.name}_{image.stem}".lstrip("_")
    yield from (image.stem, longer)
    yield from (f"{longer}_{number}" for number in count(2))


@torch.no_grad()
def reconstruct(
    model: Autoencoder,
    image: Tensor,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
    on_latent: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """uint8 (C, H, W) of any size -> its reconstruction, uint8 of the same shape, on the CPU.

    Autoencoders that can't work in tiles process the whole image at once, whatever memory that takes.

    Args:
        progress: called with the fraction that is done.
        on_latent: called with what is decoded, (1, n_z, h, w).

    Raises:
        ValueError: the reconstruction has non-finite values.
    """
    size = image.shape[-2], image.shape[-1]
    x = from_uint8(pad_to_multiple(image[None].to(options.device), model.downscale))
    with torch.autocast(options.device.type, options.autocast, enabled=options.autocast is not None):
        posterior = model.encode_within(x, options.memory, progress and (lambda done: progress(0.3 * done)))
        del x
        if options.seed is None:
            z = posterior.mode()
        else:
            z = posterior.sample(torch.Generator(options.device).manual_seed(options.seed))
        if on_latent is not None:
            on_latent(z)
        memory = options.memory if options.tile is None else None
        y = model.decode_tiled(z, options.tile, memory, progress and (lambda done: progress(0.3 + 0.7 * done)))
    if not torch.isfinite(y).all():
        raise ValueError("the reconstruction has non-finite values: use --precision 32, or check the weights")
    return _by_rows(lambda rows: to_uint8(rows).cpu(), crop_to(y, size)[0])


def _by_rows(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Apply a function of single pixels to (C, H, W) images, some rows at a time to save memory."""
    return torch.cat([function(*rows) for rows in zip(*(image.split(64, 1) for image in images), strict=True)], dim=1)


def psnr_by_rows(x: Tensor, y: Tensor) -> float:
    """PSNR in dB of two uint8 (C, H, W) images, equal to :func:`olvae.metrics.pixel.psnr` but with little memory."""
    error = sum(int((a.int() - b.int()).square().sum()) for a, b in zip(x.split(64, 1), y.split(64, 1), strict=True))
    return 10.0 * math.log10(255.0**2 * x.numel() / error) if error else math.inf


def reconstruct_file(
    model: Autoencoder,
    source: Path,
    out: Path,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> float:
    """Read an image, reconstruct it, write the result and beside it the comparison; the PSNR in dB.

    Raises:
        ValueError: the image can't be read or reconstructed; the message names it, and nothing is written.
        OSError: a file can't be written.
    """
    x = image_to_tensor(read_picture(source, model.in_channels))
    try:
        y = reconstruct(model, x, options, progress)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    value = psnr_by_rows(x, y)
    size = f"{x.shape[-1]}x{x.shape[-2]}"
    figure = comparison(
        {
            f"input {size}": x,
            f"output {value:.2f} dB": y,
            "error, white: 64/255": _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y),
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(y, out)
    with atomic_write(comparison_path(out)) as partial:
        figure.save(partial)
    return value
