"""Read files of other projects: latent-diffusion, FLUX.2, Wan, DC-AE; name weights as they do.

diffusers converts names that are read. Names that are written are converted here, and diffusers
reads them back.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.config import Config, ConfigError
from olvae.files import first_line
from olvae.models.loading.families import NAMES
from olvae.models.loading.from_diffusers import DiffusersAutoencoder, check_parameters
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import CONFIG_NAME, oversized, read_config
from olvae.models.weight_files import config_inside, is_export, locate_weights
from olvae.modules.base import widen
from olvae.modules.sdvae import block_types
from olvae.runs import run_of

KL = "AutoencoderKL"
FLUX2 = "AutoencoderKLFlux2"
WAN = "AutoencoderKLWan"
QWEN = "AutoencoderKLQwenImage"
DC = "AutoencoderDC"

# latent-diffusion's argument for the channels of latents, where the networks have other ones.
EMBED_DIM = "embed_dim"

# Ours for the outputs of the decoder's last convolution, where these are not the image's channels,
# and the names of that convolution.
OUTPUTS = "conv_out_channels"
LAST_KERNELS = ("decoder.conv_out.weight", "decoder.head.2.weight")

# A name of Qwen2D's file: diffusers' names, and kernels for images alone.
QWEN_2D = "decoder.mid_block.attentions.0.norm.gamma"
KERNEL_DEPTH = 3  # of the kernels that it was made of

MARKERS = {
    "encoder.down.0.block.0.norm1.weight": (KL, FLUX2),
    "decoder.middle.0.residual.0.gamma": (WAN, QWEN),
    QWEN_2D: (QWEN, WAN),
    "decoder.stages.1.op_list.0.main.conv.conv.bias": (DC,),
}
"""A name that identifies a project's files, and diffusers' classes: without a config the first."""

LDM_NAMES = {
    "down_blocks.": "down.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "attentions.": "attn.",
    "resnets.": "block.",
    "samplers.0.": "sample.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
"""Parts of names in diffusers' AutoencoderKL, and in latent-diffusion."""

QUANTIZERS = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
"""Where FLUX.2's own files have them."""

# The first kernel of Wan's and Qwen-Image's decoder, in their names and in diffusers'.
FIRST_KERNELS = ("decoder.conv1.weight", "decoder.conv_in.weight")

WAN_NAMES = {
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"(\d)\.norm(\d)": lambda found: f"{found[1]}.residual.{3 * int(found[2]) - 3}",
    r"(\d)\.conv(\d)": lambda found: f"{found[1]}.residual.{4 * int(found[2]) - 2}",
    r"conv_shortcut": "shortcut",
    r"conv_in": "conv1",
    r"norm_out": "head.0",
    r"conv_out": "head.2",
    r"mid_block\.resnets\.(\d)": lambda found: f"middle.{2 * int(found[1])}",
    r"mid_block\.attentions\.0": "middle.1",
    r"down_blocks": "downsamples",
    r"up_blocks\.(\d)\.resnets\.(\d)": lambda found: (
        f"upsamples.{4 * int(found[1]) + int(found[2])}"
    ),
    r"up_blocks\.(\d)\.upsamplers\.0": lambda found: f"upsamples.{4 * int(found[1]) + 3}",
}
"""Parts of names in diffusers' AutoencoderKLWan, and in Wan's files.

Wan's decoder has four modules to a level."""


def original_names(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the weights of a class of diffusers as its project's files do.

    In latent-diffusion attention's linear layers are 1x1 convolutions, (C, C, 1, 1).

    Raises ValueError: the project's files have no such names.
    """
    levels = re.findall(r"decoder\.up_blocks\.(\d+)", " ".join(state))
    last = max(map(int, levels), default=0)

    # Wan and Qwen-Image: the second name is another one in Wan 2.2.
    if kind in (WAN, QWEN):
        first = "decoder.up_blocks.3.resnets.2.conv1.weight"
        second = "decoder.up_blocks.2.upsamplers.0.resample.1.weight"
        if last != 3 or first not in state or second not in state:
            raise ValueError(
                "diffusers knows the names of Wan 2.1's files alone: four levels of two blocks"
            )
        return {_replaced(name, WAN_NAMES): tensor for name, tensor in state.items()}
    if kind not in (KL, FLUX2):
        raise ValueError(
            f"{kind} has no names here but diffusers', which this format does not write"
        )

    # latent-diffusion, whose decoder's levels count backwards, and FLUX.2.
    quantizers = {f"^{theirs}": ours for theirs, ours in QUANTIZERS.items()}
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for theirs, ours in LDM_NAMES.items():
            name = name.replace(theirs, ours)
        if kind == FLUX2:
            name = _replaced(name, quantizers)
        named[name] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return named


def _replaced(name: str, patterns: Mapping[str, Any]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def level_attention_name(name: str, levels: int) -> str:
    """Name a weight of attention at a level as diffusers does; the decoder's count backwards."""
    half, _, level, _, number, layer, kind = name.split(".")
    block = f"down_blocks.{level}" if half == "encoder" else f"up_blocks.{levels - 1 - int(level)}"
    theirs = {"norm": "group_norm", "proj_out": "to_out.0"}.get(layer, f"to_{layer}")
    return f"{half}.{block}.attentions.{number}.{theirs}.{kind}"


class OriginalLoader(Loader):
    """A file or its folder: latent-diffusion's KL autoencoder, FLUX.2's, Wan 2.1's or DC-AE's."""

    def accepts(self, text: str) -> bool:
        try:
            weights = locate_weights(text)
        except (FileNotFoundError, ValueError):
            return False
        # Runs and exports of ours are known without a look at the weights.
        if run_of(weights) is not None or is_export(weights):
            return False
        kind, _ = _tensors(weights, check=False)
        return kind != ""

    def find(self, text: str, options: LoadOptions) -> Target:
        weights = locate_weights(text)
        raw = options.raw
        kind, tensors = _tensors(weights, raw, check=False)
        kind, config = _config(kind, tensors, weights, options.config)

        def load() -> DiffusersAutoencoder:
            return _loaded(kind, config, _tensors(weights, raw)[1], weights, options.allow_mismatch)

        return Target(load, partial(_loaded, kind, config), raw=raw, name=text)


def _tensors(file: Path, raw: bool = False, check: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Read a file's tensors, with their names as in an autoencoder alone, and its class.

    The class is "", without tensors, if the file is of another project.
    """
    # Checkpoints of whole models have a prefix before the autoencoder's names.
    state = state_dict_of(read_checkpoint(file, check), file, raw)
    matches: list[tuple[str, str]] = []
    for name, kinds in MARKERS.items():
        for prefix in ("first_stage_model.", "vae.", ""):
            if prefix + name in state:
                matches.append((kinds[0], prefix))
    if not matches:
        return "", {}
    kind, prefix = matches[0]
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(
            f"{file}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read"
        )
    found = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if kind == QWEN and not is_flat(found):
        return "", {}

    # FLUX.2's differ by their batch norm, and have the quantizers inside the halves.
    if kind == KL:
        patterns = {f"^{theirs}": ours for ours, theirs in QUANTIZERS.items()}
        found = {_replaced(name, patterns): tensor for name, tensor in found.items()}
        kind = FLUX2 if "bn.running_mean" in found else KL
        found = {n: t for n, t in found.items() if n.startswith((*NAMES, "bn."))}
    return kind, found


def is_flat(tensors: Mapping[str, Tensor]) -> bool:
    """Whether Wan's or Qwen-Image's kernels are for images alone, (out, in, h, w)."""
    return any(name in tensors and tensors[name].ndim == 4 for name in FIRST_KERNELS)


def without_frames(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep of Wan's or Qwen-Image's weights what one frame needs, with diffusers' names.

    Of each kernel, (out, in, t, h, w), the last slice in time; no convolutions in time.
    """
    flat = {}
    for name, tensor in state.items():
        in_time = tensor.ndim == 5 or (name.endswith("gamma") and tensor.ndim == 4)
        if "time_conv" not in name:
            flat[name] = tensor[:, :, -1] if in_time else tensor
    return flat


def with_frames(model: nn.Module, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`without_frames`; zeros stand where one frame sees nothing."""
    whole = dict(flat)
    for name, own in model.state_dict().items():
        tensor = flat.get(name)
        if tensor is None and "time_conv" in name:
            whole[name] = torch.zeros_like(own)
        elif tensor is not None and tensor.ndim == own.ndim - 1:
            whole[name] = tensor.new_zeros(*tensor.shape[:2], *own.shape[2:])
            whole[name][:, :, -1] = tensor
    return whole


def _config(
    kind: str, tensors: Mapping[str, Tensor], weights: Path, given: str | Path | None
) -> tuple[str, dict[str, Any]]:
    """Find the class and its arguments, in diffusers' form.

    They are in a config.json that is given, in the file's header, or in a config.json beside it.
    Without the first two, latent-diffusion's and FLUX.2's are read from the shapes; other classes
    have their defaults.
    """
    by_shapes = kind in (KL, FLUX2)
    kinds = next(kinds for kinds in MARKERS.values() if kind in kinds)
    own: Config = {}
    given_file = Path(given or "")
    if given_file.name.endswith(".json") and given_file.is_file():
        own = read_config(given_file)
    beside: Config = {}
    neighbour = weights.with_name(CONFIG_NAME)
    if neighbour.is_file():
        beside = read_config(neighbour)

    # The first that is of the class, or of the other class with the same names.
    contents = [own, config_inside(weights, kinds) or {}]
    if not by_shapes:
        contents.append(beside)
    content = next((content for content in contents if content.get("_class_name") in kinds), None)

    # Else shapes, and what they don't tell from the config beside it, if it agrees with them.
    if content is None:
        shapes = _latent_diffusion_config(kind, tensors, weights) if by_shapes else {}
        others = any(beside.get(name, value) != value for name, value in shapes.items())
        content = {}
        if not others and beside.get("_class_name") == kind:
            content = dict(beside)
        content |= {**shapes, "_class_name": kind}
    config = {name: value for name, value in content.items() if not name.startswith("_")}
    for name in LAST_KERNELS:
        if name in tensors:
            config[OUTPUTS] = tensors[name].shape[0]
    large = list(oversized(config))
    if large:
        raise ConfigError(*(f"{weights}: {line}" for line in large))
    return str(content["_class_name"]), config


def _loaded(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    origin: str | Path = "",
    allow_mismatch: bool = False,
) -> DiffusersAutoencoder:
    """Build a class with these weights, in evaluation mode; fresh without weights."""
    # Takes seconds, which other targets do not need.
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    try:
        # Compare sizes before any memory is taken.
        if tensors is not None:
            with torch.device("meta"):
                stored = sum(tensor.nbytes for tensor in tensors.values())
                check_parameters(
                    _built(kind, config), KERNEL_DEPTH * stored if is_flat(tensors) else stored
                )
        model = _built(kind, config)

        # diffusers converts the names, but not FLUX.2's batch norm and attention outside of the
        # middle, and drops what it doesn't know.
        if tensors is not None:
            at_levels = {n: t for n, t in tensors.items() if kind == KL and ".attn." in n}
            others = {n: t for n, t in tensors.items() if n not in at_levels}
            converters: Any = SINGLE_FILE_LOADABLE_CLASSES[{FLUX2: KL, QWEN: WAN}.get(kind, kind)]
            converted = others
            if QWEN_2D not in tensors:
                converted = dict(
                    converters["checkpoint_mapping_fn"](checkpoint=others, config=model.config)
                )
            if is_flat(tensors):
                converted = with_frames(model, converted)
            for name, tensor in tensors.items():
                if name.startswith("bn."):
                    converted[name] = tensor
            for name, tensor in at_levels.items():
                levels = len(model.config["block_out_channels"])
                matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor
                converted[level_attention_name(name, levels)] = matrix
            if kind in (KL, FLUX2) and len(converted) != len(tensors):
                raise ValueError(
                    f"{len(tensors) - len(converted)} of its tensors have no place in {kind}"
                )
            load_weights(model, converted, origin, allow_mismatch, prefixes=("",))
    except Exception as error:  # of many kinds, by what is wrong with the config
        text = first_line(error).removeprefix(f"{origin}: ")
        raise ValueError(
            f"{origin}: {text}: is it another {kind}? Then put its config.json beside it"
        ) from error

    # The factors differ among models of KL and DC: a config alone tells them.
    autoencoder = DiffusersAutoencoder(model).eval()
    autoencoder.factors_known = kind not in (KL, DC) or "scaling_factor" in config
    return autoencoder


def _built(kind: str, config: Mapping[str, Any]) -> Any:
    """Build a class with fresh weights, of arguments that may be more than its own."""
    # Takes seconds, which other targets do not need.
    import diffusers

    arguments = dict(config)
    embed_dim = arguments.pop(EMBED_DIM, None)
    outputs = arguments.pop(OUTPUTS, 0)
    model: Any = getattr(diffusers, kind).from_config(arguments)
    if embed_dim is not None:
        z_channels = model.config["latent_channels"]
        model.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        model.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    # A decoder at 2x has four times the outputs, one at 3x nine times.
    if outputs:
        last = model.decoder.conv_out
        by = math.isqrt(outputs // last.out_channels)
        if outputs == by**2 * last.out_channels:
            widen(last, by**2)
    return model


def _latent_diffusion_config(
    kind: str, weights: Mapping[str, Tensor], origin: Path
) -> dict[str, Any]:
    """Read the arguments of AutoencoderKL or AutoencoderKLFlux2 from shapes.

    GroupNorm always has 32 groups there.
    """
    # Channels of images and latents, which must agree.
    try:
        channels = weights["encoder.conv_in.weight"].shape[1]
        moments = weights["encoder.conv_out.weight"].shape[0]
        latent = weights["decoder.conv_in.weight"].shape[1]
        output = weights["decoder.conv_out.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{origin}: an autoencoder of latent-diffusion, but without {error.args[0]}"
        ) from error
    embedded = latent
    stored = moments
    if "post_quant_conv.weight" in weights:
        embedded = weights["post_quant_conv.weight"].shape[1]
    if "quant_conv.weight" in weights:
        stored = weights["quant_conv.weight"].shape[0]
    if moments != 2 * latent or stored != 2 * embedded:
        raise ValueError(
            f"{origin}: its latent has {embedded} channels, the decoder takes {latent}, the "
            f"encoder gives {moments} and quant_conv {stored}, which have to be twice as many"
        )

    # Levels, and their widths on both ways.
    widths: list[int] = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    depth = len(widths)
    attention = []
    for levels in ("encoder.down", "decoder.up"):
        attention.append([i for i in range(depth) if f"{levels}.{i}.attn.0.q.weight" in weights])
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": output,
        **block_types(depth, *attention),
        "block_out_channels": widths,
    }
    if kind == FLUX2:
        others = []
        for i in range(depth):
            name = f"decoder.up.{i}.block.0.conv1.weight"
            if name in weights:
                others.append(weights[name].shape[0])
        config["decoder_block_out_channels"] = None if others == widths else others
    if embedded != latent:
        config[EMBED_DIM] = embedded
    norms = re.compile(r"encoder\.down\.0\.block\.\d+\.norm1\.weight")
    return config | {
        "layers_per_block": sum(bool(norms.fullmatch(name)) for name in weights),
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
        "norm_num_groups": 32,
    }
