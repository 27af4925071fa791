"""Reconstruct images of any size with an autoencoder, and write files that show the result."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import MODES, image_to_tensor, read_picture
from olvae.data.picture_folder import find_images
from olvae.devices import FULL, autocast
from olvae.figures import ARRAYS, comparison, error_map, save_image
from olvae.files import atomic_write
from olvae.metrics.metric import psnr
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import crop_to, pad_to_multiple


@dataclass(frozen=True)
class ReconstructOptions:
    """Settings of reconstruction."""

    device: torch.device
    # Bytes for activations.
    memory: int
    # For samples of the posterior, the same for every image; None decodes the mode.
    seed: int | None = None
    # A name of olvae.devices.PRECISIONS.
    precision: str = FULL


def plan_outputs(given: Iterable[Path], out: Path) -> dict[Path, Path]:
    """Choose each image's place below ``out``, without extension.

    It has the image's name, in the folder that it has below a given folder. Images in given folders
    are found, except in ``out``. Raise FileNotFoundError if something does not exist or there is no
    image, ConfigError if a result would overwrite an image. Of images with one name, the later ones
    keep their extension, or get a number.
    """
    # Images by their resolved path, each once, as given and with the place of its result.
    results = out.resolve()
    found: dict[Path, tuple[Path, Path]] = {}
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        is_folder = path.is_dir()
        has_results = results.is_relative_to(path.resolve())
        for image in find_images(path) if is_folder else [path]:
            below = image.relative_to(path) if is_folder else Path(image.name)
            if not (has_results and results in image.resolve().parents):
                found.setdefault(image.resolve(), (image, out / below.with_suffix("")))
    if not found:
        raise FileNotFoundError(f"no images outside of the folder of the results, {out}: name some")

    places: dict[Path, Path] = {}
    taken: set[str] = set()
    for image, place in found.values():
        # The first free name; compared in lower case, as some file systems do.
        whole = place.with_name(image.name)
        numbered = (whole.with_name(f"{whole.name}-{number}") for number in count(2))
        for free in chain((place, whole), numbered):
            names = {str(free).lower(), f"{free}_compare".lower()}
            if taken.isdisjoint(names):
                break
        taken |= names
        places[image] = free

        # Files there are replaced if they are earlier results, which have a comparison beside them.
        compared = free.with_name(f"{free.name}_compare.png")
        for suffix in (".png", *ARRAYS, "_compare.png"):
            file = free.with_name(free.name + suffix)
            if file.resolve() in found:
                raise ConfigError(
                    f"`out` {out}: {file.name} is one of the images: choose another folder"
                )
            if file.exists() and not compared.exists():
                raise ConfigError(
                    f"`out` {out}: {file.name} is there, and no earlier result: choose another "
                    "folder"
                )
    return places


@torch.no_grad()
def reconstruct(
    model: Autoencoder,
    image: Tensor,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode and decode an image, (C, H, W) of any size.

    ``progress`` is called with the fraction that is done. Return the reconstruction, levels of the
    model's range, of the same shape, on the CPU: uint8, or float32 for other than 8 bits; and what
    was decoded, (1, n_z, h, w). Raise ValueError if the reconstruction has non-finite values.
    """
    report = progress or (lambda _: None)
    size = image.shape[-2], image.shape[-1]
    x = pad_to_multiple(image[None].to(options.device), model.downscale)
    x = model.pixel_range.normalise(x)

    # Encoding takes about 30 % of the time. x is large: it is freed before decoding.
    with autocast(options.device.type, options.precision):
        posterior = model.encode_within(x, options.memory, lambda done: report(0.3 * done))
        del x
        if options.seed is None:
            z = posterior.mode()
        else:
            z = posterior.sample(torch.Generator(options.device).manual_seed(options.seed))
        y = model.decode_tiled(z, None, options.memory, lambda done: report(0.3 + 0.7 * done))
    if not torch.isfinite(y).all():
        raise ValueError(
            "the reconstruction has non-finite values: set `precision` to 32, or check the weights"
        )
    return _by_rows(lambda rows: model.pixel_range.to_levels(rows).cpu(), crop_to(y, size)[0]), z


def _by_rows(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Apply a function of single pixels to (C, H, W) images, some rows at a time to save memory."""
    parts = [image.split(64, 1) for image in images]
    return torch.cat([function(*rows) for rows in zip(*parts, strict=True)], dim=1)


def reconstruct_file(
    model: Autoencoder,
    source: Path,
    place: Path,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> tuple[float, Path]:
    """Read an image, write its reconstruction and the comparison; return PSNR in dB and path.

    The reconstruction is ``place``.png, or .npy where PNG lacks such channels; real values are
    written as the image's kind of file, or .npy. Raise ValueError that names the image if it can't
    be read or reconstructed; then nothing is written.
    """
    pixels = model.pixel_range
    image = image_to_tensor(read_picture(source, model.in_channels, pixels))
    try:
        y, _ = reconstruct(model, image, options, progress)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error

    # The comparison: input, output and error side by side.
    x = pixels.levels(image)
    value = psnr(x[None], y[None]).item()
    figure = comparison(
        {
            f"input {x.shape[-1]}x{x.shape[-2]}": pixels.picture(x),
            f"output {value:.2f} dB": pixels.picture(y),
            "error, white: 64/255": _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y),
        }
    )

    # The reconstruction: in a kind of file that holds its channels and values.
    suffix = ".png" if len(y) in MODES else ".npy"
    if not pixels.eight_bits:
        suffix = source.suffix.lower().replace(".tiff", ".tif")
        if suffix not in ARRAYS:
            suffix = ".npy"
    result = place.with_name(place.name + suffix)
    result.parent.mkdir(parents=True, exist_ok=True)
    save_image(y if pixels.eight_bits else pixels.real(y), result)
    with atomic_write(place.with_name(f"{place.name}_compare.png")) as partial:
        figure.save(partial)
    return value, result


def reconstruct_files(
    model: Autoencoder,
    places: Mapping[Path, Path],
    options: ReconstructOptions,
    report: Callable[[str], None],
    progress: Callable[[float], None] = lambda _: None,
) -> int:
    """Reconstruct images into places of :func:`plan_outputs`; report each; count the successes.

    ``report`` is called with a line, ``progress`` with the number of images that are done.
    """
    succeeded = 0
    for number, (source, place) in enumerate(places.items()):
        try:
            value, result = reconstruct_file(
                model,
                source,
                place,
                options,
                lambda part: progress(number + part),  # noqa: B023  (called before the next image)
            )
            report(f"{value:6.2f} dB  {source} -> {result}")
            succeeded += 1
        except ValueError as error:
            report(f"error: {error}")
        progress(number + 1)
    return succeeded
