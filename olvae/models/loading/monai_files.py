"""Read files of MONAI's two-dimensional AutoencoderKL, alone or in a bundle; name weights so.

Shapes say all but the norms' groups and epsilon, and the values of images, which are in a config.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.config import Config, ConfigError
from olvae.files import WEIGHT_SUFFIXES, first_line
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import CONFIG_NAME, AutoencoderSpec, read_config
from olvae.models.weight_files import CONFIG_PATTERNS, config_inside, is_export
from olvae.modules.base import HALVES
from olvae.modules.others.monai import MonaiDecoder, MonaiEncoder
from olvae.runs import run_of

CLASS = "monai.networks.nets.AutoencoderKL"
MARKER = "quant_conv_mu.conv.weight"

OLD_NAMES = {
    r"\.(to_[qkv])\.": r".attn.\1.",
    r"\.proj_attn\.": ".attn.out_proj.",
    r"(decoder\.blocks\.\d+)\.conv\.conv\.": r"\1.postconv.conv.",
}
"""Names in MONAI Generative Models, from before MONAI 1.4, and today's."""

# The mean's convolution and the log-variance's, which are one here.
MOMENTS = ("quant_conv_mu.conv.", "quant_conv_log_sigma.conv.")
QUANTIZER = "encoder.quant_conv.conv."
POST_QUANTIZER = "post_quant_conv.conv."

SETTINGS = {"norm_groups": ("norm_num_groups", 32), "norm_eps": ("norm_eps", 1e-6)}
"""Arguments that shapes do not tell: MONAI's name and default."""

# Least and largest value of images, as MONAI's transforms call and set them.
ENDS = ("b_min", "b_max")
VALUES = [0.0, 1.0]

BLOCKS = {
    "norm1.weight": "r",
    "attn.to_q.weight": "a",
    "attn.qkv.weight": "a",
    "conv.conv.weight": "|",
    "postconv.conv.weight": "|",
    "deconv.weight": "|",
}
"""Letters of blocks by a name in them: residual, attention, between levels."""


class MonaiLoader(Loader):
    """A file of MONAI's AutoencoderKL, a folder with one, or a bundle's folder."""

    def accepts(self, text: str) -> bool:
        return bool(_find(text))

    def find(self, text: str, options: LoadOptions) -> Target:
        file, *others = _find(text)
        if others:
            names = ", ".join(found.name for found in (file, *others))
            raise FileNotFoundError(f"{text}: several autoencoders ({names}): name one of them")
        spec = _spec(_read(file, options.raw, check=False), _settings(file, text, options), text)

        def load() -> LiteVAE:
            tensors = to_ours(_read(file, options.raw))
            # Fresh weights, which are replaced, must not draw from the caller's generator.
            with torch.random.fork_rng(devices=[]):
                model = LiteVAE.from_spec(spec)
            load_weights(model, tensors, text, options.allow_mismatch)
            return model.eval()

        return Target(load, partial(LiteVAE.from_spec, spec), raw=options.raw, name=text)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename MONAI's weights to ours, and join the two convolutions to the moments."""
    ours = {}
    for name, tensor in state.items():
        if name.startswith(POST_QUANTIZER):
            ours[f"decoder.{name}"] = tensor
        elif not name.startswith(MOMENTS):
            ours[name] = tensor
    for kind in ("weight", "bias"):
        parts = [state[first + kind] for first in MOMENTS if first + kind in state]
        if len(parts) == len(MOMENTS):
            ours[QUANTIZER + kind] = torch.cat(parts)
    return ours


def to_monai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`to_ours`."""
    theirs = {}
    for name, tensor in state.items():
        if name.startswith(QUANTIZER):
            for first, part in zip(MOMENTS, tensor.chunk(2), strict=True):
                theirs[first + name.removeprefix(QUANTIZER)] = part
        else:
            theirs[name.replace(f"decoder.{POST_QUANTIZER}", POST_QUANTIZER)] = tensor
    return theirs


def monai_config(model: LiteVAE) -> Config:
    """Write the network's arguments as a bundle has them; ValueError if it is not MONAI's."""
    if not isinstance(model.encoder, MonaiEncoder) or not isinstance(model.decoder, MonaiDecoder):
        raise ValueError("only MonaiEncoder and MonaiDecoder are MONAI's networks")
    encoder = model.encoder.node["params"]
    decoder = model.decoder.node["params"]
    for key in sorted(encoder.keys() & decoder.keys() - {"attention"}):
        if encoder[key] != decoder[key]:
            raise ValueError(
                f"the encoder has {key} {encoder[key]}, the decoder {decoder[key]}: MONAI's "
                "AutoencoderKL has the same in both"
            )
    if model.quantizer is not None:
        raise ValueError("MONAI's AutoencoderKL has no other quantizer: leave use_quant out")
    levels = range(len(encoder["channel_mult"]))
    network = {
        "_target_": CLASS,
        "spatial_dims": 2,
        "in_channels": model.in_channels,
        "out_channels": model.decoder.out_channels,
        "num_res_blocks": [*encoder["num_res_blocks"]],
        "channels": [encoder["channels"] * multiple for multiple in encoder["channel_mult"]],
        "attention_levels": [level in encoder["attention_levels"] for level in levels],
        "latent_channels": model.latent_channels,
        "norm_num_groups": encoder["norm_groups"],
        "norm_eps": encoder["norm_eps"],
        "with_encoder_nonlocal_attn": encoder["attention"],
        "with_decoder_nonlocal_attn": decoder["attention"],
        "use_convtranspose": decoder["convtranspose"],
        "include_fc": encoder["include_fc"],
        "use_combined_linear": encoder["combined_linear"],
    }
    low, high = encoder["values"]
    return {"autoencoder_def": network, "images": dict(zip(ENDS, (low, high), strict=True))}


def _find(text: str) -> list[Path]:
    """The file that is named, or files in a folder or bundle: all whose names are MONAI's."""
    path = Path(text)
    files = [path] if path.is_file() else []
    if path.is_dir():
        folder = path / "models" if (path / "models").is_dir() else path
        files = sorted(folder.glob("[!.]*"))
    found = []
    for file in files:
        if file.suffix not in WEIGHT_SUFFIXES or run_of(file) is not None or is_export(file):
            continue
        if MARKER in _read(file, check=False):
            found.append(file)
    return found


def _read(file: Path, raw: bool = False, check: bool = True) -> dict[str, Tensor]:
    """Read the autoencoder's tensors, with today's names; empty if there is none.

    A trainer's checkpoint has them beside others, under a name of its own.
    """
    content = read_checkpoint(file, check)
    for part in (content, *content.values()):
        if not isinstance(part, Mapping):
            continue
        state = state_dict_of(part, file, raw)
        marker = next((name for name in state if name.endswith(MARKER)), None)
        if marker is None:
            continue
        prefix = marker.removesuffix(MARKER)
        found = {}
        for name, tensor in state.items():
            if not name.startswith(prefix):
                continue
            new = name.removeprefix(prefix)
            for old, today in OLD_NAMES.items():
                new = new if ".attn." in new else re.sub(old, today, new)
            found[new] = tensor
        return found
    return {}


def _settings(file: Path, text: str, options: LoadOptions) -> dict[str, Any]:
    """Find what shapes do not tell, in the config that is given, inside, beside or of a bundle."""
    contents = []
    if options.config is not None:
        contents.append(read_config(options.config, received=True))
    contents.append(config_inside(file, (None,)) or {})  # of no class
    file = file.absolute()  # a file in the working directory has a folder beside, too
    beside = [file.with_name(CONFIG_NAME)]
    for pattern in CONFIG_PATTERNS:
        beside += sorted(file.parent.with_name("configs").glob(pattern))
    for place in beside:
        try:
            contents.append(read_config(place, received=True))
        except ConfigError:  # a config of something else, or no file
            continue

    # The first network of this class, and the first values.
    found: dict[str, Any] = {}
    for content in contents:
        for node in _nodes(content):
            for key, value in _stated(node, content):
                found.setdefault(key, value)
    defaults = {name: default for name, (_, default) in SETTINGS.items()} | {"values": VALUES}
    assumed = [f"{name} {value}" for name, value in defaults.items() if name not in found]
    if assumed:
        warnings.warn(
            f"{text}: no config says {', '.join(assumed)}: taken as MONAI's defaults; name the "
            "bundle's config with `config`",
            stacklevel=3,
        )
    return defaults | found


def _nodes(content: Config) -> Iterator[Mapping[str, Any]]:
    """Yield a config's mappings, from the outside to the inside."""
    waiting: list[Any] = [content]
    while waiting:
        found = waiting.pop(0)
        if isinstance(found, Mapping):
            yield found
            found = list(found.values())
        waiting += [inner for inner in found if isinstance(inner, Mapping | list)]


def _stated(node: Mapping[str, Any], content: Config) -> Iterator[tuple[str, Any]]:
    """Yield the settings in a mapping of a config, if it is a network, or has images' values."""

    def number(value: Any) -> float | int | None:
        # A reference, such as @groups; expressions, which begin with $, are not evaluated.
        if isinstance(value, str) and value.startswith("@"):
            value = content.get(value.removeprefix("@"))
        return value if isinstance(value, int | float) else None

    if str(node.get("_target_")).rpartition(".")[2] == "AutoencoderKL":
        for key, (name, default) in SETTINGS.items():
            value = number(node.get(name, default))
            if value is not None:
                yield key, value
    low, high = (number(node.get(end)) for end in ENDS)
    if low is not None and high is not None and low < high:
        yield "values", [float(low), float(high)]


def _spec(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], origin: str
) -> AutoencoderSpec:
    """Read the arguments of both networks from shapes; ValueError for another architecture."""
    dimensions = tensors[MARKER].ndim - 2
    if dimensions != 2:
        raise ValueError(
            f"{origin}: MONAI's AutoencoderKL of {dimensions} dimensions: only 2 are read"
        )
    if any(".mlp_gamma." in name for name in tensors):
        raise ValueError(
            f"{origin}: MONAI's SPADE autoencoder, whose decoder takes a segmentation as well: "
            "only its AutoencoderKL is read"
        )
    n_z = tensors[MARKER].shape[0]
    nodes: list[Config] = []
    try:
        for half, network in zip(HALVES, (MonaiEncoder, MonaiDecoder), strict=True):
            params = {**_half_params(tensors, half), **settings}
            nodes.append(
                {"target": f"{network.__module__}.{network.__qualname__}", "params": params}
            )
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"{origin}: not the layers of MONAI's AutoencoderKL ({first_line(error)})"
        ) from error
    groups = settings["norm_groups"]
    if nodes[0]["params"]["channels"] % groups:
        raise ValueError(
            f"{origin}: its widths are no multiples of norm_num_groups, {groups}: name the "
            "bundle's config with `config`"
        )
    return AutoencoderSpec(nodes[0], nodes[1], n_z)


def _half_params(tensors: Mapping[str, Tensor], half: str) -> dict[str, Any]:
    """Read a half's arguments, with its levels from the image's to the latent's."""
    # The kinds of the blocks by number; the first, a convolution, and the last two have none.
    prefix = f"{half}.blocks."
    kinds: dict[int, str] = {}
    for name in tensors:
        digits, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and rest.endswith("weight"):
            kinds[int(digits)] = kinds.get(int(digits), "") or BLOCKS.get(rest, "")

    # Levels, beginning with the image's.
    levels: list[list[int]] = [[]]
    for number in sorted(kinds):
        if kinds[number] == "|":
            levels.append([])
        elif kinds[number]:
            levels[-1].append(number)
    if half == "decoder":
        levels.reverse()

    # The middle beside the latent's level: there attention alone does not follow each block.
    letters = [kinds[number] for number in levels[-1]]
    middle = 0 < letters.count("a") < letters.count("r")
    if middle:
        levels[-1] = levels[-1][:-3] if half == "encoder" else levels[-1][3:]

    # Arguments of both halves, then those that are one half's.
    widths = []
    counts = []
    for level in levels:
        residual = [number for number in level if kinds[number] == "r"]
        counts.append(len(residual))
        widths.append(tensors[f"{prefix}{residual[0]}.conv1.conv.weight"].shape[0])
    common = math.gcd(*widths)
    attends = "a" in kinds.values()
    inside = "".join(name for name in tensors if name.startswith(prefix))
    ends = [tensors[f"{prefix}{number}.conv.weight"] for number in (min(kinds), max(kinds))]
    params: dict[str, Any] = {
        "channels": common,
        "channel_mult": [width // common for width in widths],
        "num_res_blocks": counts,
        "attention": middle,
        "attention_levels": [
            index
            for index, level in enumerate(levels)
            if any(kinds[number] == "a" for number in level)
        ],
        "include_fc": ".out_proj." in inside or not attends,
        "combined_linear": ".qkv." in inside,
    }
    if half == "encoder":
        f = 2 ** (len(widths) - 1)
        params |= {"latent_dim": 2 * ends[1].shape[0], "image_size": max(256, f)}
        params["in_channels"] = ends[0].shape[1]
    else:
        params |= {"z_channels": ends[0].shape[1], "out_channels": ends[1].shape[0]}
        params["convtranspose"] = ".deconv." in inside
    return params
