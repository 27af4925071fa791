"""Files of other projects: names of weights in latent-diffusion, FLUX.2, Wan and DC-AE, and a loader of them.

diffusers converts the names that are read; those that are written are converted here, and read back by diffusers.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.config import ConfigError
from olvae.files import first_line
from olvae.models.loading.diffusers_models import DiffusersAutoencoder, check_parameters
from olvae.models.loading.families import BLOCKS, NAMES
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import CONFIG_NAME, oversized, read_config
from olvae.models.weight_files import config_inside, is_export, locate_weights
from olvae.runs import run_of

KL, FLUX2, WAN, QWEN, DC = (
    f"Autoencoder{name}" for name in ("KL", "KLFlux2", "KLWan", "KLQwenImage", "DC")
)

MARKERS = {
    "encoder.down.0.block.0.norm1.weight": (KL, FLUX2),
    "decoder.middle.0.residual.0.gamma": (WAN, QWEN),
    "decoder.stages.1.op_list.0.main.conv.conv.bias": (DC,),
}
"""Names of which one tells whose file it is, and diffusers' classes of it; the first if no config says."""

LDM_NAMES = {
    "down_blocks.": "down.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
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
"""Parts of names in diffusers' AutoencoderKL and in latent-diffusion, where levels of the decoder count backwards."""

QUANTIZERS = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
"""Where FLUX.2's own files have them."""

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
"""Parts of names in diffusers' AutoencoderKLWan and in Wan's files, whose decoder has four modules to a level."""


def original_names(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the weights of a class of diffusers as its project's files do; ValueError if they have no such names.

    In latent-diffusion attention's linear layers are 1x1 convolutions, (C, C, 1, 1).
    """
    last = max(
        (int(level) for level in re.findall(r"decoder\.up_blocks\.(\d+)", " ".join(state))),
        default=0,
    )
    if kind in (WAN, QWEN):
        blocks = [
            f"decoder.up_blocks.{name}.weight"
            for name in ("3.resnets.2.conv1", "2.upsamplers.0.resample.1")
        ]
        if last != 3 or not all(
            name in state for name in blocks
        ):  # the second is another one in Wan 2.2
            raise ValueError(
                "diffusers knows the names of Wan 2.1's files alone: four levels of two blocks"
            )
        return {_replaced(name, WAN_NAMES): tensor for name, tensor in state.items()}
    if kind not in (KL, FLUX2):
        raise ValueError(
            f"{kind} has no names here but diffusers', which are for `format` diffusers"
        )
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for theirs, ours in LDM_NAMES.items():
            name = name.replace(theirs, ours)
        name = _replaced(
            name, {f"^{theirs}": ours for theirs, ours in QUANTIZERS.items() if kind == FLUX2}
        )
        named[name] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return named


def _replaced(name: str, patterns: Mapping[str, Any]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


class OriginalLoader(Loader):
    """A file of latent-diffusion's KL autoencoder, of FLUX.2's, Wan 2.1's or DC-AE's, or a folder with one."""

    def accepts(self, text: str) -> bool:
        try:
            weights = locate_weights(text)
        except (FileNotFoundError, ValueError):
            return False
        ours = run_of(weights) is not None or is_export(
            weights
        )  # known without a look at the weights
        return not ours and _tensors(weights, check=False)[0] != ""

    def find(self, text: str, options: LoadOptions) -> Target:
        weights, raw = locate_weights(text), options.raw
        kind, config = _config(*_tensors(weights, raw, check=False), weights, options.config)

        def load() -> DiffusersAutoencoder:
            return _loaded(kind, config, _tensors(weights, raw)[1], weights, options.allow_mismatch)

        return Target(load, partial(_loaded, kind, config), raw=raw, name=text)


def _tensors(file: Path, raw: bool = False, check: bool = True) -> tuple[str, dict[str, Tensor]]:
    """The class of a file's autoencoder, and its tensors without the names' prefix; "" and none of another file."""
    state = state_dict_of(read_checkpoint(file, check), file, raw)
    prefixes = ("first_stage_model.", "vae.", "")
    matches = (
        (kinds[0], prefix)
        for name, kinds in MARKERS.items()
        for prefix in prefixes
        if prefix + name in state
    )
    kind, prefix = next(matches, ("", ""))
    if not kind:
        return kind, {}
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(
            f"{file}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read"
        )
    found = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if kind == KL:
        found = {
            _replaced(n, {f"^{new}": old for old, new in QUANTIZERS.items()}): t
            for n, t in found.items()
        }
        kind = FLUX2 if "bn.running_mean" in found else KL
        found = {n: t for n, t in found.items() if n.startswith((*NAMES, "bn."))}
    return kind, found


def _config(
    kind: str, tensors: Mapping[str, Tensor], weights: Path, given: str | Path | None
) -> tuple[str, dict[str, Any]]:
    """The class and its arguments: of a config.json of diffusers that is given, in the file's header, or beside it.

    Without the first two, latent-diffusion's and FLUX.2's are read from the shapes; others' are the defaults.
    """
    kinds = next(kinds for kinds in MARKERS.values() if kind in kinds)
    places = [Path(given or ""), weights.with_name(CONFIG_NAME)]
    own, beside = (
        read_config(place) if place.name.endswith(".json") and place.is_file() else {}
        for place in places
    )
    contents = (own, config_inside(weights, kinds) or {}, {} if kind in (KL, FLUX2) else beside)
    content = next((content for content in contents if content.get("_class_name") in kinds), None)
    if content is None:
        shapes = _latent_diffusion_config(kind, tensors, weights) if kind in (KL, FLUX2) else {}
        others = any(beside.get(name, value) != value for name, value in shapes.items())
        content = {
            **({} if others or beside.get("_class_name") != kind else beside),
            **shapes,
            "_class_name": kind,
        }
    config = {name: value for name, value in content.items() if not name.startswith("_")}
    if large := list(oversized(config)):
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
    import diffusers  # seconds, which other targets do not need
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    build = partial(getattr(diffusers, kind).from_config, dict(config))
    try:
        if tensors is not None:
            with torch.device("meta"):
                check_parameters(build(), sum(tensor.nbytes for tensor in tensors.values()))
        model = build()
        if tensors is not None:
            converters: Any = SINGLE_FILE_LOADABLE_CLASSES[{FLUX2: KL, QWEN: WAN}.get(kind, kind)]
            converted = dict(
                converters["checkpoint_mapping_fn"](checkpoint=dict(tensors), config=model.config)
            )
            converted |= {
                name: tensor for name, tensor in tensors.items() if name.startswith("bn.")
            }
            if kind in (KL, FLUX2) and len(converted) != len(tensors):
                raise ValueError(
                    f"{len(tensors) - len(converted)} of its tensors have no place in {kind}"
                )
            load_weights(model, converted, origin, allow_mismatch, prefixes=("",))
    except Exception as error:  # of many kinds, by what is wrong with the config
        text = first_line(error).removeprefix(f"{origin}: ")
        raise ValueError(
            f"{origin}: {text}: is it another {kind}? Then name its config.json with `config`"
        ) from error
    autoencoder = DiffusersAutoencoder(model).eval()
    autoencoder.factors_known = kind not in (KL, DC) or "scaling_factor" in config
    return autoencoder


def _latent_diffusion_config(
    kind: str, weights: Mapping[str, Tensor], origin: Path
) -> dict[str, Any]:
    """The arguments of AutoencoderKL or AutoencoderKLFlux2, from shapes. GroupNorm always has 32 groups there."""
    if attention := [
        name for name in weights if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)
    ]:
        raise ValueError(
            f"{origin}: attention outside the middle ({attention[0]}), which AutoencoderKL does not have"
        )
    try:
        channels, moments = (
            weights["encoder.conv_in.weight"].shape[1],
            weights["encoder.conv_out.weight"].shape[0],
        )
        latent, output = (
            weights["decoder.conv_in.weight"].shape[1],
            weights["decoder.conv_out.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(
            f"{origin}: an autoencoder of latent-diffusion, but without {error.args[0]}"
        ) from error
    widths: list[int] = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    embedded = (
        weights["post_quant_conv.weight"].shape[1]
        if "post_quant_conv.weight" in weights
        else latent
    )
    if moments != 2 * latent or embedded != latent:
        raise ValueError(
            f"{origin}: its latent has {embedded} channels, the decoder takes {latent}, the encoder gives {moments}: "
            "AutoencoderKL has one width for all"
        )
    depth, norms = len(widths), re.compile(r"encoder\.down\.0\.block\.\d+\.norm1\.weight")
    others = [
        weights[name].shape[0]
        for i in range(depth)
        if (name := f"decoder.up.{i}.block.0.conv1.weight") in weights
    ]
    return {
        "in_channels": channels,
        "out_channels": output,
        **{key: [block] * depth for key, block in BLOCKS.items()},
        "block_out_channels": widths,
        **(
            {"decoder_block_out_channels": others if others != widths else None}
            if kind == FLUX2
            else {}
        ),
        "layers_per_block": sum(bool(norms.fullmatch(name)) for name in weights),
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
        "norm_num_groups": 32,
    }
