"""The part of a training config, or of an export's config.json, that builds an autoencoder.

Also the names of TARGETs. Both are checked here without slow imports.

An export is a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``: diffusers'
layout, with the parameters under their published names, so that this package, the hub and diffusers
read the same two files.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae.config import Config, ConfigError, Node
from olvae.config.nodes import check_arguments, unknown_keys
from olvae.config.reading import CONFIG_BYTES
from olvae.data.places import load
from olvae.files import reason
from olvae.runs import entry_of

OURS = "olvae."  # begins every target that a received config may name
CLASS_NAME = "AutoencoderLiteVAE"
CONFIG_NAME = "config.json"
AUTO_MAP = {"AutoModel": f"autoencoder_litevae.{CLASS_NAME}"}  # the file in an export, its class
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# What builds the networks
NETWORKS = ("encoder_config", "decoder_config", "embed_dim", "use_quant")

FOR_DIFFUSION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Arguments of :class:`AutoencoderSpec` for a diffusion model's pipeline; networks ignore them."""

# Of a model whose latents nobody has measured.
UNMEASURED: Mapping[str, float | None] = {
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latents_mean": None,
    "latents_std": None,
}

IN_TRAINING = (*NETWORKS, "initial_logvar", *FOR_DIFFUSION)
IN_EXPORT = (*NETWORKS, "folded", *FOR_DIFFUSION, "pixel_range")

DERIVED = (
    *("block_out_channels", "in_channels", "latent_channels", "out_channels", "sample_size"),
    *("use_post_quant_conv", "use_quant_conv", "auto_map"),
)
"""Other keys of an export's config.json, for diffusers; they follow from the arguments."""

MAX_BLOCKS = 24  # per level, of a received config; of the recipes the deepest has 5
MAX_ENTRIES = 10  # of a list in a received config, which has one for each level
MAX_NUMBER = 2**16  # in a received config: channels, sizes in pixels


@dataclass(frozen=True)
class AutoencoderSpec:
    """The arguments that build an autoencoder.

    See ``LiteVAE.from_config``, and the attributes of ``Autoencoder``.
    """

    encoder_config: Node
    decoder_config: Node
    embed_dim: int
    use_quant: bool = False
    initial_logvar: float = 0.0
    folded: bool = False  # whether the self-modulated convolutions are ordinary ones
    scaling_factor: float | int = 1.0
    shift_factor: float | int = 0.0
    latents_mean: Sequence[float | int] | None = None  # n_z numbers, or 4 n_z of 2x2 patches
    latents_std: Sequence[float | int] | None = None  # as many
    force_upcast: bool = False
    # data.params.range of the training; None for 8 bits
    pixel_range: Mapping[str, Any] | Sequence[Any] | None = None

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], origin: str, only_ours: bool
    ) -> "AutoencoderSpec":
        """Read the content of a training config, or of an export's config.json.

        ConfigError if it has mistakes. ``origin`` is for messages; ``only_ours`` refuses networks
        from outside of this package, for received configs.
        """
        unknown: Iterable[str] = ()
        if "model" in content:
            found = {key: entry_of(content, f"model.params.{key}") for key in IN_TRAINING}
            params = {key: value for key, value in found.items() if value is not None}
            params["pixel_range"] = entry_of(content, "data.params.range")
            origin = f"{origin}: model.params."
        else:
            origin = f"{origin}: "
            name = content.get("_class_name", CLASS_NAME)
            if name != CLASS_NAME:
                raise ConfigError(
                    f"{origin}the config of diffusers' {name}: as a target, diffusers:FOLDER"
                )
            params = {key: content[key] for key in IN_EXPORT if key in content}
            given = {key: value for key, value in content.items() if not key.startswith("_")}
            unknown = unknown_keys(given, (*IN_EXPORT, *DERIVED))

        # Each check runs only if the ones before found nothing.
        for mistakes in (
            unknown,
            _wrong_networks(params, only_ours),
            oversized(params) if only_ours else (),
            check_arguments(cls, params),
            check_factors(params, params.get("embed_dim", 0)),
        ):
            lines = [f"{origin}{mistake}" for mistake in mistakes]
            if lines:
                raise ConfigError(*lines)
        return cls(**params)

    @property
    def ours(self) -> bool:
        """Whether both networks are of this package."""
        halves = (self.encoder_config, self.decoder_config)
        return all(str(node["target"]).startswith(OURS) for node in halves)

    def to_export(self, **derived: Any) -> Config:
        """The content of an export's config.json, with the ``derived`` keys.

        ValueError if a network is not of this package, or has an argument that JSON can't have.
        """
        for target in (self.encoder_config["target"], self.decoder_config["target"]):
            if not target.startswith(OURS):
                raise ValueError(
                    f"{target} is a network of your own: an export holds networks of this package "
                    "only"
                )
        arguments = {name: getattr(self, name) for name in IN_EXPORT}
        if self.pixel_range is None:
            del arguments["pixel_range"]  # other tools know nothing of it
        try:
            text = json.dumps(
                {"_class_name": CLASS_NAME, "auto_map": AUTO_MAP, **arguments, **derived}
            )
        except TypeError as error:
            raise ValueError(
                f"a network has an argument that JSON can't represent: {error}"
            ) from error
        content: Config = json.loads(text)  # as it will be read: tuples are lists
        return content


def read_config(path: str | Path, received: bool = False) -> Config:
    """Read a training config (YAML) or the config.json of an export; ConfigError if it can't be.

    ``received``: it may be somebody else's, so a YAML file may not include others.
    """
    path = Path(path)
    if path.suffix != ".json":
        return cfg.read_received(path) if received else load([path])
    try:
        with path.open(encoding="utf-8") as file:
            content = json.loads(file.read(CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping, not a {type(content).__name__}")
    return content


def class_in(folder: Path) -> str | None:
    """The class, diffusers' or ours, that a folder's config.json names; None without one."""
    try:
        name = read_config(folder / CONFIG_NAME).get("_class_name")
    except ConfigError:
        return None
    return name if isinstance(name, str) else None


def _wrong_networks(params: Mapping[str, Any], only_ours: bool) -> Iterator[str]:
    """Yield an error for each target that is no network, or that a received config may not name.

    The latter is not imported.
    """
    from olvae.modules.base import Decoder, Encoder  # slow

    for key, kind in (("encoder_config", Encoder), ("decoder_config", Decoder)):
        node = params.get(key)
        target = node.get("target") if isinstance(node, Mapping) else None
        if only_ours and isinstance(target, str) and not target.startswith(OURS):
            yield f"{key}.target: {target} is not a network of this package: refused"
        elif isinstance(target, str):
            try:
                cfg.resolve_class(target, kind)
            except ConfigError as error:
                yield f"{key}.target: {error}"


def oversized(params: Mapping[str, Any]) -> Iterator[str]:
    """Yield an error for each size too large to build even on the meta device."""
    for key, value in params.items():
        if key == "pixel_range":
            continue
        if isinstance(value, Mapping):
            for line in oversized(value):
                yield f"{key}.{line}"
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        counts_layers = str(key).endswith(("blocks", "layers", "levels", "per_block"))
        most = MAX_BLOCKS if counts_layers else MAX_NUMBER
        if any(isinstance(number, int) and abs(number) > most for number in values):
            yield f"{key}: more than {most} in a config that was received: refused"
        elif len(values) > MAX_ENTRIES and not str(key).startswith(("_", "latents_")):
            yield f"{key}: more than {MAX_ENTRIES} entries in a config that was received: refused"


def check_factors(values: Mapping[str, Any], n_z: int) -> Iterator[str]:
    """Yield an error for each invalid scaling or shift factor."""
    # One number each
    for key, above in (("scaling_factor", " above 0"), ("shift_factor", "")):
        value = values.get(key, 1.0)
        if not _is_number(value, positive=bool(above)):
            yield f"{key}: expected a number{above}, got {value!r}"

    # Per channel, or as FLUX.2's for the four positions of 2x2 patches
    for key, above in (("latents_mean", ""), ("latents_std", " above 0")):
        several = values.get(key)
        if several is None:
            continue
        fits = len(several) in (n_z, 4 * n_z)
        if not fits or not all(_is_number(n, positive=bool(above)) for n in several):
            yield f"{key}: expected {n_z} numbers{above}, one per channel, got {several!r}"
    if (values.get("latents_mean") is None) != (values.get("latents_std") is None):
        yield "latents_mean, latents_std: give both, or neither"


def _is_number(value: Any, positive: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not positive)
