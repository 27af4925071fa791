"""Autoencoders of diffusers (KL, Tiny, DC, ...) with the interface of our own, and their TARGETs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.checkpoint import check_file, mismatches
from olvae.config import ConfigError
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.names import DIFFUSERS, WEIGHT_SUFFIXES
from olvae.models.spec import CLASS_NAME, FOR_DIFFUSION, class_in, oversized
from olvae.models.weight_files import snapshot
from olvae.modules.base import count_parameters
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.runs import Run

SUBFOLDER = "vae"
"""Where pipelines keep their autoencoder."""

PROBE = 128
"""Side in pixels of the image that measures an autoencoder's factor; the largest published factor is 128."""


class DiffusersAutoencoder(Autoencoder):
    """An image autoencoder of diffusers. All of them take and give images in [-1, 1].

    Its latents are the model's own: neither scaled nor shifted by the factors in its config.

    Raises:
        ValueError: it does not take images to smaller latents and back.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.in_channels = int(getattr(model.config, "in_channels", 3))
        name = type(model).__name__
        try:
            with torch.no_grad():
                p = next(model.parameters())
                latent = self.encode_any(torch.zeros(1, self.in_channels, PROBE, PROBE, dtype=p.dtype, device=p.device))
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
        return self.encode_any(x)

    def encode_any(self, x: Tensor) -> Posterior:
        """As :meth:`encode`, for any size that the model takes."""
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
        return Target(
            partial(load_diffusers, folder, allow_mismatch=options.allow_mismatch),
            partial(load_diffusers, folder, trained=False),
            name=text,
        )


def find_folder(text: str) -> Path:
    """Find the folder of an autoencoder, or download it.

    Args:
        text: a folder or id of the hub, of an autoencoder or of a pipeline with one in ``vae``, or after ``::``.

    Raises:
        FileNotFoundError: there is no such autoencoder, or the hub can't be reached.
    """
    name, _, subfolder = text.partition("::")
    root, prefixes = Path(name), [f"{subfolder}/"] if subfolder else ["", f"{SUBFOLDER}/"]
    on_hub = not root.is_dir()
    if on_hub:  # the configs first, then the weights of the one folder that has the autoencoder
        root = snapshot(name, [f"{prefix}config.json" for prefix in prefixes])
    prefix = next((prefix for prefix in prefixes if (root / prefix / "config.json").is_file()), None)
    if prefix is None and Run(root).last_checkpoint.is_file():
        raise FileNotFoundError(f"diffusers:{text}: this is a run: name it without diffusers:")
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


def load_diffusers(folder: Path, trained: bool = True, allow_mismatch: bool = False) -> DiffusersAutoencoder:
    """Load the autoencoder in a folder, in evaluation mode and float32; with fresh weights if not ``trained``.

    Raises:
        ConfigError: the config does not name an autoencoder of diffusers.
        ValueError: the weights are not readable, non-finite, or do not fit.
    """
    import diffusers
    from diffusers import ModelMixin

    name = class_in(folder)
    if name is None:
        raise ConfigError(f"{folder}/config.json: not a config of diffusers: it has no _class_name")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin) and ("Autoencoder" in name or name == "VQModel")):
        raise ConfigError(f"{folder}/config.json: {name} is not an autoencoder of diffusers {diffusers.__version__}")
    if large := list(oversized(kind.load_config(folder))):
        raise ConfigError(*(f"{folder}/config.json: {line}" for line in large))
    files = [file for suffix in WEIGHT_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    try:
        with torch.device("meta"):
            check_parameters(kind.from_config(kind.load_config(folder)), sum(file.stat().st_size for file in files))
        for file in files:
            check_file(file)
        if not trained:
            return DiffusersAutoencoder(kind.from_config(kind.load_config(folder))).eval()
        with _quiet():
            model, report = kind.from_pretrained(
                folder,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                ignore_mismatched_sizes=True,  # so that they are in the report
            )
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{folder}: not a readable {name}: {first_line(error)}") from error
    state = model.state_dict()
    lacking = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    misshapen = [f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in report["mismatched_keys"]]
    wrong = mismatches([*report["missing_keys"]], [*report["unexpected_keys"]], misshapen)
    loaded = len(state) - len(lacking)
    if wrong and not (allow_mismatch and loaded):
        raise ValueError(f"{folder}: these weights are of another model than its config.json: {wrong}")
    if wrong:
        warnings.warn(f"{folder}: {loaded} of {len(state)} tensors are loaded: {wrong}", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is lacking is the same every time; diffusers leaves it as memory was
            model = kind.from_config(kind.load_config(folder))
        model.load_state_dict({name: t for name, t in state.items() if name not in lacking}, strict=False)
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{folder}: {len(broken)} of its tensors have non-finite values ({broken[0]}, ...)")
    return DiffusersAutoencoder(model).eval()


def check_parameters(outline: nn.Module, stored: int) -> None:
    """Check that a network on the meta device has no more parameters than its weights have bytes.

    Raises:
        ValueError: it has.
    """
    parameters = count_parameters(outline)
    if stored and parameters > stored:
        raise ValueError(f"weights of another model: its config has {parameters:,} parameters, they {stored:,} bytes")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' notes on configs and weights; whatever matters is checked here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
