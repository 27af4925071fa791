"""open-LiteVAE: train, evaluate and export LiteVAE autoencoders for latent diffusion.

docs/api.md documents the public names, with an example each. A name is imported when it is first used, so that
``import olvae`` and ``olvae --help`` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # _NAMES once more, for type checkers
    from olvae.data.mapped.folder import FolderSource as FolderSource
    from olvae.data.mapped.huggingface import HuggingFaceSource as HuggingFaceSource
    from olvae.data.mapped.samples import SamplePhotographs as SamplePhotographs
    from olvae.data.mapped.torchvision import TorchvisionSource as TorchvisionSource
    from olvae.data.mix import MixSource as MixSource
    from olvae.data.shards.latents import LatentSource as LatentSource
    from olvae.data.shards.webdataset import WebDatasetSource as WebDatasetSource
    from olvae.evaluation.runner import Request as Request
    from olvae.evaluation.runner import evaluate as evaluate
    from olvae.export.diffusers_model import AutoencoderLiteVAE as AutoencoderLiteVAE
    from olvae.losses.adversarial import LeCam as LeCam
    from olvae.losses.adversarial import cutmix as cutmix
    from olvae.losses.adversarial import cutmix_consistency as cutmix_consistency
    from olvae.losses.adversarial import discriminator_accuracy as discriminator_accuracy
    from olvae.losses.adversarial import discriminator_loss as discriminator_loss
    from olvae.losses.adversarial import generator_loss as generator_loss
    from olvae.losses.adversarial import r1_penalty as r1_penalty
    from olvae.losses.objective import Objective as Objective
    from olvae.losses.perceptual import LPIPS as LPIPS
    from olvae.losses.terms import gaussian_loss as gaussian_loss
    from olvae.losses.terms import kl_loss as kl_loss
    from olvae.losses.terms import wavelet_loss as wavelet_loss
    from olvae.metrics.registry import METRICS as METRICS
    from olvae.metrics.registry import build_metrics as build_metrics
    from olvae.models.adversary import Adversary as Adversary
    from olvae.models.autoencoder import LiteVAE as LiteVAE
    from olvae.models.liteautoencoder import LiteAutoencoderKL as LiteAutoencoderKL
    from olvae.models.loading.targets import find_target as find_target
    from olvae.modules.discriminators.gigagan import GigaGAN as GigaGAN
    from olvae.modules.discriminators.patchgan import PatchGAN as PatchGAN
    from olvae.modules.discriminators.unetgan import UNetGAN as UNetGAN
    from olvae.modules.wavelet import dwt2 as dwt2
    from olvae.modules.wavelet import idwt2 as idwt2
    from olvae.modules.wavelet import wavedec2 as wavedec2
    from olvae.modules.wavelet import waverec2 as waverec2

__version__ = "0.1.0"

_NAMES = {
    "olvae.models.autoencoder": ("LiteVAE",),
    "olvae.models.loading.targets": ("find_target",),
    "olvae.export.diffusers_model": ("AutoencoderLiteVAE",),
    "olvae.data.mapped.folder": ("FolderSource",),
    "olvae.data.mapped.huggingface": ("HuggingFaceSource",),
    "olvae.data.mapped.samples": ("SamplePhotographs",),
    "olvae.data.mapped.torchvision": ("TorchvisionSource",),
    "olvae.data.mix": ("MixSource",),
    "olvae.data.shards.latents": ("LatentSource",),
    "olvae.data.shards.webdataset": ("WebDatasetSource",),
    "olvae.modules.wavelet": ("dwt2", "idwt2", "wavedec2", "waverec2"),
    "olvae.modules.discriminators.gigagan": ("GigaGAN",),
    "olvae.modules.discriminators.patchgan": ("PatchGAN",),
    "olvae.modules.discriminators.unetgan": ("UNetGAN",),
    "olvae.losses.adversarial": (
        "LeCam",
        "cutmix",
        "cutmix_consistency",
        "discriminator_accuracy",
        "discriminator_loss",
        "generator_loss",
        "r1_penalty",
    ),
    "olvae.losses.objective": ("Objective",),
    "olvae.losses.perceptual": ("LPIPS",),
    "olvae.losses.terms": ("gaussian_loss", "kl_loss", "wavelet_loss"),
    "olvae.models.adversary": ("Adversary",),
    "olvae.models.liteautoencoder": ("LiteAutoencoderKL",),
    "olvae.metrics.registry": ("METRICS", "build_metrics"),
    "olvae.evaluation.runner": ("Request", "evaluate"),
}
"""The public names, by the module that defines them."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'olvae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
