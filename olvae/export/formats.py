"""Formats of an export: names of tensors, config, and the independent loader that reads each back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from olvae.checkpoint import PRIVATE_PREFIX, write_tensors
from olvae.config import Config, ConfigError, resolve_class
from olvae.export.diffusers_model import AutoencoderLiteVAE
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.diffusers_models import DiffusersAutoencoder
from olvae.models.loading.families import Family, StableDiffusion, Tiny, family_of
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.original_files import OriginalLoader, original_names
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import CONFIG_KEY, write_export
from olvae.modules.base import HALVES
from olvae.modules.distributions import deterministic_moments
from olvae.modules.others.wrapped import encode_image
from olvae.modules.sdvae import set_padding

# Names by which ComfyUI knows scaling and shift factor of a tiny autoencoder: SD 1's and 2's, SDXL's, SD3's, FLUX.1's.
VAE_APPROX = {
    "taesd": (0.18215, 0),
    "taesdxl": (0.13025, 0),
    "taesd3": (1.5305, 0.0609),
    "taef1": (0.3611, 0.1159),
}

FACTORS = (
    "latents",
    "scaling_factor",
    "shift_factor",
)  # settings that say which ones a diffusion model needs
NO_FACTORS = dict.fromkeys(
    FACTORS, "the factors are the diffusion model's there, not the autoencoder's"
)
NO_MODULATION = "the networks of this format have no self-modulated convolutions"
IN_DIFFUSERS = "in diffusers"

# What ComfyUI builds, whatever the file says; A1111's config has the longer list.
STOCK = {
    "in_channels": (3,),
    "out_channels": (3,),
    "block_out_channels": ([128, 256, 512], [128, 256, 512, 512]),
    "layers_per_block": (2,),
}


class Loaded(NamedTuple):
    """An export, as an independent loader has read it, in float32."""

    loader: str  # for reports: "loaded back", "in diffusers"
    moments: Callable[
        [Tensor], Tensor
    ]  # images (B, C, H, W) in [-1, 1] to means, then log-variances
    decode: Callable[[Tensor], Tensor]  # latents (B, n_z, h, w) to images
    for_diffusion: Mapping[str, Any] | None = (
        None  # scaling factor and the like; None if the format has no place
    )

    @classmethod
    def of(cls, model: LiteVAE, loader: str = "loaded back") -> "Loaded":
        return cls(loader, model.moments, model.decode, model.for_diffusion)


class Layout(ABC):
    """A format of export: which models it can hold, how they are written, and how they are loaded back.

    A class of your own needs :meth:`load`, and what differs from the default: the weights as safetensors under their
    own names, in a folder with ``config.json`` or in one file.
    """

    suffix: ClassVar[str] = (
        ""  # of the one file that is written; empty if it is a folder, which gets a model card
    )
    refused: ClassVar[
        Mapping[str, str]
    ] = {}  # settings of an export that mean nothing here, and why

    def misfit(self, model: LiteVAE) -> str | None:  # noqa: ARG002
        """Say why the format can't hold a model; None if it can."""
        return None

    def in_units(self, model: LiteVAE) -> bool:  # noqa: ARG002
        """Whether latents are in a diffusion model's units in this format, so that no factor is left to apply."""
        return False

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
            write_tensors(
                path, tensors, None if config is None else {CONFIG_KEY: json.dumps(config)}
            )
        else:
            path.mkdir()
            write_export(tensors, config or {}, path)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """Read the tensors that :meth:`write` wrote, under the format's names."""
        return load_file(path if self.suffix else path / WEIGHTS_NAME)

    @abstractmethod
    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        """Load what was written, as its users do; ``model`` is for what the format does not say."""

    def usage(self, model: LiteVAE) -> str:  # noqa: ARG002
        """Write lines of Python for the card that load the export, named FOLDER_OR_ID, and use it."""
        return ""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        """Yield what a user has to know about this model in this format."""
        if not model.pixel_range.eight_bits:
            yield f"values of images, {model.pixel_range}: what loads this format takes and gives [-1, 1] for them"


class LiteVAELayout(Layout):
    """A folder that this package loads, and diffusers as AutoencoderLiteVAE; holds every network of this package."""

    def usage(self, model: LiteVAE) -> str:
        return f"""from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("FOLDER_OR_ID")  # a plain torch module
z = vae.encode(images).sample()  # images in [-1, 1], (B, {model.in_channels}, H, W)
images = vae.decode(z)

vae = AutoencoderLiteVAE.from_pretrained("FOLDER_OR_ID")  # in diffusers, in place of AutoencoderKL
# diffusers.AutoModel.from_pretrained("FOLDER_OR_ID", trust_remote_code=True) loads it without these imports"""

    def notes(self, model: LiteVAE) -> Iterator[str]:  # the range is in config.json
        if model.latents_mean is not None:
            own = "pipelines of FLUX.2, Qwen-Image and Wan take them from their own class of autoencoder alone"
            yield f"latents_mean, latents_std: {own}: decode their latents with LiteVAE.from_diffusion and decode"

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        theirs = AutoencoderLiteVAE.from_pretrained(
            path, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        return [
            Loaded.of(LiteVAE.from_pretrained(path)),
            Loaded.of(theirs.autoencoder, IN_DIFFUSERS),
        ]


class DiffusersLayout(Layout):
    """The folder of a class of diffusers, for networks that it has: AutoencoderKL, AutoencoderKLFlux2, ..."""

    refused: ClassVar[Mapping[str, str]] = {
        "fold": NO_MODULATION,
        "onnx": "ONNX files are written by `format` litevae",
    }
    instead = "litevae"

    def misfit(self, model: LiteVAE) -> str | None:
        if family_of(model) is None:
            instead = "`format` litevae is for diffusers' AutoencoderLiteVAE, `format` comfyui for ComfyUI"
            return f"no class of diffusers has these networks: {instead}"
        try:
            self.tensors(model), self.config(model)
            return None
        except ValueError as error:
            return f"{error}: `format` {self.instead} can hold it"

    def in_units(self, model: LiteVAE) -> bool:
        return _family(model).units(model) is not None

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return _family(model).to_diffusers(model)

    def config(self, model: LiteVAE) -> Config | None:
        family = _family(model)
        kind = {"_class_name": family.kind(model), "_diffusers_version": diffusers.__version__}
        return {**kind, **family.config(model)}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        kind = getattr(diffusers, _family(model).kind(model))
        vae: Any = kind.from_pretrained(
            path, torch_dtype=torch.float32, low_cpu_mem_usage=False
        ).eval()
        for half in _reflecting(model):
            set_padding(getattr(vae, half), "reflect")
        return [_in_diffusers(vae, model)]

    def usage(self, model: LiteVAE) -> str:
        kind, frames = _family(model).kind(model), model.encoder.node["params"].get("frames", False)
        latent = ".latent" if model.deterministic else ".latent_dist.sample()"
        latent += "s" if self.in_units(model) else ""
        return f"""from diffusers import {kind}

vae = {kind}.from_pretrained("FOLDER_OR_ID")
z = vae.encode(images){latent}  # images in [-1, 1], (B, {model.in_channels}, {"1, " if frames else ""}H, W)
images = vae.decode(z).sample"""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        if halves := " and the ".join(_reflecting(model)):
            how = 'loaders have to set padding_mode="reflect" on every convolution that pads, otherwise borders differ'
            yield f"padding: reflect in the {halves}, which this format can't say: {how}"
        if self.in_units(model):
            yield "latents: in a diffusion model's units, as TAESD's: no factor is left to apply"


class OriginalLayout(DiffusersLayout):
    """One file with the names of its own project: latent-diffusion's for A1111, FLUX.2's, Wan's; ComfyUI reads each."""

    suffix = ".safetensors"
    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION, **NO_FACTORS}
    instead = "diffusers"

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        family = _family(model)
        config, kind = family.config(model), family.kind(model)
        if (groups := config.get("norm_num_groups", 32)) != 32:
            raise ValueError(f"GroupNorm with {groups} groups: latent-diffusion always has 32")
        if not config.get("mid_block_add_attention", True):
            raise ValueError("no attention in the middle: latent-diffusion always has it")
        return original_names(kind, family.to_diffusers(model))

    def config(self, model: LiteVAE) -> Config | None:
        return (
            None if isinstance(family_of(model), StableDiffusion) else super().config(model)
        )  # for our own loader

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        back = OriginalLoader().find(str(path), LoadOptions()).load().as_litevae(str(path))
        for half in _reflecting(model):
            set_padding(getattr(back, half), "reflect")
        return [Loaded.of(back)._replace(for_diffusion=None)]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        config = _family(model).config(model)
        if odd := [
            f"{key} {config[key]}"
            for key, known in STOCK.items()
            if config.get(key, known[0]) not in known
        ]:
            yield f"ComfyUI and A1111 build Stable Diffusion's widths only, not {', '.join(odd)}"


class ComfyUILayout(Layout):
    """One file of a LiteVAE with its config in the header, for the ComfyUI node in integrations/comfyui.

    ComfyUI tells autoencoders apart by single names, such as ``decoder.conv_in.weight``, and loads without strictness:
    it would take a LiteVAE for Stable Diffusion's and decode noise. So every name has a prefix that it does not know.
    """

    suffix = ".safetensors"
    refused = NO_FACTORS

    def misfit(self, model: LiteVAE) -> str | None:
        if (family := family_of(model)) is None:
            rgb = model.in_channels == 3 and model.pixel_range.eight_bits
            return (
                None
                if rgb
                else "images that are not RGB of 8 bits, which ComfyUI's are: `format` litevae can hold it"
            )
        instead = (
            "`format` diffusers"
            if OriginalLayout().misfit(model)
            else "`format` ldm is what ComfyUI loads"
        )
        return f"an {family.kind(model)}: {instead}"

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return {PRIVATE_PREFIX + name: tensor for name, tensor in model.state_dict().items()}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        return [Loaded.of(LiteVAE.from_pretrained(path))]


class TinyFilesLayout(DiffusersLayout):
    """TAESD's two files, taesd_encoder and taesd_decoder, for ComfyUI's models/vae_approx and other programs."""

    def misfit(self, model: LiteVAE) -> str | None:
        tiny = isinstance(family_of(model), Tiny)
        return (
            super().misfit(model)
            if tiny
            else "only TinyEncoder and TinyDecoder are TAESD's networks"
        )

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return {_taesd_name(name): tensor for name, tensor in super().tensors(model).items()}

    def config(self, model: LiteVAE) -> Config | None:  # noqa: ARG002
        return None

    def write(self, model: LiteVAE, path: Path) -> None:
        path.mkdir()
        for half in HALVES:
            named = {
                n.removeprefix(f"{half}."): t
                for n, t in self.tensors(model).items()
                if n.startswith(half)
            }
            write_tensors(path / f"taesd_{half}.safetensors", named)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        files = {half: load_file(path / f"taesd_{half}.safetensors") for half in HALVES}
        return {
            f"{half}.{name}": tensor
            for half, state in files.items()
            for name, tensor in state.items()
        }

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        family, written = _family(model), self.read(path)
        vae: Any = diffusers.AutoencoderTiny(**family.config(model))
        vae.load_state_dict({name: written[_taesd_name(name)].float() for name in vae.state_dict()})
        return [_in_diffusers(vae.eval(), model)]

    def usage(self, model: LiteVAE) -> str:  # noqa: ARG002
        return ""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        factors = tuple(round(model.for_diffusion[name] or 0, 6) for name in FACTORS[1:])
        files = "taesd_encoder.safetensors and taesd_decoder.safetensors"
        for name, known in VAE_APPROX.items():
            if known == factors:
                renamed = "" if name == "taesd" else f", as {files.replace('taesd', name)}"
                yield f"Copy {files} to ComfyUI/models/vae_approx{renamed}."
                break
        else:
            yield "ComfyUI takes the scale of latents from a file's name, and knows none for these: for other programs."
        yield from super().notes(model)


def _taesd_name(name: str) -> str:
    """Name a weight as TAESD's files do: layers by number, where the decoder's bound is the first one."""
    half, _, number, *rest = name.split(".")
    return ".".join((half, str(int(number) + (half == "decoder")), *rest))


LAYOUTS: dict[str, type[Layout]] = {
    "litevae": LiteVAELayout,
    "diffusers": DiffusersLayout,
    "ldm": OriginalLayout,
    "comfyui": ComfyUILayout,
    "taesd": TinyFilesLayout,
}


def find_layout(name: str) -> Layout:
    """Find a format by its name, or by the path of a class of your own; raise ConfigError if there is none."""
    if name in LAYOUTS:
        return LAYOUTS[name]()
    if "." not in name:
        raise ConfigError(
            f"`format` {name}: choose from {', '.join(LAYOUTS)}, or name a class, package.module.Class"
        )
    return resolve_class(name, Layout)()  # type: ignore[type-abstract]


def _in_diffusers(vae: Any, model: LiteVAE) -> Loaded:
    """A class of diffusers as it was loaded; latents in a diffusion model's units are converted."""
    back, units = DiffusersAutoencoder(vae), _family(model).units(model)
    if units is not None:
        back.use_latents(*units)

    def moments(x: Tensor) -> Tensor:
        if back.deterministic:
            return deterministic_moments(back.encode(x).mean)
        return encode_image(vae, x, back.frames)[0]

    return Loaded(IN_DIFFUSERS, moments, back.decode, None if units else back.for_diffusion)


def _family(model: LiteVAE) -> Family:
    family = family_of(model)
    assert family is not None
    return family


def _reflecting(model: LiteVAE) -> list[str]:
    """List the halves, encoder and decoder, that pad by reflection."""
    return [
        half for half in HALVES if getattr(model, half).node["params"].get("padding") == "reflect"
    ]
