"""Read files of tiny autoencoders, TAESD's, TAEF2's or TAESANA's: their shapes say all."""

import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.files import WEIGHT_SUFFIXES
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.families import Tiny
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import AutoencoderSpec
from olvae.models.weight_files import is_export
from olvae.modules.base import HALVES
from olvae.runs import run_of

# Begins the names of each half where one file has both, as in ComfyUI.
PREFIXES = {half: f"taesd_{half}." for half in HALVES}
RESIDUAL_BLOCK = re.compile(r"(taesd_(en|de)coder\.)?\d+\.conv\.0\.weight")

# The decoder's layer 0 bounds the latent, and has no weights.
FIRST_LAYER = {"encoder": 0, "decoder": 1}


class TinyFiles(LiteVAE):
    """A tiny autoencoder with latents in a diffusion model's units, as files of TAESD have them."""

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        self.encoder.use_latents(mean, std)
        self.decoder.use_latents(mean, std)


class TinyLoader(Loader):
    """``NAME_encoder`` or ``NAME_decoder`` with the other beside it, their folder, or one file."""

    def accepts(self, text: str) -> bool:
        file = _first_file(text)
        if file is None or run_of(file) is not None or is_export(file):
            return False
        names = state_dict_of(read_checkpoint(file, check=False), file)
        return any(RESIDUAL_BLOCK.fullmatch(name) for name in names)

    def find(self, text: str, options: LoadOptions) -> Target:
        for name, given in (("config", options.config), ("raw", options.raw)):
            if given:
                warnings.warn(f"{text}: shapes say all of it: `{name}` is ignored", stacklevel=2)
        file = _first_file(text)
        assert file is not None
        spec = _spec(_read(file, check=False), text)

        def load() -> LiteVAE:
            tensors = _read(file)
            # Fresh weights, which are replaced, must not draw from the caller's generator.
            with torch.random.fork_rng(devices=[]):
                model = TinyFiles.from_spec(spec)
            load_weights(model, Tiny().to_ours(tensors), text, options.allow_mismatch)
            return model.eval()

        return Target(load, partial(TinyFiles.from_spec, spec), name=text)


def _first_file(text: str) -> Path | None:
    """The file that is named, or a folder's only encoder or decoder; None if there is none."""
    path = Path(text)
    if not path.is_dir():
        return path if path.is_file() and path.suffix in WEIGHT_SUFFIXES else None
    for half in HALVES:
        files: list[Path] = []
        for suffix in WEIGHT_SUFFIXES:
            files += path.glob(f"[!.]*_{half}{suffix}")
        if files:
            return files[0] if len(files) == 1 else None
    return None


def _read(file: Path, check: bool = True) -> dict[str, Tensor]:
    """Read both halves, with diffusers' names: ``encoder.layers.0.weight``.

    Raises FileNotFoundError: the other half is not beside the file.
    """
    tensors: dict[str, Tensor] = {}
    for half in HALVES:
        place = file
        other = HALVES[1 - HALVES.index(half)]
        if file.stem.endswith(other):
            stem = file.stem.removesuffix(other) + half
            places = [file.with_name(f"{stem}{suffix}") for suffix in WEIGHT_SUFFIXES]
            found = [place for place in places if place.is_file()]
            if not found:
                raise FileNotFoundError(
                    f"{file}: the {other} alone: put {stem}{file.suffix} beside it"
                )
            place = found[0]

        for name, tensor in state_dict_of(read_checkpoint(place, check), place).items():
            if name.startswith(PREFIXES[other]):
                continue
            number, _, rest = name.removeprefix(PREFIXES[half]).partition(".")
            if number.isdigit():
                layer = int(number) - FIRST_LAYER[half]
                tensors[f"{half}.layers.{layer}.{rest}"] = tensor
    return tensors


def _spec(tensors: Mapping[str, Tensor], origin: str) -> AutoencoderSpec:
    """Read the arguments of both networks from shapes; ValueError for another architecture."""
    try:
        encoder, n_z = _half_params(tensors, "encoder")
        decoder, _ = _half_params(tensors, "decoder")
        image_channels = tensors["encoder.layers.0.weight"].shape[1]
        z_channels = tensors["decoder.layers.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(
            f"{origin}: not the layers of TAESD, TAEF2 or TAESANA: no {error.args[0]}"
        ) from error
    if n_z != z_channels:
        raise ValueError(f"{origin}: the encoder makes {n_z} channels, the decoder {z_channels}")
    if len(encoder["stem"]) + len(encoder["blocks"]) != len(decoder["blocks"]):
        raise ValueError(f"{origin}: the halves have unlike numbers of levels: is a layer missing?")
    encoder |= {"latent_dim": 2 * n_z, "in_channels": image_channels}
    decoder |= {"z_channels": n_z, "out_channels": image_channels}
    return Tiny().spec_of(encoder, decoder, n_z)


def _half_params(tensors: Mapping[str, Tensor], half: str) -> tuple[dict[str, Any], int]:
    """Read a half's arguments, and how many channels it gives."""
    prefix = f"{half}.layers."
    inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    # Blocks of each level: a convolution without a bias begins the next one.
    blocks = [0]
    biased: list[int] = []
    widths: list[int] = []
    for number in sorted({int(name.partition(".")[0]) for name in inside}):
        if f"{prefix}{number}.conv.0.weight" in tensors:
            blocks[-1] += 1
            continue
        weight = tensors[f"{prefix}{number}.weight"]
        if weight.ndim != 4:
            raise KeyError(f"kernel in {prefix}{number}.weight")
        width = weight.shape[0]
        if f"{prefix}{number}.bias" in tensors:
            biased.append(width)
        else:
            blocks.append(0)
            widths.append(width)

    # Of every half the first and the last convolution have a bias.
    if len(biased) < 2:
        raise KeyError(f"first and last convolution with a bias in its {half}")

    params: dict[str, Any] = {"blocks": blocks, "pool": any(".pool." in name for name in inside)}
    if half == "encoder":
        *stem, _ = biased
        params |= {"channels": stem[-1], "stem": stem if len(stem) > 1 else []}
    else:
        widths = [biased[0], *widths]
        common = math.gcd(*widths)
        multiples = [width // common for width in reversed(widths)]
        params |= {"channels": common, "channel_mult": multiples if max(multiples) > 1 else None}
    return params, biased[-1]
