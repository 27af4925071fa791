"""Reconstruct images of any size with an autoencoder, and write files that show the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import from_uint8, image_to_tensor, read_picture, to_uint8
from olvae.data.picture_folder import find_images
from olvae.devices import FULL, autocast
from olvae.figures import comparison, error_map, save_image
from olvae.files import atomic_write
from olvae.metrics.pixel import psnr
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import crop_to, pad_to_multiple


@dataclass(frozen=True)
class ReconstructOptions:
    """Settings of reconstruction.

    Args:
        memory: bytes for encoding, and for decoding unless ``tile`` is given.
        tile: side of the decoder's tiles in latent positions.
        seed: decode a sample of the posterior, with the same seed for every image; None decodes the mode.
        precision: a name of :data:`~olvae.devices.PRECISIONS`.
    """

    device: torch.device
    memory: int
    tile: int | None = None
    seed: int | None = None
    precision: str = FULL


def collect_images(given: Iterable[Path], out: Path) -> list[Path]:
    """List the given files and the images in the given folders, except those in ``out``; each once, in order."""
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


def name_outputs(images: Sequence[Path], out: Path, channels: int = 3) -> dict[Path, Path]:
    """Choose where every image's result is written, NAME.png beside NAME_compare.png, all different.

    A name that is taken is prefixed with that of its folder, and numbered if that is taken as well. PNG has 1, 3 or 4
    channels; images of others become NAME.npy. Raise ConfigError if a result would overwrite an input.
    """
    suffix = ".png" if channels in (1, 3, 4) else ".npy"
    taken: set[str] = set()
    outputs: dict[Path, Path] = {}
    inputs = {image.resolve() for image in images}
    for image in images:
        longer = f"{image.resolve().parent.name}_{image.stem}".lstrip("_")
        names = chain((image.stem, longer), (f"{longer}_{number}" for number in count(2)))
        results = (out / f"{name}{suffix}" for name in names)
        result = next(p for p in results if not {p.name.lower(), comparison_path(p).name.lower()} & taken)
        for path in (result, comparison_path(result)):
            if path.resolve() in inputs:
                raise ConfigError(f"`out` {out}: {path} is one of the images: choose another folder")
            taken.add(path.name.lower())
        outputs[image] = result
    return outputs


def comparison_path(result: Path) -> Path:
    return result.with_name(f"{result.stem}_compare.png")


@torch.no_grad()
def reconstruct(
    model: Autoencoder,
    image: Tensor,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode and decode an image, uint8 (C, H, W) of any size.

    Autoencoders that can't work in tiles process the whole image at once, whatever memory that takes. ``progress`` is
    called with the fraction that is done.

    Returns:
        The reconstruction, uint8 of the same shape, on the CPU; and what was decoded, (1, n_z, h, w).

    Raises:
        ValueError: the reconstruction has non-finite values.
    """
    size = image.shape[-2], image.shape[-1]
    x = from_uint8(pad_to_multiple(image[None].to(options.device), model.downscale))
    with autocast(options.device.type, options.precision):
        posterior = model.encode_within(x, options.memory, progress and (lambda done: progress(0.3 * done)))
        del x
        seed = options.seed
        z = posterior.mode() if seed is None else posterior.sample(torch.Generator(options.device).manual_seed(seed))
        memory = options.memory if options.tile is None else None
        y = model.decode_tiled(z, options.tile, memory, progress and (lambda done: progress(0.3 + 0.7 * done)))
    if not torch.isfinite(y).all():
        raise ValueError("the reconstruction has non-finite values: set `precision` to 32, or check the weights")
    return _by_rows(lambda rows: to_uint8(rows).cpu(), crop_to(y, size)[0]), z


def _by_rows(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Apply a function of single pixels to (C, H, W) images, some rows at a time to save memory."""
    return torch.cat([function(*rows) for rows in zip(*(image.split(64, 1) for image in images), strict=True)], dim=1)


def reconstruct_file(
    model: Autoencoder,
    source: Path,
    out: Path,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> float:
    """Read an image, reconstruct it, write the result and beside it the comparison; return the PSNR in dB.

    Raise ValueError that names the image if it can't be read or reconstructed; then nothing is written.
    """
    x = image_to_tensor(read_picture(source, model.in_channels))
    try:
        y, _ = reconstruct(model, x, options, progress)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    value = psnr(x[None], y[None]).item()
    figure = comparison(
        {
            f"input {x.shape[-1]}x{x.shape[-2]}": x,
            f"output {value:.2f} dB": y,
            "error, white: 64/255": _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y),
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(y, out)
    with atomic_write(comparison_path(out)) as partial:
        figure.save(partial)
    return value


def reconstruct_files(
    model: Autoencoder,
    outputs: Mapping[Path, Path],
    options: ReconstructOptions,
    report: Callable[[str], None],
    progress: Callable[[float], None] = lambda _: None,
) -> int:
    """Reconstruct images into ``outputs``; report each in a line, also one that fails; return how many succeeded.

    ``progress`` is called with the number of images that are done. Raise ConfigError if ``options.tile`` is set, but
    the decoder can't be tiled.
    """
    if options.tile is not None and model.receptive_field is None:
        name = type(getattr(model, "decoder", model)).__name__
        raise ConfigError(f"`tile` {options.tile}: {name} sees the whole latent at every position: leave `tile` out")
    succeeded = 0
    for number, (source, result) in enumerate(outputs.items()):
        try:
            value = reconstruct_file(model, source, result, options, lambda part: progress(number + part))  # noqa: B023
            report(f"{value:6.2f} dB  {source} -> {result}")
            succeeded += 1
        except ValueError as error:
            report(f"error: {error}")
        progress(number + 1)
    return succeeded
