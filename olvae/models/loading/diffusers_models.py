"""Autoencoders of diffusers (KL, Tiny, DC, ...) with the interface of our own, and AutoencoderKL under other names.

Stable Diffusion's, SDXL's, SD3's and FLUX's autoencoders are all diffusers' AutoencoderKL: SDEncoder, SDDecoder and, in
the older ones, a 1x1 convolution on either side of the latent. So it can be a LiteVAE, to be trained and exported. The
latent-diffusion code's names are converted by diffusers; its configuration is read from the shapes.
"""

import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.checkpoint import check_file, load_weights, mismatches, read_checkpoint, state_dict_of
from olvae.config import ConfigError
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import (
    CLASS_NAME,
    DIFFUSERS,
    FOR_DIFFUSION,
    WEIGHT_SUFFIXES,
    AutoencoderSpec,
    class_in,
    oversized,
)
from olvae.models.weight_files import locate_weights, snapshot
from olvae.modules.base import count_parameters
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.modules.sdvae import SDDecoder, SDEncoder

SUBFOLDER = "vae"  # where pipelines keep their autoencoder
PROBE = 128  # side in pixels of the image that measures an autoencoder's factor; the largest published factor is 128
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

NAMES = {
    "encoder.": "encoder.model.",
    "decoder.": "decoder.model.",
    "quant_conv.": "quantizer.quant_conv.",
    "post_quant_conv.": "quantizer.post_quant_conv.",
}
"""How AutoencoderKL's names begin in diffusers, and here."""

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


class DiffusersAutoencoder(Autoencoder):
    """An image autoencoder of diffusers. All of them take and give images in [-1, 1].

    Its latents are the model's own: neither scaled nor shifted by the factors in its config.

    Raises ValueError: it does not take images to smaller latents and back.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.downscale = model, 1  # until it is measured
        self.in_channels = int(getattr(model.config, "in_channels", 3))
        name, p = type(model).__name__, next(model.parameters())
        try:
            with torch.no_grad():
                latent = self.encode(torch.zeros(1, self.in_channels, PROBE, PROBE, dtype=p.dtype, device=p.device))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} does not encode images: {first_line(error)}") from error
        mean = latent.mean
        if mean.ndim != 4 or PROBE % mean.shape[-1] or mean.shape[-1] != mean.shape[-2]:
            raise ValueError(f"{name} makes {tuple(mean.shape[1:])} of an image of {PROBE}x{PROBE}: no latent image")
        self.downscale, self.latent_channels = PROBE // mean.shape[-1], mean.shape[1]
        self.deterministic = latent.deterministic
        for factor in FOR_DIFFUSION:
            if (value := getattr(model.config, factor, None)) is not None:
                setattr(self, factor, value)

    @property
    def encoder(self) -> nn.Module | None:
        """The network that encodes, if the model keeps it apart."""
        return getattr(self.model, "encoder", None)

    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f), deterministic where the model has none."""
        if x.shape[-2] % self.downscale or x.shape[-1] % self.downscale:
            raise ValueError(f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {self.downscale}")
        output = self.model.encode(x)
        if "latent_dist" in output:
            return DiagonalGaussian(output.latent_dist.parameters)
        return Deterministic(output["latents"] if "latents" in output else output["latent"])

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.model.decode(z).sample
        return x


class DiffusersLoader(Loader):
    """``diffusers:ID_OR_FOLDER``, or a folder of diffusers by its own name: an autoencoder's or a pipeline's."""

    def accepts(self, text: str) -> bool:
        path = Path(text)
        inside = path.is_dir() and (class_in(path) not in (None, CLASS_NAME) or class_in(path / SUBFOLDER) is not None)
        return text.startswith(DIFFUSERS) or inside

    def find(self, text: str, options: LoadOptions) -> Target | Path:
        folder = find_folder(text.removeprefix(DIFFUSERS))
        if class_in(folder) == CLASS_NAME:  # an export of ours, in a pipeline
            return folder
        if options.raw:
            warnings.warn(f"{text}: diffusers has one kind of weights: `raw` is ignored", stacklevel=2)
        return Target(partial(load_diffusers, folder), partial(load_diffusers, folder, trained=False), name=text)


def find_folder(text: str) -> Path:
    """Find the folder of an autoencoder, or download it; FileNotFoundError if there is none, or the hub is away.

    ``text``: a folder or id of the hub, of an autoencoder or of a pipeline with one in ``vae``, or after ``::``.
    """
    name, _, subfolder = text.partition("::")
    root, prefixes = Path(name), [f"{subfolder}/"] if subfolder else ["", f"{SUBFOLDER}/"]
    on_hub = not root.is_dir()
    if on_hub:  # the configs first, then the weights of the one folder that has the autoencoder
        root = snapshot(name, [f"{prefix}config.json" for prefix in prefixes])
    prefix = next((prefix for prefix in prefixes if (root / prefix / "config.json").is_file()), None)
    if prefix is None:
        raise FileNotFoundError(
            f"diffusers:{text}: config.json not found in it{'' if subfolder else f' or in its {SUBFOLDER}'}: name the "
            f"subfolder of the autoencoder, as in diffusers:{name}::SUBFOLDER"
        )
    for pattern in ("*.safetensors", "*.bin") if on_hub else ():
        ignored = [f"{prefix}*/*", "*.fp16.*", "*.non_ema.*"]
        root = snapshot(name, [f"{prefix}config.json", f"{prefix}{pattern}"], ignored)
        if any((root / prefix).glob(pattern)):
            break
    return root / prefix


def load_diffusers(folder: Path, trained: bool = True) -> DiffusersAutoencoder:
    """Load the autoencoder in a folder, in evaluation mode and float32; with fresh weights if not ``trained``.

    Raises:
        ConfigError: the config does not name an autoencoder of diffusers.
        ValueError: the weights are not readable, non-finite, or do not fit.
    """
    import diffusers

    name = class_in(folder)
    if name is None:
        raise ConfigError(f"{folder}/config.json: not a config of diffusers: it has no _class_name")
    kind = getattr(diffusers, name, None)
    if (
        not isinstance(kind, type)
        or not issubclass(kind, diffusers.ModelMixin)
        or not re.search("Autoencoder|VQ", name)
    ):
        raise ConfigError(f"{folder}/config.json: {name} is not an autoencoder of diffusers {diffusers.__version__}")
    if large := list(oversized(kind.load_config(folder))):
        raise ConfigError(*(f"{folder}/config.json: {line}" for line in large))
    files = [file for suffix in WEIGHT_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    try:
        with torch.device("meta"):
            _check_parameters(kind.from_config(kind.load_config(folder)), sum(file.stat().st_size for file in files))
        for file in files:
            check_file(file)
        if not trained:
            return DiffusersAutoencoder(kind.from_config(kind.load_config(folder))).eval()
        model, report = kind.from_pretrained(
            folder,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they are in the report
        )
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{folder}: not a readable {name}: {first_line(error)}") from error
    misshapen = [f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in report["mismatched_keys"]]
    if wrong := mismatches([*report["missing_keys"]], [*report["unexpected_keys"]], misshapen):
        raise ValueError(f"{folder}: these weights are of another model than its config.json: {wrong}")
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder}: {len(broken)} of its tensors have non-finite values ({broken[0]}, ...)")
    return DiffusersAutoencoder(model).eval()


def _check_parameters(outline: nn.Module, stored: int) -> None:
    """Check that a network on the meta device has no more parameters than its weights have bytes."""
    parameters = count_parameters(outline)
    if stored and parameters > stored:
        raise ValueError(f"weights of another model: its config has {parameters:,} parameters, they {stored:,} bytes")


def is_stable_diffusion(model: Autoencoder) -> bool:
    """Whether a model's networks are AutoencoderKL's."""
    halves = (getattr(model, "encoder", None), getattr(model, "decoder", None))
    return isinstance(halves[0], SDEncoder) and isinstance(halves[1], SDDecoder)


def as_litevae(model: Autoencoder, name: str) -> LiteVAE:
    """The same autoencoder as a LiteVAE object, whose networks can be trained and exported.

    ConfigError if it is neither a LiteVAE nor an AutoencoderKL, or has a part that SDEncoder and SDDecoder lack.
    """
    if isinstance(model, LiteVAE):
        return model
    kind = type(model.model).__name__ if isinstance(model, DiffusersAutoencoder) else type(model).__name__
    if not isinstance(model, DiffusersAutoencoder) or kind != "AutoencoderKL":
        raise ConfigError(f"{name}: diffusers' {kind}: only LiteVAE and AutoencoderKL can be trained and exported here")
    spec = _spec(dict(model.model.config), name)
    with torch.random.fork_rng(devices=[]):
        ours = LiteVAE.from_spec(spec)
    load_weights(ours, _renamed(model.model.state_dict(), NAMES), name)
    return ours.train(model.training)


def _spec(config: Mapping[str, Any], name: str) -> AutoencoderSpec:
    """What AutoencoderKL's config describes; training and exports need no more of it."""
    for key, only in (*BLOCKS.items(), ("act_fn", "silu")):
        found = {config[key]} if isinstance(config[key], str) else set(config[key])
        if other := found - {only}:
            raise ConfigError(f"{name}: {key}: {', '.join(sorted(other))}: only {only} can be trained here")
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        raise ConfigError(f"{name}: it has one of quant_conv and post_quant_conv: only both or none can be trained")
    widths, n_z = list(config["block_out_channels"]), config["latent_channels"]
    common, size, f = math.gcd(*widths), config["sample_size"], 2 ** (len(widths) - 1)
    shared = {
        "channels": common,
        "channel_mult": [width // common for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "attention": config["mid_block_add_attention"],
    }
    encoder = {"latent_dim": 2 * n_z, "in_channels": config["in_channels"]}
    encoder["image_size"] = size if isinstance(size, int) and size % f == 0 else max(256, f)
    decoder = {"z_channels": n_z, "out_channels": config["out_channels"]}
    return AutoencoderSpec(
        encoder_config={"target": f"{SDEncoder.__module__}.SDEncoder", "params": {**encoder, **shared}},
        decoder_config={"target": f"{SDDecoder.__module__}.SDDecoder", "params": {**decoder, **shared}},
        embed_dim=n_z,
        use_quant=config["use_quant_conv"],
        **{factor: config[factor] for factor in FOR_DIFFUSION} | {"shift_factor": config["shift_factor"] or 0.0},
    )


def diffusers_config(model: LiteVAE) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL with the networks of :func:`is_stable_diffusion`.

    ValueError if encoder and decoder differ in a setting that AutoencoderKL has once.
    """
    encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
    widths, others = ([half["channels"] * m for m in half["channel_mult"]] for half in (encoder, decoder))
    n_z, moments = model.latent_channels, model.encoder.latent_dim
    for what, one, other in (
        ("widths", widths, others),
        *((key, encoder[key], decoder[key]) for key in ("num_res_blocks", "norm_groups", "attention")),
        ("moments", moments, 2 * model.decoder.z_channels),
        ("moments", moments, 2 * n_z),
    ):
        if one != other:
            raise ValueError(f"the encoder has {what} {one}, the decoder {other}: AutoencoderKL has the same in both")
    quantized = model.quantizer is not None
    return {
        "in_channels": model.in_channels,
        "out_channels": model.decoder.out_channels,
        **{key: [block] * len(widths) for key, block in BLOCKS.items()},
        "block_out_channels": widths,
        "layers_per_block": encoder["num_res_blocks"],
        "latent_channels": n_z,
        "norm_num_groups": encoder["norm_groups"],
        "sample_size": model.encoder.image_size,
        "use_quant_conv": quantized,
        "use_post_quant_conv": quantized,
        "mid_block_add_attention": encoder["attention"],
        **model.for_diffusion,
    }


def diffusers_weights(model: LiteVAE) -> dict[str, Tensor]:
    """The weights under AutoencoderKL's names; ValueError for a linear path, which it does not have."""
    if model.encoder.linear is not None or model.decoder.linear is not None:
        raise ValueError("AutoencoderKL has no linear path beside its networks")
    return _renamed(model.state_dict(), {ours: theirs for theirs, ours in NAMES.items()})


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        next(new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)): tensor
        for name, tensor in state.items()
    }


def latent_diffusion_weights(model: LiteVAE) -> dict[str, Tensor]:
    """Name the weights as latent-diffusion does, where attention's linear layers are 1x1 convolutions, (C, C, 1, 1)."""
    last = len(model.encoder.node["params"]["channel_mult"]) - 1
    named = {}
    for name, tensor in diffusers_weights(model).items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for ours, theirs in LDM_NAMES.items():
            name = name.replace(ours, theirs)
        named[name] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return named


class LatentDiffusionLoader(Loader):
    """A checkpoint of the latent-diffusion code with a KL autoencoder, or a folder with one."""

    def accepts(self, text: str) -> bool:
        try:
            weights = locate_weights(text)
        except (FileNotFoundError, ValueError):
            return False
        return bool(_latent_diffusion_tensors(weights, check=False))

    def find(self, text: str, options: LoadOptions) -> Target:
        weights, raw = locate_weights(text), options.raw
        config = _latent_diffusion_config(_latent_diffusion_tensors(weights, raw, check=False), weights)

        def load() -> DiffusersAutoencoder:
            tensors = _latent_diffusion_tensors(weights, raw)
            return _from_latent_diffusion(config, tensors, weights, options.allow_mismatch)

        return Target(load, partial(_from_latent_diffusion, config), raw=raw, name=text)


def _latent_diffusion_tensors(file: Path, raw: bool = False, check: bool = True) -> dict[str, Tensor]:
    """The autoencoder's tensors in a file of that code, without the names' prefix; none of another file."""
    state = state_dict_of(read_checkpoint(file, check), file, raw)
    prefixes = ("first_stage_model.", "vae.", "")
    prefix = next((p for p in prefixes if f"{p}encoder.down.0.block.0.norm1.weight" in state), None)
    if prefix is None:
        return {}
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(f"{file}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read")
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {n: tensor for n, tensor in found.items() if n.startswith(tuple(NAMES)) and isinstance(tensor, Tensor)}


def _from_latent_diffusion(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    origin: str | Path = "",
    allow_mismatch: bool = False,
) -> DiffusersAutoencoder:
    """Build AutoencoderKL with these weights, in evaluation mode; fresh without weights."""
    from diffusers import AutoencoderKL  # seconds, which other targets do not need
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model: Any = AutoencoderKL(**config)
    if weights is not None:
        converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(weights), config)
        if len(converted) != len(weights):
            raise ValueError(f"{origin}: {len(weights) - len(converted)} of its tensors have no place in AutoencoderKL")
        load_weights(model, converted, origin, allow_mismatch, prefixes=("",))
    autoencoder = DiffusersAutoencoder(model).eval()
    autoencoder.factors_known = False  # diffusers' defaults are those of Stable Diffusion 1
    return autoencoder


def _latent_diffusion_config(weights: Mapping[str, Tensor], origin: Path) -> dict[str, Any]:
    """The arguments of AutoencoderKL, from the shapes. GroupNorm always has 32 groups in that code."""
    from diffusers import AutoencoderKL

    if attention := [name for name in weights if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)]:
        raise ValueError(f"{origin}: attention outside the middle ({attention[0]}), which AutoencoderKL does not have")
    try:
        channels, moments = weights["encoder.conv_in.weight"].shape[1], weights["encoder.conv_out.weight"].shape[0]
        latent, output = weights["decoder.conv_in.weight"].shape[1], weights["decoder.conv_out.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{origin}: an autoencoder of latent-diffusion, but without {error.args[0]}") from error
    widths: list[int] = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    embedded = weights["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in weights else latent
    if moments != 2 * latent or embedded != latent:
        raise ValueError(
            f"{origin}: its latent has {embedded} channels, the decoder takes {latent}, the encoder gives {moments}: "
            "AutoencoderKL has one width for all"
        )
    config = {
        "in_channels": channels,
        "out_channels": output,
        **{key: (block,) * len(widths) for key, block in BLOCKS.items()},
        "block_out_channels": tuple(widths),
        "layers_per_block": sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.norm1\.weight", n)) for n in weights),
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
    }
    with torch.device("meta"):
        outline: Any = AutoencoderKL(**config)
        _check_parameters(outline, sum(weight.nbytes for weight in weights.values()))
    return config
