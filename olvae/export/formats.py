"""Formats of an export: names of tensors, config, and the independent loader that reads each back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from olvae.checkpoint import PRIVATE_PREFIX, write_tensors
from olvae.config import Config, ConfigError, resolve_class
from olvae.export.diffusers_model import AutoencoderLiteVAE
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading import autoencoder_kl as kl
from olvae.models.loading import latent_diffusion as ldm
from olvae.models.loading.loader import LoadOptions
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import CONFIG_KEY, write_export
from olvae.modules.sdvae import set_padding

FACTORS = ("latents", "scaling_factor", "shift_factor")  # settings that say which ones a diffusion model needs
NO_FACTORS = dict.fromkeys(FACTORS, "the factors are the diffusion model's there, not the autoencoder's")
NO_MODULATION = "AutoencoderKL has no self-modulated convolutions"
IN_DIFFUSERS = "in diffusers"

# What ComfyUI builds, whatever the file says; A1111's config has the longer list.
STOCK = {"block_out_channels": ([128, 256, 512], [128, 256, 512, 512]), "layers_per_block": (2,)}


class Loaded(NamedTuple):
    """An export, as an independent loader has read it, in float32."""

    loader: str  # for reports: "loaded back", "in diffusers"
    moments: Callable[[Tensor], Tensor]  # images (B, C, H, W) in [-1, 1] to means, then log-variances
    decode: Callable[[Tensor], Tensor]  # latents (B, n_z, h, w) to images
    for_diffusion: Mapping[str, Any] | None = None  # scaling factor and the like; None if the format has no place

    @classmethod
    def of(cls, model: LiteVAE, loader: str = "loaded back") -> "Loaded":
        return cls(loader, model.moments, model.decode, model.for_diffusion)


class Layout(ABC):
    """A format of export: which models it can hold, how they are written, and how they are loaded back.

    A class of your own needs :meth:`load`, and what differs from the default: the weights as safetensors under their
    own names, in a folder with ``config.json`` or in one file.
    """

    suffix: ClassVar[str] = ""  # of the one file that is written; empty if it is a folder, which gets a model card
    refused: ClassVar[Mapping[str, str]] = {}  # settings of an export that mean nothing here, and why
    usage: ClassVar[str] = ""  # lines of Python for the card that load the export, named FOLDER_OR_ID, and use it

    def misfit(self, model: LiteVAE) -> str | None:  # noqa: ARG002
        """Say why the format can't hold a model; None if it can."""
        return None

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        """Name the weights as the format does, and shape them so."""
        return model.state_dict()

    def config(self, model: LiteVAE) -> Config | None:
        """Make the content of config.json or of the file's header; None if the format has no config."""
        return model.export_config()

    def write(self, model: LiteVAE, path: Path) -> None:
        """Write a folder or a file that does not exist yet."""
        tensors, config = self.tensors(model), self.config(model)
        if self.suffix:
            write_tensors(path, tensors, None if config is None else {CONFIG_KEY: json.dumps(config)})
        else:
            path.mkdir()
            write_export(tensors, config or {}, path)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """Read the tensors that :meth:`write` wrote, under the format's names."""
        return load_file(path if self.suffix else path / WEIGHTS_NAME)

    @abstractmethod
    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        """Load what was written, as its users do; ``model`` is for what the format does not say."""

    def notes(self, model: LiteVAE) -> Iterator[str]:  # noqa: ARG002
        """Yield what a user has to know about this model in this format."""
        yield from ()


class LiteVAELayout(Layout):
    """A folder that this package loads, and diffusers as AutoencoderLiteVAE; holds every network of this package."""

    usage = """from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("FOLDER_OR_ID")  # a plain torch module
z = vae.encode(images).sample()  # images in [-1, 1], (B, 3, H, W)
images = vae.decode(z)

vae = AutoencoderLiteVAE.from_pretrained("FOLDER_OR_ID")  # in diffusers, in place of AutoencoderKL"""

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        theirs = AutoencoderLiteVAE.from_pretrained(path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        return [Loaded.of(LiteVAE.from_pretrained(path)), Loaded.of(theirs.autoencoder, IN_DIFFUSERS)]


class DiffusersLayout(Layout):
    """The folder of diffusers' own AutoencoderKL, for networks of Stable Diffusion's kind."""

    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION, "onnx": "ONNX files are written by `format` litevae"}
    usage = """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("FOLDER_OR_ID")
z = vae.encode(images).latent_dist.sample()  # images in [-1, 1], (B, 3, H, W)
images = vae.decode(z).sample"""

    def misfit(self, model: LiteVAE) -> str | None:
        if not model.is_stable_diffusion:
            instead = "`format` litevae is for diffusers' AutoencoderLiteVAE, `format` comfyui for ComfyUI"
            return f"a LiteVAE has other networks than AutoencoderKL: {instead}"
        try:
            self.tensors(model), self.config(model)
            return None
        except ValueError as error:
            return f"{error}: `format` litevae can hold it"

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return kl.diffusers_weights(model)

    def config(self, model: LiteVAE) -> Config | None:
        kind = {"_class_name": AutoencoderKL.__name__, "_diffusers_version": diffusers.__version__}
        return {**kind, **kl.diffusers_config(model)}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        vae: Any = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        for half in _reflecting(model):
            set_padding(getattr(vae, half), "reflect")
        moments, decode = lambda x: vae.encode(x).latent_dist.parameters, lambda z: vae.decode(z).sample
        return [Loaded(IN_DIFFUSERS, moments, decode, vae.config)]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        if halves := " and the ".join(_reflecting(model)):
            how = 'loaders have to set padding_mode="reflect" on every convolution that pads, otherwise borders differ'
            yield f"padding: reflect in the {halves}, which this format can't say: {how}"


class LatentDiffusionLayout(DiffusersLayout):
    """One file with latent-diffusion's names, as in the published files, for ComfyUI and A1111."""

    suffix = ".safetensors"
    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION, **NO_FACTORS}

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        config = kl.diffusers_config(model)
        if (groups := config["norm_num_groups"]) != 32:
            raise ValueError(f"GroupNorm with {groups} groups: latent-diffusion always has 32")
        if not config["mid_block_add_attention"]:
            raise ValueError("no attention in the middle: latent-diffusion always has it")
        return ldm.latent_diffusion_weights(model)

    def config(self, model: LiteVAE) -> Config | None:  # noqa: ARG002
        return None

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        back = ldm.LatentDiffusionLoader().find(str(path), LoadOptions()).load().as_litevae(str(path))
        for half in _reflecting(model):
            set_padding(getattr(back, half), "reflect")
        return [Loaded.of(back)._replace(for_diffusion=None)]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        config = kl.diffusers_config(model)
        if odd := [f"{key} {config[key]}" for key, known in STOCK.items() if config[key] not in known]:
            yield f"ComfyUI and A1111 build Stable Diffusion's widths only, not {', '.join(odd)}"


class ComfyUILayout(Layout):
    """One file of a LiteVAE with its config in the header, for the ComfyUI node in integrations/comfyui.

    ComfyUI tells autoencoders apart by single names, such as ``decoder.conv_in.weight``, and loads without strictness:
    it would take a LiteVAE for Stable Diffusion's and decode noise. So every name has a prefix that it does not know.
    """

    suffix = ".safetensors"
    refused = NO_FACTORS

    def misfit(self, model: LiteVAE) -> str | None:
        return "an AutoencoderKL: `format` ldm is what ComfyUI loads" if model.is_stable_diffusion else None

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return {PRIVATE_PREFIX + name: tensor for name, tensor in model.state_dict().items()}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        return [Loaded.of(LiteVAE.from_pretrained(path))]


LAYOUTS: dict[str, type[Layout]] = {
    "litevae": LiteVAELayout,
    "diffusers": DiffusersLayout,
    "ldm": LatentDiffusionLayout,
    "comfyui": ComfyUILayout,
}


def find_layout(name: str) -> Layout:
    """Find a format by its name, or by the path of a class of your own; raise ConfigError if there is none."""
    if name in LAYOUTS:
        return LAYOUTS[name]()
    if "." not in name:
        raise ConfigError(f"`format` {name}: choose from {', '.join(LAYOUTS)}, or name a class, package.module.Class")
    return resolve_class(name, Layout)()  # type: ignore[type-abstract]


def _reflecting(model: LiteVAE) -> list[str]:
    """List the halves, encoder and decoder, that pad by reflection."""
    halves = {"encoder": model.encoder, "decoder": model.decoder}
    return [name for name, half in halves.items() if half.node["params"].get("padding") == "reflect"]
