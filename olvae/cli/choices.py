"""What flags can be, checked while the command line is read: a wrong one is told before torch is imported.

The registries that know these names import torch. tests/cli/test_choices.py holds the two together.
"""

import re
from collections.abc import Callable, Sequence

import typer

__all__ = [
    "DTYPES",
    "LATENT_FORMATS",
    "METRICS",
    "PICTURES",
    "POSTERIORS",
    "PRECISIONS",
    "PROTOCOLS",
    "SYNONYMS",
    "among",
    "check_device",
    "split",
]

Check = Callable[[typer.CallbackParam, str | None], str | None]

METRICS = ("psnr", "ssim", "ssim_uniform", "ms_ssim", "l1", "lpips", "lpips_alex", "rfid", "kid")
PROTOCOLS = ("open-litevae", "latent-diffusion", "dc-ae", "llamagen", "va-vae")
PRECISIONS = ("fp16", "bf16", "32")
SYNONYMS = ("16", "float16", "bfloat16", "float32")
DTYPES = ("float16", "bfloat16", "float32")
LATENT_FORMATS = ("shards", "lightningdit", "kohya-sd", "kohya-sdxl", "kohya-sd3", "kohya-flux")
PICTURES = ("png", "jpg")
POSTERIORS = ("mode", "sample")


def among(names: Sequence[str], several: bool = False, also: Sequence[str] = ()) -> Check:
    """For ``typer.Option(callback=...)``: the value has to be one of the names.

    Args:
        several: or a list of them with commas.
        also: accepted too, and not told.
    """

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        from olvae.config import ConfigError

        if value is None:
            return None
        given = split(value) if several else [value]
        if not given or not {*given} <= {*names, *also}:
            raise ConfigError(f"{param.opts[0]} {value}: choose from {', '.join(names)}")
        return value

    return check


def split(text: str) -> list[str]:
    """The names of a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def check_device(param: typer.CallbackParam, value: str | None) -> str | None:
    """For ``typer.Option(callback=...)``: whether the machine has the device is known later."""
    from olvae.config import ConfigError

    if value is not None and not re.fullmatch(r"cpu(:0)?|cuda(:\d+)?", value):
        raise ConfigError(f"{param.opts[0]} {value}: choose cpu, cuda, or cuda:N")
    return value
