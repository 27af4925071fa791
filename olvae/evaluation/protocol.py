"""Protocols: the choices behind a number, under a name and a hash; and the round trip of images that follows them."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.image import EvalTransform
from olvae.data.opening import open_test_source
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.source import Source
from olvae.devices import now, peak_memory
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import count_macs, count_parameters, full_float32
from olvae.modules.distributions import keyed_generator

log = logging.getLogger("olvae")

SSIM = {
    "gaussian": "mean over images; Gaussian window 11, sigma 1.5, K 0.01 and 0.03, range 255, per channel",
    "uniform": "mean over images; uniform window 7, sample covariance, K 0.01 and 0.03, range 255, per channel",
}
LPIPS = {
    "vgg": "mean over images; lpips 0.1, VGG16 with its linear heads, images in [-1, 1]",
    "alex": "mean over images; lpips 0.1, AlexNet with its linear heads, images in [-1, 1]",
}
REFERENCE = "reference: the images themselves"
DINOV2 = f"timm's DINOv2 ViT-L/14, class token after the last norm, antialiased bicubic resize to 224; {REFERENCE}"
INCEPTION = "torch-fidelity's Inception (TensorFlow's of 2015-12-05), 2048 features; " + REFERENCE


@dataclass(frozen=True)
class Protocol:
    """How images are made, reconstructed and compared."""

    name: str = "open-litevae"  # of the preset; a changed preset has another hash
    version: int = 2  # incremented when the same name comes to mean something else
    size: Size = 256  # of the images, in pixels
    resize: str = "shorter side"  # this and the next: see olvae.data.image.EvalTransform
    resample: str = "bicubic"
    posterior: Literal["mode", "sample"] = "mode"  # what a latent is
    seed: int = 0  # of the samples' noise, which also depends on the image's key
    ssim: Literal["gaussian", "uniform"] = "gaussian"  # window
    lpips: Literal["vgg", "alex"] = "vgg"  # network that the name LPIPS stands for
    crops: str | None = None  # how the source makes its test images, if not by ``resize``
    n: int | None = None  # images
    range: str | None = None  # of their values, unless they have 8 bits

    @property
    def transform(self) -> EvalTransform:
        return EvalTransform(self.size, self.resize, self.resample)

    @property
    def noise_seed(self) -> int | None:
        """The seed of the samples' noise; None for the posterior's mode."""
        return self.seed if self.posterior == "sample" else None

    @property
    def columns(self) -> Mapping[str, str]:
        """For metrics with variants, the one that this protocol means by the name."""
        ssim = {"gaussian": "ssim", "uniform": "ssim_uniform"}[self.ssim]
        return {"ssim": ssim, "lpips": {"vgg": "lpips", "alex": "lpips_alex"}[self.lpips]}

    def as_dict(self) -> dict[str, Any]:
        """Every choice in words, as metrics.json has it."""
        sample = f"one sample, its noise seeded by {self.seed} and the image's key"
        return {
            "name": self.name,
            "version": self.version,
            "images": self.crops or self.transform.describe(),
            "size": self.size,
            "n": self.n,
            "posterior": "mode" if self.posterior == "mode" else sample,
            "precision": "float32",
            "pixels": "clamped to [-1, 1], rounded to uint8"
            if self.range is None
            else f"clamped to {self.range}; 255 below stands for the range",
            "psnr": "mean over images of 10 log10(255^2 / MSE), MSE over all values of an image",
            "ssim": SSIM[self.ssim],
            "ms_ssim": "mean over images; torchmetrics, five scales, the SSIM of each as above, range 255",
            "l1": "mean over images of the mean absolute difference, range 1",
            "lpips": LPIPS[self.lpips],
            "rfid": INCEPTION,
            "kid": f"{INCEPTION}; torch-fidelity's subsets and seed",
            "fdd": DINOV2,
        }

    def hash(self) -> str:
        """A hash of the choices and the version, not of the name: equal choices are the same protocol."""
        choices = {key: value for key, value in self.as_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]


PROTOCOLS = {  # by name; docs/evaluation.md says whose choices they are, with sources
    protocol.name: protocol
    for protocol in (
        Protocol(),
        Protocol("latent-diffusion", posterior="sample"),
        Protocol("dc-ae", resize="adm", lpips="alex"),
        Protocol("llamagen", resize="adm", posterior="sample", ssim="uniform"),
        Protocol("va-vae", resample="bilinear", posterior="sample"),
    )
}


def open_images_for(
    models: Mapping[str, Autoencoder],
    config: Config,
    data: str | None = None,
    size: Size | None = None,
    usual: Size = 256,
) -> Source:
    """Open the test images of models, as :func:`open_test_source`; ConfigError unless all models take them.

    Models without a range of values take the others'.
    """
    stated = list(
        dict.fromkeys(m.pixel_range for m in models.values() if not m.pixel_range.eight_bits)
    )
    if len(stated) > 1:
        raise ConfigError(
            f"the targets take values of {stated[0]} and of {stated[1]}: use a command for each"
        )
    pixels = stated[0] if stated else EIGHT_BITS
    if len(channels := {model.in_channels: name for name, model in models.items()}) > 1:
        counts = " and ".join(f"{count} ({channels[count]})" for count in sorted(channels))
        raise ConfigError(f"the targets take images of {counts} channels: use a command for each")
    source = open_test_source(config, data, size, count := next(iter(channels)), pixels, usual)
    if not pixels.eight_bits:
        pixels.check_data(source.pixel_range)
    if source.channels != count:
        raise ConfigError(
            f"the images have {source.channels} channels, and {channels[count]} takes {count}"
        )
    for name, model in models.items():
        if not source.size.fits(f := model.downscale):
            why = f"a latent position stands for {f}x{f} pixels, and {source.size.short} is not a multiple of {f}"
            raise ConfigError(f"{name}: {why}: set `size` to {source.size.multiples(f)[0].short}")
    return source


class Reconstructed(NamedTuple):
    latents: Tensor  # the posterior's means, (B, n_z, H/f, W/f), on the device
    images: Tensor  # levels of the range, (B, C, H, W), on the CPU: uint8, or float32 for other than 8 bits


@dataclass(frozen=True)
class Cost:
    """What one image of the evaluated size costs. Speed and memory are those of this run's batches and device."""

    parameters: int
    encode_macs: int | None  # multiply-accumulates; None if they can't be counted
    decode_macs: int | None
    encode_images_per_s: float | None
    decode_images_per_s: float | None
    peak_memory_bytes: (
        int | None
    )  # of a batch, beyond weights and images, by a GPU's allocator; None on the CPU
    batch_size: int  # of the largest batch; it is smaller than requested if there are few images
    device: str  # the GPU's name, or the CPU with its threads


class RoundTrip:
    """Encode and decode in float32, clamp and, for 8 bits, round to uint8, and measure what that costs.

    The model, in evaluation mode, runs on the device; images come and go on the CPU. Without a seed the latent is the
    posterior's mode, with one a sample, whose noise depends on it and on the image's key.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: str = "cpu",
        seed: int | None = None,
        name: str = "the autoencoder",
        pixel_range: PixelRange = EIGHT_BITS,
    ) -> None:
        self.model, self.device, self.seed = model.to(device), device, seed
        self.pixel_range = pixel_range
        self.name = name  # for messages
        self._times: list[
            tuple[int, float, float]
        ] = []  # images of a batch, seconds to encode and to decode them
        self._peaks: list[int] = []

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str], x: Tensor) -> Reconstructed:
        """Reconstruct a batch's images, (B, C, H, W); ArithmeticError for a non-finite result, which levels hide."""
        images = self.pixel_range.normalise(x.to(self.device))
        with full_float32(images), peak_memory(self.device, self._peaks):
            start = now(self.device)
            posterior = self.model.encode(images)
            encoded = now(self.device)
            z = posterior.mode()  # (B, n_z, H/f, W/f)
            if self.seed is not None and not posterior.deterministic:
                generators = [keyed_generator(f"{self.seed} {key}") for key in keys]
                noise = [torch.randn(z.shape[1:], generator=generator) for generator in generators]
                z = z + posterior.std * torch.stack(noise).to(z)
            drawn = now(self.device)
            y = self.model.decode(z)
            self._times.append((len(images), encoded - start, now(self.device) - drawn))
        finite = y.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ArithmeticError(
                f"{self.name}: its reconstruction of {keys[finite.index(False)]} is not finite"
            )
        return Reconstructed(posterior.mean, self.pixel_range.to_levels(y).cpu())

    def cost(self, size: Size) -> Cost:
        """What images of ``size`` pixels cost: as counted, and as measured so far.

        The first batch warms up and is not counted, unless it is the only one.
        """
        model, sides = self.model, Sides.of(size)
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        counted = self._times[1:] or self._times or [(0, 0.0, 0.0)]
        images, encode_s, decode_s = (sum(column) for column in zip(*counted, strict=True))
        return Cost(
            parameters=count_parameters(model),
            encode_macs=_macs(model, "encode", model.in_channels, *sides),
            decode_macs=_macs(model, "decode", model.latent_channels, *sides // model.downscale),
            encode_images_per_s=images / encode_s if encode_s else None,
            decode_images_per_s=images / decode_s if decode_s else None,
            peak_memory_bytes=max(self._peaks[1:] or self._peaks, default=None),
            batch_size=max(batch[0] for batch in self._times or counted),
            device=torch.cuda.get_device_name(self.device)
            if self.device.startswith("cuda")
            else cpu,
        )


def _macs(model: Autoencoder, method: str, *shape: int) -> int | None:
    try:
        return count_macs(model, 1, *shape, method=method)
    except Exception as error:  # a network of the user's own may be more than torch, or need values
        log.warning(
            "%s: multiplications of `%s` not counted: %s",
            type(model).__name__,
            method,
            first_line(error),
        )
        return None
