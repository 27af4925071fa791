"""Protocols: the choices behind a number, under a name and a hash that are reported with it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from olvae.data.image import EvalTransform
from olvae.data.pixels.size_and_range import Size

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
