"""Autoencoders of diffusers (KL, Tiny, DC, Wan, ...) with the interface of our own."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.checkpoint import check_file, load_weights, mismatches
from olvae.config import ConfigError
from olvae.files import WEIGHT_SUFFIXES, first_line
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import FAMILIES
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import CLASS_NAME, DIFFUSERS, FOR_DIFFUSION, class_in, oversized
from olvae.models.weight_files import snapshot
from olvae.modules.base import count_parameters
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.modules.others.wrapped import decode_image, encode_image, has_frames

SUBFOLDER = "vae"  # where pipelines keep their autoencoder
PROBE = 128  # side in pixels of the image that measures an autoencoder's factor; the largest published factor is 128
RAE = "AutoencoderRAE"  # takes and gives [0, 1]
TINY = "AutoencoderTiny"  # has its latents in a diffusion model's units
ONE_BY_ONE = "AutoencoderKLHunyuanVideo15"  # its attention mask fits no batch [diffusers 0.42]
PER_CHANNEL = ("latents_mean", "latents_std")
REFUSALS = (
    AttributeError,
    AssertionError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What classes raise for images of another shape than they take."""

NO_IMAGES = {
    "AutoencoderKLLTX2Audio": "is an autoencoder of sound, not of images",
    "ConsistencyDecoderVAE": "decodes by a diffusion model, which draws noise: two decodings of a latent differ",
}
"""Classes that would pass for image autoencoders, and why they are none."""


class DiffusersAutoencoder(Autoencoder):
    """An image autoencoder of diffusers, or one of video for single images. It takes and gives images in [-1, 1].

    Its latents are the model's own: neither scaled nor shifted by the factors in its config.

    Raises ValueError: it does not take images to smaller latents and back.
    """

    frames = False  # whether it has a time axis
    mean: Tensor  # of what its latents are converted to: 0, with std 1, leaves them as they are
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.downscale = model, 1  # until it is measured
        self.kind = type(model).__name__
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("std", torch.ones(()), persistent=False)
        if why := NO_IMAGES.get(self.kind):
            raise ValueError(f"{self.kind} {why}")
        if self.kind == ONE_BY_ONE:
            model.use_slicing = True
        self.zero_to_one = self.kind == RAE
        if self.zero_to_one:
            self.image_size = self.side = int(model.decoder_image_size)
        latent = self._measure()
        self.downscale, self.latent_channels = (
            (self.side or PROBE) // latent.mean.shape[-1],
            latent.mean.shape[1],
        )
        self.deterministic = latent.deterministic
        for factor, value in self._factors().items():
            setattr(self, factor, value)

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        if self.kind == TINY:
            self.mean, self.std = (values.to(self.mean).view(-1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def _measure(self) -> Posterior:
        """Encode and decode an image of each number of channels that the config suggests, until one is accepted."""
        config, p = self.model.config, next(self.model.parameters())
        channels = [
            getattr(config, key, None) for key in ("in_channels", "input_channels", "out_channels")
        ]
        size, first = self.side or PROBE, None
        for count in dict.fromkeys([n for n in channels if n] + [3]):
            for frames in has_frames(self.model):
                self.in_channels, self.frames = count, frames
                x = torch.zeros(1, self.in_channels, size, size, dtype=p.dtype, device=p.device)
                try:
                    latent = self.encode(x)
                except REFUSALS as error:
                    first = first or error
                    continue
                shape = latent.mean.shape
                if latent.mean.ndim != 4 or size % shape[-1] or shape[-1] != shape[-2]:
                    made = tuple(shape[1:])
                    raise ValueError(
                        f"{self.kind} makes {made} of an image of {size}x{size}: no latent image"
                    )
                self._check_decoder(latent.mean, size // shape[-1])
                return latent
        assert first is not None
        raise ValueError(f"{self.kind} does not encode images: {first_line(first)}") from first

    def _check_decoder(self, z: Tensor, f: int) -> None:
        """Raise ValueError unless it decodes a latent, or a few positions of it, to an image f times as large."""
        z = z if self.side else z[..., :4, :4]
        try:
            made = tuple(self.decode(z).shape)
        except REFUSALS as error:
            raise ValueError(
                f"{self.kind} does not decode to an image: {first_line(error)}"
            ) from error
        if made != (expected := (1, self.in_channels, f * z.shape[-2], f * z.shape[-1])):
            raise ValueError(f"{self.kind} decodes to {made}, not to an image of {expected}")

    def _factors(self) -> dict[str, Any]:
        """Find the factors for a diffusion model: in the config, in buffers, or in FLUX.2's batch norm."""
        if self.zero_to_one:  # encode and decode apply them
            return {}
        config, buffers, n_z = (
            self.model.config,
            dict(self.model.named_buffers()),
            self.latent_channels,
        )
        found = {
            name: value
            for name in FOR_DIFFUSION
            if (value := getattr(config, name, None)) is not None
        }
        for name in PER_CHANNEL:
            if (value := found.get(name, buffers.get(name))) is not None:
                values = value.tolist() if isinstance(value, Tensor) else list(value)
                found[name] = values[
                    :: max(1, len(values) // n_z)
                ]  # one for each frame of a channel: the first
        if "bn.running_var" in buffers:  # of 2x2 positions of each channel
            variance = buffers["bn.running_var"].double() + config.batch_norm_eps
            found |= zip(
                PER_CHANNEL,
                (buffers["bn.running_mean"].tolist(), variance.sqrt().tolist()),
                strict=True,
            )
        return found

    @property
    def encoder(self) -> nn.Module | None:
        """The network that encodes, if the model keeps it apart."""
        return getattr(self.model, "encoder", None)

    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f), deterministic where the model has none."""
        if self.side is not None and x.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"{self.kind} takes images of {self.side}x{self.side} only, not {x.shape[-2]}x{x.shape[-1]}"
            )
        if x.shape[-2] % self.downscale or x.shape[-1] % self.downscale:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {self.downscale}"
            )
        latent, distributed = encode_image(
            self.model, (x + 1) / 2 if self.zero_to_one else x, self.frames
        )
        return (
            DiagonalGaussian(latent)
            if distributed
            else Deterministic(latent * self.std + self.mean)
        )

    def decode(self, z: Tensor) -> Tensor:
        x = decode_image(self.model, (z - self.mean) / self.std, self.frames)
        return 2 * x - 1 if self.zero_to_one else x

    def as_litevae(self, name: str) -> LiteVAE:
        family = next((family for family in FAMILIES if self.kind in family.kinds), None)
        if family is None:
            known = ", ".join(["LiteVAE", *(kind for family in FAMILIES for kind in family.kinds)])
            why = "can be a teacher; those that can be trained or exported"
            raise ConfigError(f"{name}: diffusers' {self.kind} {why}: {known}")
        spec = family.spec(self, name)
        with torch.random.fork_rng(devices=[]):
            ours = LiteVAE.from_spec(spec)
        load_weights(ours, family.to_ours(self.model.state_dict()), name)
        return ours.train(self.training)


class DiffusersLoader(Loader):
    """``diffusers:ID_OR_FOLDER``, or a folder of diffusers by its own name: an autoencoder's or a pipeline's."""

    def accepts(self, text: str) -> bool:
        path = Path(text)
        inside = path.is_dir() and (
            class_in(path) not in (None, CLASS_NAME) or class_in(path / SUBFOLDER) is not None
        )
        return text.startswith(DIFFUSERS) or inside

    def find(self, text: str, options: LoadOptions) -> Target | Path:
        folder = find_folder(text.removeprefix(DIFFUSERS))
        if class_in(folder) == CLASS_NAME:  # an export of ours, in a pipeline
            return folder
        if options.raw:
            warnings.warn(
                f"{text}: diffusers has one kind of weights: `raw` is ignored", stacklevel=2
            )
        return Target(
            partial(load_diffusers, folder),
            partial(load_diffusers, folder, trained=False),
            name=text,
        )


def find_folder(text: str) -> Path:
    """Find the folder of an autoencoder, or download it; FileNotFoundError if there is none, or the hub is away.

    ``text``: a folder or id of the hub, of an autoencoder or of a pipeline with one in ``vae``, or after ``::``.
    """
    name, _, subfolder = text.partition("::")
    root, prefixes = Path(name), [f"{subfolder}/"] if subfolder else ["", f"{SUBFOLDER}/"]
    on_hub = not root.is_dir()
    if on_hub:  # the configs first, then the weights of the one folder that has the autoencoder
        root = snapshot(name, [f"{prefix}config.json" for prefix in prefixes])
    found = [prefix for prefix in prefixes if (root / prefix / "config.json").is_file()]
    prefix = next((prefix for prefix in found if class_in(root / prefix)), next(iter(found), None))
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

    ConfigError if its config names none of diffusers; ValueError if the weights are unreadable, non-finite, or misfits.
    """
    import diffusers

    name = class_in(folder)
    if name is None:
        raise ConfigError(f"{folder}/config.json: not a config of diffusers: it has no _class_name")
    kind: Any = getattr(diffusers, name, None)
    if not getattr(kind, "__module__", "").startswith("diffusers.models.autoencoders."):
        raise ConfigError(
            f"{folder}/config.json: {name} is not an autoencoder of diffusers {diffusers.__version__}"
        )
    if large := list(oversized(kind.load_config(folder))):
        raise ConfigError(*(f"{folder}/config.json: {line}" for line in large))
    files = [file for suffix in WEIGHT_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    try:
        with torch.device("meta"):
            check_parameters(
                kind.from_config(kind.load_config(folder)),
                sum(file.stat().st_size for file in files),
            )
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
    except NameError as error:
        raise ValueError(
            f"{folder}: {name} needs a package that is not installed: {first_line(error)}"
        ) from error
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{folder}: not a readable {name}: {first_line(error)}") from error
    misshapen = [
        f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in report["mismatched_keys"]
    ]
    if wrong := mismatches([*report["missing_keys"]], [*report["unexpected_keys"]], misshapen):
        raise ValueError(
            f"{folder}: these weights are of another model than its config.json: {wrong}"
        )
    if broken := [
        name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()
    ]:
        raise ValueError(
            f"{folder}: {len(broken)} of its tensors have non-finite values ({broken[0]}, ...)"
        )
    return DiffusersAutoencoder(model).eval()


def check_parameters(outline: nn.Module, stored: int) -> None:
    """Check that a network on the meta device has no more parameters than its weights have bytes."""
    parameters = count_parameters(outline)
    if stored and parameters > stored:
        raise ValueError(
            f"weights of another model: its config has {parameters:,} parameters, they {stored:,} bytes"
        )
