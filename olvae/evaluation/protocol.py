"""The choices behind a number, named, so that they travel with it."""

import hashlib
import json
from dataclasses import asdict, dataclass

__all__ = ["Protocol"]


@dataclass(frozen=True)
class Protocol:
    """How reconstructions are made and compared.

    Numbers of the same images compare if their protocols' hashes are equal; which images they were is not in it.
    """

    name: str = "open-litevae"
    version: int = 1
    images: str = "bicubic antialiased resize of the shorter side, centre crop"
    size: int = 256
    posterior: str = "mode"
    pixels: str = "clamped to [-1, 1], rounded to uint8"
    psnr: str = "mean over images of 10 log10(255^2 / MSE)"
    ssim: str = "mean over images; Gaussian window 11, sigma 1.5, K 0.01 and 0.03, range 255, per channel"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def hash(self) -> str:
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
