"""Reconstruct images of any size with an autoencoder, and write files that show the result."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import MODES, image_to_tensor
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import PixelRange, TooManyPixelsError
from olvae.data.places import (
    EXTENSIONS,
    VOLUME_SUFFIXES,
    holds_volumes,
    is_volume_file,
    names_volume,
)
from olvae.data.read_errors import UnreadableImageError
from olvae.data.scenes.georeference import Gaps, read_georeference, read_scene
from olvae.data.scenes.rasters import raster_driver
from olvae.data.volumes.volume import ACQUIRED, Axis, Volume
from olvae.data.volumes.volume_source import (
    WITHOUT_WINDOW,
    find_volumes,
    neighbours_of,
    open_volume,
    slice_photo,
)
from olvae.devices import FULL, autocast, return_freed_memory
from olvae.export.raster_rows import open_raster, read_raster
from olvae.export.tiff_rows import ImageRows, open_rows
from olvae.figures import ARRAYS, comparison, error_map, save_image, tiff_layout
from olvae.files import atomic_write
from olvae.metrics.metric import psnr
from olvae.models.autoencoder import Autoencoder, DecoderInput, LiteVAE
from olvae.models.large.streaming import Plane, Stream, Strips, encode_strips
from olvae.models.large.tiling import (
    crop_to,
    decode_window,
    pad_to_multiple,
    peak_bytes,
    split,
    tile_for,
)
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder

# Side of the tiles of a large image's reconstruction in pixels, and of its pictures at least; the
# largest file that is no BigTIFF.
TILE = 256
LONGEST = 2400
MOST_CLASSIC = 2**32 - 2**25

NOT_FINITE = "the reconstruction has non-finite values: set `precision` to 32, or check the weights"
NOT_OF_8_BITS = "a model that was trained on it reconstructs it"
ONLY_WHOLE = (
    "larger ones are read piece by piece by a LiteVAE alone, and without `sample` or a decoder at "
    "2x"
)
AS_TILES = (
    "save it as a tiled TIFF, which is read piece by piece: "
    "vips copy '{}' '{}.tif[tile,bigtiff]', or gdal_translate -co TILED=YES -co BIGTIFF=IF_SAFER"
)


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
    # Along which volumes are cut, as in training.
    axis: Axis = ACQUIRED


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
        has_results = results.is_relative_to(path.resolve())
        for image, below in images_of(path):
            if not (has_results and results in image.resolve().parents):
                found.setdefault(image.resolve(), (image, out / below))
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
        # A volume's result keeps its format; of a DICOM series, it is a folder.
        volumes = ("", *VOLUME_SUFFIXES) if is_volume(image) else ()
        for suffix in (".png", *ARRAYS, *volumes, "_compare.png"):
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


def is_volume(image: Path) -> bool:
    """Whether this is a volume's file, or the folder and UID of a DICOM series: no file."""
    return is_volume_file(str(image)) or (not image.exists() and names_volume(image.name))


def images_of(given: Path) -> Iterator[tuple[Path, Path]]:
    """Find the images of a folder, or take a file: each with its path below, without extension."""
    images = [given]
    is_folder = given.is_dir() and not raster_driver(given)
    if is_folder and holds_volumes(str(given)):
        images = [volume.path for volume in find_volumes(given)]
    elif is_folder:
        images = find_images(given)
    for image in images:
        below = image.relative_to(given) if is_folder else Path(image.name)
        if is_volume(image):
            # The longest extension that fits; a UID has dots, and none.
            ends = [end for end in VOLUME_SUFFIXES if below.name.lower().endswith(end)]
            longest = max(map(len, ends), default=0)
            yield image, below.with_name(below.name[: len(below.name) - longest])
        else:
            yield image, below.with_suffix("")


class Reconstruction(NamedTuple):
    """An image as it was decoded, in levels of the model's range, on the CPU.

    uint8, or float32 for other than 8 bits.
    """

    # Of the image's shape, (C, H, W): what a decoder at 2x gives, shrunk.
    levels: Tensor
    # What was decoded, (1, n_z, h, w).
    latent: Tensor
    # As decoded, (C, enlarge H, enlarge W).
    enlarged: Tensor


@torch.no_grad()
def reconstruct(
    model: Autoencoder,
    image: Tensor,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> Reconstruction:
    """Encode and decode an image, (C, H, W) of any size.

    ``progress`` is called with the fraction that is done. Raise ValueError if the reconstruction
    has non-finite values.
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
        raise ValueError(NOT_FINITE)

    def to_levels(images: Tensor, by: int) -> Tensor:
        inside = crop_to(images, (by * size[0], by * size[1]))[0]
        return _by_rows(lambda rows: model.pixel_range.to_levels(rows).cpu(), inside)

    enlarged = to_levels(y, model.enlarge)
    levels = enlarged if model.enlarge == 1 else to_levels(model.shrink(y), 1)
    return Reconstruction(levels, z, enlarged)


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
    written as the image's kind of file, or .npy. A decoder at 2x makes it twice as large, and what
    is compared is shrunk. A scene's is a GeoTIFF of its size, with its place on earth, and its
    missing values, which are not compared. A TIFF, JPEG 2000 or Zarr that is too large for
    the memory is reconstructed by :class:`LargeImage`, a volume by :func:`reconstruct_volume`.
    Raise ValueError that names the image if it can't be read or reconstructed; then nothing is
    written.
    """
    if is_volume(source):
        return reconstruct_volume(model, open_volume(source), place, options, progress)
    pixels = model.pixel_range
    file = (source, model.in_channels, pixels, options.memory)
    georeference = read_georeference(source, pixels)

    # By rows, if the networks do not see the whole image at once. A sample's noise is drawn whole.
    advice = ONLY_WHOLE
    if (
        isinstance(model, LiteVAE)
        and isinstance(model.encoder, LiteVAE_Encoder)
        and model.decoder.paths() is not None
        and model.enlarge == 1
        and options.seed is None
    ):
        advice = AS_TILES.format(source.name, source.stem)
        rows = open_raster(*file) or open_rows(*file)
        if rows is not None:
            rows.georeference = georeference
            with closing(rows):
                return LargeImage(model, model.encoder, rows, options, progress).write(place)

    # Or in memory.
    try:
        found = read_raster(*file, georeference) or read_scene(*file[:3], georeference)
        image, gaps = found
    except UnreadableImageError as error:
        if isinstance(error.__cause__, TooManyPixelsError | Image.DecompressionBombError):
            raise ValueError(f"{error}: {advice}") from error
        # Formats of slide scanners and the like: libvips and GDAL read many.
        if not source.name.lower().endswith(EXTENSIONS) and not raster_driver(source):
            advice = AS_TILES.format(source.name, source.stem)
            raise ValueError(f"{error}: {advice}") from error
        raise
    x = pixels.levels(image)
    try:
        decoded = reconstruct(model, image, options, progress)
        y, missing = without_gaps(decoded.levels, x, gaps)
        value = compared_psnr(psnr(x[None], y[None]).item(), missing, x.numel())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error

    errors = _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y)
    shown = (pixels.picture(x), pixels.picture(y), errors)

    # The reconstruction: in a kind of file that holds its channels and values.
    if georeference is None and gaps is None:
        y = decoded.enlarged
    tags = {} if georeference is None else {"extratags": georeference.tags}
    suffix = ".tif" if tags else result_suffix(source, len(y), pixels)
    result = place.with_name(place.name + suffix)
    result.parent.mkdir(parents=True, exist_ok=True)
    save_image(real_values(y, pixels, gaps), result, **tags)
    save_comparison(place, f"input {x.shape[-1]}x{x.shape[-2]}", value, shown)
    return value, result


def reconstruct_volume(
    model: Autoencoder,
    volume: Volume,
    place: Path,
    options: ReconstructOptions,
    progress: Callable[[float], None] | None = None,
) -> tuple[float, Path]:
    """Reconstruct a volume slice by slice, and write it in its own format, geometry and units.

    Of several channels, the middle one is the slice. The comparison shows the slice in the middle.
    Values lie inside the model's range. Return PSNR in dB over all values, and path.

    Raise ValueError that names the volume if it can't be read, reconstructed or written.
    """
    report = progress or (lambda _: None)
    pixels = model.pixel_range
    if pixels.eight_bits:
        raise ValueError(f"{volume.name}: {WITHOUT_WINDOW}, and {NOT_OF_8_BITS}")
    window = replace(pixels, outside="clip")
    axis = volume.axis_of(options.axis)
    count = volume.shape[axis]
    neighbours = neighbours_of(model.in_channels)
    middle = slice(neighbours, neighbours + 1)

    # Reconstruct slices, in real units; keep the picture of one.
    values = np.empty(volume.shape, dtype=np.float32)
    shown: tuple[Tensor, ...] = ()
    error = 0.0
    for number in range(count):
        image = image_to_tensor(slice_photo(volume, axis, number, neighbours, window).read())
        try:
            decoded = reconstruct(
                model,
                image,
                options,
                lambda part: report((number + part) / count),  # noqa: B023  (called before it)
            )
        except ValueError as failed:
            raise ValueError(f"{volume.name}: slice {number}: {failed}") from failed
        x = pixels.levels(image)[middle]
        np.moveaxis(values, axis, 0)[number] = pixels.real(decoded.levels)[neighbours].numpy()
        y = decoded.levels[middle]
        error += (x.double() - y.double()).square().sum().item()
        if number == count // 2:
            shown = (pixels.picture(x), pixels.picture(y), error_map(x[None], y[None])[0])

    # Write the volume, then the comparison.
    value = summed_psnr(error, values.size)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = volume.write(values, place)
    except ValueError as failed:
        raise ValueError(f"{volume.name}: {failed}") from failed
    save_comparison(place, f"slice {count // 2} of {count}", value, shown)
    return value, result


def save_comparison(place: Path, title: str, value: float, shown: Sequence[Tensor]) -> None:
    """Write ``place``_compare.png: input, output and error side by side; ``value`` is PSNR."""
    titles = (title, f"output {value:.2f} dB", "error, white: 64/255")
    figure = comparison(dict(zip(titles, shown, strict=True)))
    with atomic_write(place.with_name(f"{place.name}_compare.png")) as partial:
        figure.save(partial)


def summed_psnr(error: float, values: int) -> float:
    """PSNR in dB of a sum of squared errors of levels; infinite without an error."""
    mean = torch.tensor(error / values, dtype=torch.double)
    return (10.0 * (255.0**2 / mean).log10()).item()


def result_suffix(source: Path, channels: int, pixels: PixelRange) -> str:
    """Choose a kind of file that holds a result's channels and values."""
    if pixels.eight_bits:
        return ".png" if channels in MODES else ".npy"
    suffix = source.suffix.lower().replace(".tiff", ".tif")
    return suffix if suffix in ARRAYS else ".npy"


def without_gaps(y: Tensor, x: Tensor, gaps: Gaps | None) -> tuple[Tensor, int]:
    """Levels of a reconstruction without an error where the input ``x`` has gaps; their number."""
    if gaps is None:
        return y, 0
    return torch.where(gaps.missing, x, y), int(gaps.missing.sum())


def real_values(y: Tensor, pixels: PixelRange, gaps: Gaps | None) -> Tensor:
    """Levels of a reconstruction as the values to write, with the input's gaps."""
    values = y if pixels.eight_bits else pixels.real(y)
    return values if gaps is None else gaps.restore(values, pixels)


def compared_psnr(all_values: float, missing: int, values: int) -> float:
    """PSNR in dB without the missing values, which have no error, from the PSNR over all.

    Raises ValueError: all are missing.
    """
    if missing == values:
        raise ValueError("all of its values are missing")
    return all_values + 10.0 * math.log10((values - missing) / values)


class LargeImage:
    """The reconstruction of an image that is never in memory as a whole, nor is its latent.

    The encoder reads strips of rows, as :func:`~olvae.models.large.streaming.encode_strips` does.
    The decoder's tiles are those of :func:`reconstruct`, row by row, and each row of tiles is
    written before the next one is decoded.
    """

    def __init__(
        self,
        model: LiteVAE,
        encoder: LiteVAE_Encoder,
        image: ImageRows,
        options: ReconstructOptions,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.image = image
        self.options = options
        self.report = progress or (lambda _: None)
        # Of pixels that were written: the squared error, how many values are missing, and pictures,
        # shrunk by this factor.
        self.error = 0.0
        self.missing = 0
        self.factor = 2 ** max(0, (max(image.height, image.width) // LONGEST).bit_length() - 1)
        self.pictures: list[list[Tensor]] = [[], [], []]

    @torch.no_grad()
    def write(self, place: Path) -> tuple[float, Path]:
        """Write ``place``.tif, in tiles, and the comparison; return PSNR in dB and path.

        Raise ValueError that names the image if it can't be reconstructed.
        """
        import tifffile

        channels, height, width = self.image.shape
        pixels = self.model.pixel_range
        dtype = np.dtype("uint8" if pixels.eight_bits else "float32")
        result = place.with_name(f"{place.name}.tif")
        georeference = self.image.georeference
        tags = () if georeference is None else georeference.tags
        try:
            with autocast(self.options.device.type, self.options.precision):
                latent = self.encode()
                return_freed_memory()
                result.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(result) as partial:
                    tifffile.imwrite(
                        partial,
                        self.tiles(self.decode(latent)),
                        # TIFF stores grey images as (H, W).
                        shape=(height, width, channels) if channels > 1 else (height, width),
                        dtype=dtype,
                        tile=(TILE, TILE),
                        bigtiff=math.prod(self.image.shape) * dtype.itemsize > MOST_CLASSIC,
                        **tiff_layout(channels, dtype, tags),
                    )
            number = math.prod(self.image.shape)
            value = compared_psnr(summed_psnr(self.error, number), self.missing, number)
        except UnreadableImageError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.image.name}: {error}") from error

        whole = [torch.cat(self.pictures.pop(0), dim=1) for _ in range(3)]
        return_freed_memory()
        save_comparison(place, f"input {width}x{height}", value, whole)
        return value, result

    def encode(self) -> Plane:
        """Encode the image, padded as :func:`reconstruct` does."""
        f = self.model.downscale
        channels, height, width = self.image.shape

        def read(start: int, stop: int) -> Tensor:
            x = self.image.read(start, min(stop, height))[None].to(self.options.device)
            return self.model.pixel_range.normalise(pad_to_multiple(x, f))

        padded = Strips((channels, -(-height // f) * f, -(-width // f) * f), read)
        stream = Stream(self.options.memory, self.options.device, torch.float32)
        return encode_strips(self.encoder, padded, stream, lambda done: self.report(0.3 * done))

    def decode(self, latent: Plane) -> Iterator[Tensor]:
        """Decode levels, (C, rows, W), for a row of the file's tiles after the other.

        Each is overwritten later.
        """
        channels, height, width = self.image.shape
        decoder = self.model.decoder
        paths = decoder.paths()
        assert paths is not None
        z = DecoderInput(self.model, latent, self.options.device)
        windows = decoder.windows(z)
        tile = max(z.shape)
        if peak_bytes(decoder, lambda d, x: d(x), z.shape) > self.options.memory:
            tile = tile_for(decoder, self.options.memory, z.shape)
        rows_of_tiles = split(z.shape[2], tile, decoder.upscale)

        # One band serves every row of tiles. At its top are the rows before them that do not fill a
        # tile of the file yet.
        dtype = torch.uint8 if self.model.pixel_range.eight_bits else torch.float32
        most = max(stop - start for start, stop in rows_of_tiles)
        band = torch.empty(channels, TILE + most, width, dtype=dtype)
        held = 0
        for rows in rows_of_tiles:
            bottom = min(rows[1], height)
            filled = held + bottom - rows[0]
            for columns in split(z.shape[3], tile, decoder.upscale):
                y = decode_window(paths, windows, (rows, columns))[0]
                if not torch.isfinite(y).all():
                    raise ValueError(NOT_FINITE)
                y = crop_to(y, (bottom - rows[0], width - columns[0]))
                band[:, held:filled, slice(*columns)] = self.model.pixel_range.to_levels(y)
                del y
                return_freed_memory()
            self.report(0.3 + 0.7 * bottom / height)

            # All that fills tiles of the file.
            whole = filled if bottom == height else filled // TILE * TILE
            for top in range(0, whole, TILE):
                yield band[:, top : min(top + TILE, whole)]
            held = filled - whole
            band[:, :held] = band[:, whole:filled]

    def tiles(self, bands: Iterator[Tensor]) -> Iterator[NDArray[Any]]:
        """Cut rows of tiles into tiles, (rows, columns, C), and compare them with the input."""
        pixels = self.model.pixel_range
        _, height, width = self.image.shape
        # Fewer rows at a time than a tile has: a dozen copies of them are made.
        step = max(64, self.factor)
        for top, band in zip(range(0, height, TILE), bands, strict=True):
            parts = []
            for start, y in zip(range(top, height, step), band.split(step, 1), strict=False):
                image, gaps = self.image.read_with_gaps(start, start + y.shape[1])
                x = pixels.levels(image)
                y, missing = without_gaps(y, x, gaps)
                self.missing += missing
                self.compare(x, y)
                parts.append(real_values(y, pixels, gaps))
            values = torch.cat(parts, dim=1).permute(1, 2, 0).numpy()
            if len(band) == 1:
                values = values[..., 0]
            return_freed_memory()
            for left in range(0, width, TILE):
                yield values[:, left : left + TILE]

    def compare(self, x: Tensor, y: Tensor) -> None:
        """Add levels of some rows, (C, rows, W), to the error and to the pictures."""
        for a, b in zip(x.split(64, 1), y.split(64, 1), strict=True):
            self.error += (a.double() - b.double()).square().sum().item()
        shown = (
            self.model.pixel_range.picture(x),
            self.model.pixel_range.picture(y),
            _by_rows(lambda a, b: error_map(a[None], b[None])[0], x, y),
        )
        for pictures, picture in zip(self.pictures, shown, strict=True):
            small = F.avg_pool2d(picture.float(), self.factor, ceil_mode=True)
            pictures.append(small.round().to(torch.uint8))


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
