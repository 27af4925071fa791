"""An autoencoder of Stable Diffusion's kind as the folder of diffusers' own AutoencoderKL."""

from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from olvae.export.compare import check_equal, check_factors, check_tensors, distance
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.stable_diffusion import diffusers_config, diffusers_weights
from olvae.models.pretrained import write_export
from olvae.models.spec import CONFIG_NAME, WEIGHTS_NAME
from olvae.modules.sdvae import set_padding

__all__ = ["KL_CLASS", "compare_autoencoder_kl", "reflects", "write_autoencoder_kl"]

KL_CLASS = "AutoencoderKL"


def reflects(model: LiteVAE) -> list[str]:
    """The halves of the autoencoder, encoder and decoder, that pad by reflection, which no stock format can say."""
    halves = {"encoder": model.encoder, "decoder": model.decoder}
    return [name for name, half in halves.items() if half.node["params"].get("padding") == "reflect"]


def write_autoencoder_kl(model: LiteVAE, folder: Path) -> None:
    """Write config.json and the weights under AutoencoderKL's names.

    Raises:
        ValueError: AutoencoderKL can't express the networks.
    """
    config = {"_class_name": KL_CLASS, "_diffusers_version": diffusers.__version__, **diffusers_config(model)}
    folder.mkdir()
    write_export(diffusers_weights(model), config, folder)


def compare_autoencoder_kl(model: LiteVAE, folder: Path) -> dict[str, float]:
    """Load a folder with diffusers and compare it with the model: tensors bit for bit, what a diffusion model has to
    know, and outputs, with the padding that :func:`reflects` names set by hand.

    Raises:
        ValueError: something differs.
    """
    check_tensors(folder / WEIGHTS_NAME, diffusers_weights(model))
    theirs = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    check_factors(folder / CONFIG_NAME, theirs.config, model.for_diffusion)
    for half in reflects(model):
        set_padding(getattr(theirs, half), "reflect")

    def moments(x: Tensor) -> Tensor:
        parameters: Tensor = theirs.encode(x).latent_dist.parameters
        return parameters

    def decode(z: Tensor) -> Tensor:
        sample: Tensor = theirs.decode(z).sample
        return sample

    return {"in diffusers": check_equal("loading it with diffusers", distance(model, moments, decode))}
