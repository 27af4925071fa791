"""Formats of an export: names of tensors, config, and an independent loader to read it back."""

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
from olvae.config import Config, check_name_or_path, resolve_class
from olvae.export.as_diffusers import AutoencoderLiteVAE
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.families import Family, StableDiffusion, Tiny, family_of
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.monai_files import MonaiLoader, monai_config, to_monai
from olvae.models.loading.original_files import (
    QWEN,
    WAN,
    OriginalLoader,
    original_names,
    without_frames,
)
from olvae.models.loading.tiny_files import TinyLoader
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import CONFIG_KEY, write_export
from olvae.modules.base import HALVES
from olvae.modules.distributions import deterministic_moments
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.others.wrapped import encode_image
from olvae.modules.sdvae import set_padding

# ComfyUI's names of tiny autoencoders, by which it knows their channels, scaling and shift factor:
# of Stable Diffusion 1 and 2, SDXL, SD3, FLUX.1 and, in a network of its own, FLUX.2. Where two
# have as many channels, the factors tell them apart.
VAE_APPROX = {
    "taesd": (4, 0.18215, 0),
    "taesdxl": (4, 0.13025, 0),
    "taesd3": (16, 1.5305, 0.0609),
    "taef1": (16, 0.3611, 0.1159),
    "taef2": (32, 1, 0),
}

# Settings of an export that say which factors a diffusion model needs.
FACTORS = ("latents", "scaling_factor", "shift_factor")
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

    # For reports: "loaded back", "in diffusers".
    loader: str
    # Images (B, C, H, W) in [-1, 1] to means, then log-variances.
    moments: Callable[[Tensor], Tensor]
    # Latents (B, n_z, h, w) to images.
    decode: Callable[[Tensor], Tensor]
    # Scaling factor and the like; None if the format has no place for them.
    for_diffusion: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: LiteVAE, loader: str = "loaded back") -> "Loaded":
        return cls(loader, model.moments, model.decode, model.for_diffusion)


class Layout(ABC):
    """A format of export: which models it can hold, how they are written, and how they are loaded.

    A class of your own needs :meth:`load`, and what differs from the default: the weights as
    safetensors under their own names, in a folder with ``config.json`` or in one file.
    """

    # Of the one file that is written; empty if it is a folder, which gets a model card.
    suffix: ClassVar[str] = ""
    # Settings of an export that mean nothing here, and why.
    refused: ClassVar[Mapping[str, str]] = {}

    def misfit(self, model: LiteVAE) -> str | None:  # noqa: ARG002
        """Say why the format can't hold a model; None if it can."""
        return None

    def in_units(self, model: LiteVAE) -> bool:  # noqa: ARG002
        """Whether latents here are in a diffusion model's units, with no factor left to apply."""
        return False

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        """Name the weights as the format does, and shape them so."""
        return model.state_dict()

    def config(self, model: LiteVAE) -> Config | None:
        """Make the content of config.json or of the file's header; None if there is no config."""
        return model.export_config()

    def write(self, model: LiteVAE, path: Path) -> None:
        """Write a folder or a file that does not exist yet."""
        tensors = self.tensors(model)
        config = self.config(model)
        if not self.suffix:
            path.mkdir()
            write_export(tensors, config or {}, path)
        elif config is None:
            write_tensors(path, tensors, None)
        else:
            write_tensors(path, tensors, {CONFIG_KEY: json.dumps(config)})

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """Read the tensors that :meth:`write` wrote, under the format's names."""
        return load_file(path if self.suffix else path / WEIGHTS_NAME)

    @abstractmethod
    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        """Load an export as its users do; ``model`` is for what the format does not say."""

    def usage(self, model: LiteVAE) -> str:  # noqa: ARG002
        """Write Python for the card that loads the export, named FOLDER_OR_ID, and uses it."""
        return ""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        """Yield what a user has to know about this model in this format."""
        if model.enlarge > 1:
            yield f"{larger(model)}: whoever wants the encoded size shrinks them"
        if not model.pixel_range.eight_bits:
            yield (
                f"values of images, {model.pixel_range}: what loads this format takes and gives "
                "[-1, 1] for them"
            )


class LiteVAELayout(Layout):
    """A folder that this package loads, and diffusers as AutoencoderLiteVAE; for our networks."""

    def usage(self, model: LiteVAE) -> str:
        return f"""from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("FOLDER_OR_ID")  # a plain torch module
z = vae.encode(images).sample()  # images in [-1, 1], (B, {model.in_channels}, H, W)
images = vae.decode(z)

vae = AutoencoderLiteVAE.from_pretrained("FOLDER_OR_ID")  # in diffusers, in place of AutoencoderKL
# diffusers.AutoModel.from_pretrained("FOLDER_OR_ID", trust_remote_code=True) loads it without \
these imports"""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        if model.enlarge > 1:
            yield f"{larger(model)}, also in pipelines of diffusers"
        # Not the range of values, which is in this config.json.
        if model.latents_mean is not None:
            yield (
                "latents_mean, latents_std: pipelines of FLUX.2, Qwen-Image and Wan take them from "
                "their own class of autoencoder alone: decode their latents with "
                "LiteVAE.from_diffusion and decode"
            )

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        theirs = AutoencoderLiteVAE.from_pretrained(
            path, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        return [
            Loaded.of(LiteVAE.from_pretrained(path)),
            Loaded.of(theirs.autoencoder, IN_DIFFUSERS),
        ]


class DiffusersLayout(Layout):
    """The folder of a class of diffusers, for networks that it has: AutoencoderKL, and others."""

    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION}

    def misfit(self, model: LiteVAE) -> str | None:
        if family_of(model) is None:
            instead = "`format` comfyui for ComfyUI"
            if TinyFilesLayout().misfit(model) is None:
                instead = "`format` taesd for files with its own names"
            return (
                "no class of diffusers has these networks: `format` litevae is for diffusers' "
                f"AutoencoderLiteVAE, {instead}"
            )
        mistake = self.mistake(model)
        if mistake is None:
            return None
        others = {"diffusers": DiffusersLayout(), "ldm": OriginalLayout()}
        fitting = [name for name, layout in others.items() if layout.mistake(model) is None]
        return f"{mistake}: `format` {' or '.join([*fitting, 'litevae'])} can hold it"

    def mistake(self, model: LiteVAE) -> str | None:
        """Say why networks of a class of diffusers can't be written; None if they can."""
        try:
            self.tensors(model)
            self.config(model)
            return None
        except ValueError as error:
            return str(error)

    def in_units(self, model: LiteVAE) -> bool:
        return _family(model).units(model) is not None

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        check_not_larger(model)
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
        kind = _family(model).kind(model)
        shape = f"B, {model.in_channels}, H, W"
        if model.encoder.node["params"].get("frames", False):
            shape = f"B, {model.in_channels}, 1, H, W"

        # Classes of diffusers differ in what encoding returns: latent, latents or latent_dist.
        latent = ".latent" if model.deterministic else ".latent_dist.sample()"
        if self.in_units(model):
            latent += "s"
        return f"""from diffusers import {kind}

vae = {kind}.from_pretrained("FOLDER_OR_ID")
z = vae.encode(images){latent}  # images in [-1, 1], ({shape})
images = vae.decode(z).sample"""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        halves = " and the ".join(_reflecting(model))
        if halves:
            yield (
                f"padding: reflect in the {halves}, which this format can't say: loaders have to "
                'set padding_mode="reflect" on every convolution that pads, otherwise borders '
                "differ"
            )
        if self.in_units(model):
            yield "latents: in a diffusion model's units, as TAESD's: no factor is left to apply"


class OriginalLayout(DiffusersLayout):
    """One file with its own project's names: latent-diffusion's, FLUX.2's or Wan's; for ComfyUI.

    A1111 reads latent-diffusion's as well.
    """

    suffix = ".safetensors"
    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION, **NO_FACTORS}
    # What decodes Wan's and Qwen-Image's decoders at 2x, or at 3x: the node finds the factor.
    shuffled_by = (
        "ComfyUI has no pixel shuffle after them: load and decode with the nodes "
        '"Load VAE (VAE Utils)" and "VAE Decode (VAE Utils)" of spacepxl/ComfyUI-VAE-Utils'
    )

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        family = _family(model)
        config = family.original_config(model)
        kind = family.kind(model)
        groups = config.get("norm_num_groups", 32)
        if groups != 32:
            raise ValueError(f"GroupNorm with {groups} groups: latent-diffusion always has 32")
        if not config.get("mid_block_add_attention", True):
            raise ValueError("no attention in the middle: latent-diffusion always has it")
        return original_names(kind, family.to_diffusers(model))

    def config(self, model: LiteVAE) -> Config | None:
        # In the header, for our own loader; it knows Stable Diffusion's networks without.
        if isinstance(family_of(model), StableDiffusion):
            return None
        return super().config(model)

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        back = OriginalLoader().find(str(path), LoadOptions()).load().as_litevae(str(path))
        for half in _reflecting(model):
            set_padding(getattr(back, half), "reflect")
        return [Loaded.of(back)._replace(for_diffusion=None)]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        config = _family(model).original_config(model)
        odd = []
        for key, known in STOCK.items():
            if config.get(key, known[0]) not in known:
                odd.append(f"{key} {config[key]}")
        if odd:
            yield f"ComfyUI and A1111 build Stable Diffusion's widths only, not {', '.join(odd)}"
        types = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
        if any(block.startswith("Attn") for block in types):
            yield "ComfyUI and A1111 build attention in the middle only, not at levels as here"
        if model.enlarge > 1:
            outputs = model.enlarge**2 * model.decoder.out_channels
            reader = self.shuffled_by
            if _family(model).kind(model) not in (WAN, QWEN):
                reader = (
                    "ComfyUI reads these from Wan's and Qwen-Image's files alone: `format` comfyui "
                    "is for its node here"
                )
            yield f"the last convolution has {outputs} outputs; {reader}"


class ImageLayout(OriginalLayout):
    """One file of Qwen-Image's or Wan's autoencoder for images alone, as Qwen2D: flat kernels."""

    shuffled_by = "only this package shuffles them: use `format` ldm for ComfyUI"

    def misfit(self, model: LiteVAE) -> str | None:
        family = family_of(model)
        if family is None or family.kind(model) not in (WAN, QWEN):
            return "only Qwen-Image's and Wan's autoencoders have kernels in time to leave out"
        return None

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return without_frames(_family(model).to_diffusers(model))

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield from super().notes(model)
        yield "kernels: for images alone; keep the old file for videos"


class ComfyUILayout(Layout):
    """One file of a LiteVAE with its config in the header, for the node in integrations/comfyui.

    ComfyUI tells autoencoders apart by single names, such as ``decoder.conv_in.weight``, and loads
    without strictness: it would take a LiteVAE for Stable Diffusion's and decode noise. So every
    name has a prefix that it does not know.
    """

    suffix = ".safetensors"
    refused = NO_FACTORS

    def misfit(self, model: LiteVAE) -> str | None:
        family = family_of(model)
        # Of a decoder at 2x, ComfyUI's own loader takes no file but Wan's, and does not shuffle.
        if family is None or model.enlarge > 1:
            if model.in_channels == 3 and model.pixel_range.eight_bits:
                return None
            return (
                "images that are not RGB of 8 bits, which ComfyUI's are: `format` litevae can hold "
                "it"
            )
        instead = "`format` ldm is what ComfyUI loads"
        if OriginalLayout().misfit(model):
            instead = "`format` diffusers"
        return f"an {family.kind(model)}: {instead}"

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return {PRIVATE_PREFIX + name: tensor for name, tensor in model.state_dict().items()}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        return [Loaded.of(LiteVAE.from_pretrained(path))]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield (
            "this file needs the node in integrations/comfyui: with ComfyUI's own Load VAE a "
            'workflow ends with "VAE is invalid: None"'
        )
        yield from super().notes(model)


class TinyFilesLayout(DiffusersLayout):
    """Two files of TAESD's, TAEF2's or TAESANA's networks, for ComfyUI's vae_approx and others."""

    def misfit(self, model: LiteVAE) -> str | None:
        if not isinstance(model.encoder, TinyEncoder) or not isinstance(model.decoder, TinyDecoder):
            return "only TinyEncoder and TinyDecoder are TAESD's networks"
        try:
            self.tensors(model)
            return None
        except ValueError as error:
            return f"{error}: `format` litevae can hold it"

    def in_units(self, model: LiteVAE) -> bool:  # noqa: ARG002
        return True

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        check_not_larger(model)
        tensors = Tiny().to_diffusers(model)
        return {_taesd_name(name): tensor for name, tensor in tensors.items()}

    def config(self, model: LiteVAE) -> Config | None:  # noqa: ARG002
        return None

    def write(self, model: LiteVAE, path: Path) -> None:
        path.mkdir()
        for half in HALVES:
            named = {}
            for name, tensor in self.tensors(model).items():
                if name.startswith(half):
                    named[name.removeprefix(f"{half}.")] = tensor
            write_tensors(path / f"{_tiny_kind(model)}_{half}.safetensors", named)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        tensors = {}
        for half in HALVES:
            (file,) = path.glob(f"*_{half}.safetensors")
            for name, tensor in load_file(file).items():
                tensors[f"{half}.{name}"] = tensor
        return tensors

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        # diffusers has TAESD's networks alone.
        if family_of(model) is None:
            back = TinyLoader().find(str(path), LoadOptions()).load()
            mean, std = Tiny().units(model)
            back.use_latents(mean.flatten(), std.flatten())
            assert isinstance(back, LiteVAE)
            return [Loaded.of(back)._replace(for_diffusion=None)]
        written = self.read(path)
        vae: Any = diffusers.AutoencoderTiny(**_family(model).config(model))
        vae.load_state_dict({name: written[_taesd_name(name)].float() for name in vae.state_dict()})
        return [_in_diffusers(vae.eval(), model)]

    def usage(self, model: LiteVAE) -> str:  # noqa: ARG002
        return ""

    def notes(self, model: LiteVAE) -> Iterator[str]:
        # ComfyUI takes network, channels and factors from a file's name: find the name with these.
        factors = (round(model.for_diffusion[name] or 0, 6) for name in FACTORS[1:])
        latents = (model.latent_channels, *factors)
        kind = _tiny_kind(model)
        files = f"{kind}_encoder.safetensors and {kind}_decoder.safetensors"
        for name, known in VAE_APPROX.items():
            fits = kind == "taesd"
            if name == "taef2":
                fits = kind == "taef2" and model.encoder.node["params"]["pool"]
            if known == latents and fits:
                renamed = ""
                if name != kind:
                    renamed = f", as {files.replace(kind, name)}"
                yield f"Copy {files} to ComfyUI/models/vae_approx{renamed}."
                break
        else:
            yield (
                "ComfyUI takes a latent's channels and scale from a file's name, and knows none "
                "for these: for other programs."
            )
        yield from super().notes(model)


class MonaiLayout(Layout):
    """One file with the names of MONAI's AutoencoderKL; its arguments are in the header."""

    suffix = ".safetensors"
    refused: ClassVar[Mapping[str, str]] = {"fold": NO_MODULATION, **NO_FACTORS}

    def misfit(self, model: LiteVAE) -> str | None:
        try:
            monai_config(model)
            return None
        except ValueError as error:
            return f"{error}: `format` litevae can hold it"

    def tensors(self, model: LiteVAE) -> Mapping[str, Tensor]:
        return to_monai(model.state_dict())

    def config(self, model: LiteVAE) -> Config:
        return monai_config(model)

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:  # noqa: ARG002
        back = MonaiLoader().find(str(path), LoadOptions()).load()
        return [Loaded.of(back.as_litevae(str(path)))._replace(for_diffusion=None)]

    def notes(self, model: LiteVAE) -> Iterator[str]:
        yield (
            "MONAI loads it by AutoencoderKL(...).load_state_dict(safetensors.torch.load_file("
            "FILE)); the arguments are under config in the file's header"
        )
        low, high = model.encoder.node["params"]["values"]
        # What other formats say of [-1, 1] does not hold here.
        yield f"images are {low:g} to {high:g} there, which are -1 to 1 here"
        if not model.pixel_range.eight_bits:
            yield f"these stand for values, {model.pixel_range}"


def larger(model: LiteVAE) -> str:
    """Say by how much a decoder at 2x enlarges images."""
    return f"decoded images are {model.enlarge} times as large as encoded ones, along each side"


def check_not_larger(model: LiteVAE) -> None:
    """Raise ValueError for a decoder at 2x, which formats without a pixel shuffle can't say."""
    if model.enlarge > 1:
        raise ValueError(f"{larger(model)}, by a pixel shuffle, which this format lacks")


def _tiny_kind(model: LiteVAE) -> str:
    """Name the tiny network that a model has, as its files are called."""
    if model.decoder.node["params"]["pool"]:
        return "taef2"
    return "taesana" if model.encoder.node["params"]["stem"] else "taesd"


def _taesd_name(name: str) -> str:
    """Name a weight as TAESD's files do: by number; the decoder's bound is layer 0 there."""
    half, _, number, *rest = name.split(".")
    return ".".join((half, str(int(number) + (half == "decoder")), *rest))


LAYOUTS: dict[str, type[Layout]] = {
    "litevae": LiteVAELayout,
    "diffusers": DiffusersLayout,
    "ldm": OriginalLayout,
    "comfyui": ComfyUILayout,
    "taesd": TinyFilesLayout,
    "qwen2d": ImageLayout,
    "monai": MonaiLayout,
}


def find_layout(name: str) -> Layout:
    """Find a format by its name, or by the path of a class of your own; ConfigError if none."""
    check_name_or_path("`format`", name, LAYOUTS)
    if name in LAYOUTS:
        return LAYOUTS[name]()
    return resolve_class(name, Layout)()  # type: ignore[type-abstract]


def _in_diffusers(vae: Any, model: LiteVAE) -> Loaded:
    """Wrap a class of diffusers as loaded; latents in a diffusion model's units are converted."""
    back = DiffusersAutoencoder(vae)
    units = _family(model).units(model)
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
