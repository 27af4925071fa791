"""Images per second of ``olvae encode``, from files to files, beside a plain loop over diffusers."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from olvae.bench.timing import clocked, measure
from olvae.data.mapped.picture_folder import Files
from olvae.export.encode import EncodeJob
from olvae.export.inputs import DatasetInputs
from olvae.export.writers import EncodeOptions
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.diffusers import DiffusersAutoencoder
from olvae.modules.precision import FULL, in_precision

__all__ = ["bench_encode", "encode_passes"]

PEER = "diffusers, plain loop"
"""What ratios are relative to."""

CHANNELS = 4
"""Of the latents."""

DECODER = {"z_channels": CHANNELS, "channels": 32}
"""A small one: it is built, and not used."""


def bench_encode(
    images: Sequence[Path],
    size: int,
    batch_size: int,
    device: str,
    precision: str = FULL,
    scale: str = "S",
    width: int = 32,
    threads: int = 4,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Time encoding of the same files in turn; random weights.

    The loop opens a batch of files with Pillow, resizes and crops them with torchvision, encodes them and writes mean
    and deviation of each in a file of its own, in float16, as one would without a library.

    Args:
        images: files of RGB pictures.
        size: in pixels, a multiple of 8.
        precision: a name of :data:`~olvae.modules.precision.PRECISIONS`, the same for all, by autocast.
        scale: of the LiteVAE: S, B, M or L.
        width: channels of AutoencoderKL's first level; Stable Diffusion's has 128. A multiple of 32.
        threads: that read images for ``olvae encode``.
        rounds: measured passes over all images after a warm-up; the fastest counts.

    Returns:
        For each: name, images_per_s and ratio, of images per second to the loop's.
    """
    passes = encode_passes(images, size, batch_size, device, precision, scale, width, threads)
    with passes as run, torch.inference_mode():
        times = measure({name: clocked(encode, device) for name, encode in run.items()}, device, rounds)
    best = {name: measured.best for name, measured in times.items()}
    return [{"name": name, "images_per_s": len(images) / best[name], "ratio": best[PEER] / best[name]} for name in best]


@contextmanager
def encode_passes(
    images: Sequence[Path],
    size: int,
    batch_size: int,
    device: str,
    precision: str = FULL,
    scale: str = "S",
    width: int = 32,
    threads: int = 4,
) -> Iterator[dict[str, Callable[[], object]]]:
    """What :func:`bench_encode` times, by name: functions that encode all images into a temporary folder."""
    kl = _autoencoder_kl(width).eval().to(device)
    litevae = LiteVAE.from_config(
        {"target": "olvae.modules.litevae.encoder_model.LiteVAE_Encoder", "params": {"scale": scale}},
        {"target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder", "params": DECODER},
        CHANNELS,
    )
    options = EncodeOptions(size, precision=precision)
    inputs = DatasetInputs(Files(images), 1000)
    with tempfile.TemporaryDirectory(prefix="olvae-") as folder:
        places = (Path(folder) / str(number) for number in count())
        ours = {
            f"olvae encode, AutoencoderKL-{width}": DiffusersAutoencoder(kl),
            f"olvae encode, LiteVAE-{scale}": litevae.eval().to(device),
        }
        yield {
            PEER: lambda: _loop(kl, images, options, batch_size, next(places)),
            **{
                name: partial(_encode, model, inputs, options, batch_size, threads, places)
                for name, model in ours.items()
            },
        }


def _autoencoder_kl(width: int) -> Any:
    widths = (width, 2 * width, 4 * width, 4 * width)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=CHANNELS,
    )


def _encode(
    model: Autoencoder, inputs: DatasetInputs, options: EncodeOptions, batch_size: int, threads: int, places: Any
) -> None:
    job = EncodeJob(model, inputs, options, next(places), {})
    job.run(batch_size=batch_size, threads=threads)
    job.finish()


def _loop(model: Any, images: Sequence[Path], options: EncodeOptions, batch_size: int, folder: Path) -> None:
    folder.mkdir()
    transform = transforms.Compose(
        [
            transforms.Resize(options.size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(options.size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        x = torch.stack([transform(Image.open(path).convert("RGB")) for path in batch]).to(model.device)
        with in_precision(x.device.type, options.precision):
            latent = model.encode(x).latent_dist
        for path, mean, std in zip(batch, latent.mean.half().cpu(), latent.std.half().cpu(), strict=True):
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, folder / f"{path.stem}.safetensors")
