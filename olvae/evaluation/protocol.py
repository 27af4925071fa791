"""Evaluation protocols: named choices of images, latents and metrics, with a hash."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from olvae.data.image import EvalTransform
from olvae.data.pixels.size_and_range import Size

log = logging.getLogger("olvae")

# Choices in words. They are part of a protocol's hash: a changed word is another protocol.
SSIM_WORDS = {
    "gaussian": "mean over images; Gaussian window 11, sigma 1.5, K 0.01 and 0.03, range 255, "
    "per channel",
    "uniform": "mean over images; uniform window 7, sample covariance, K 0.01 and 0.03, range 255, "
    "per channel",
}
LPIPS_WORDS = {
    "vgg": "mean over images; lpips 0.1, VGG16 with its linear heads, images in [-1, 1]",
    "alex": "mean over images; lpips 0.1, AlexNet with its linear heads, images in [-1, 1]",
}
REFERENCE = "reference: the images themselves"
FDD_WORDS = (
    "timm's DINOv2 ViT-L/14, class token after the last norm, antialiased bicubic resize to 224; "
    f"{REFERENCE}"
)
RFID_WORDS = f"torch-fidelity's Inception (TensorFlow's of 2015-12-05), 2048 features; {REFERENCE}"


@dataclass(frozen=True)
class Protocol:
    """How images are made, reconstructed and compared."""

    name: str = "open-litevae"  # of the preset; a changed preset has another hash
    version: int = 2  # incremented when the same name comes to mean something else
    size: Size = 256  # of the images, in pixels
    resize: str = "shorter side"  # this and the next: see olvae.data.image.EvalTransform
    resample: str = "bicubic"
    posterior: Literal["mode", "sample"] = "mode"  # a latent is the posterior's mode, or a sample
    seed: int = 0  # of the samples' noise, which also depends on the image's key
    ssim: Literal["gaussian", "uniform"] = "gaussian"  # window
    lpips: Literal["vgg", "alex"] = "vgg"  # network that the name LPIPS stands for
    crops: str | None = None  # how the source makes its test images, if not by ``resize``
    n: int | None = None  # number of images
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
        """By metric, the variant that this protocol means by the metric's name."""
        ssim = {"gaussian": "ssim", "uniform": "ssim_uniform"}[self.ssim]
        lpips = {"vgg": "lpips", "alex": "lpips_alex"}[self.lpips]
        return {"ssim": ssim, "lpips": lpips}

    def as_dict(self) -> dict[str, Any]:
        """Return every choice in words, as in metrics.json."""
        posterior = "mode"
        if self.posterior != "mode":
            posterior = f"one sample, its noise seeded by {self.seed} and the image's key"
        pixels = "clamped to [-1, 1], rounded to uint8"
        if self.range is not None:
            pixels = f"clamped to {self.range}; 255 below stands for the range"
        return {
            "name": self.name,
            "version": self.version,
            "images": self.crops or self.transform.describe(),
            "size": self.size,
            "n": self.n,
            "posterior": posterior,
            "precision": "float32",
            "pixels": pixels,
            "psnr": "mean over images of 10 log10(255^2 / MSE), MSE over all values of an image",
            "ssim": SSIM_WORDS[self.ssim],
            "ms_ssim": "mean over images; torchmetrics, five scales, the SSIM of each as above, "
            "range 255",
            "l1": "mean over images of the mean absolute difference, range 1",
            "lpips": LPIPS_WORDS[self.lpips],
            "rfid": RFID_WORDS,
            "kid": f"{RFID_WORDS}; torch-fidelity's subsets and seed",
            "fdd": FDD_WORDS,
        }

    def hash(self) -> str:
        """Hash the choices and the version. The name is left out: equal choices, equal hash."""
        choices = {key: value for key, value in self.as_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]


# By name. docs/evaluate.md says whose choices they are, with sources.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(),
        Protocol("latent-diffusion", posterior="sample"),
        Protocol("dc-ae", resize="adm", lpips="alex"),
        Protocol("llamagen", resize="adm", posterior="sample", ssim="uniform"),
        Protocol("va-vae", resample="bilinear", posterior="sample"),
    )
}
