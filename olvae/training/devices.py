"""From the flags --precision and --gpus to what Lightning takes."""

from collections.abc import Mapping
from typing import Any

import torch

from olvae.config import ConfigError

__all__ = ["resolve_devices", "resolve_precision"]

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def resolve_precision(precision: str, accelerator: str) -> str:
    """Lightning's name for 32, 16 or bf16.

    Raises:
        ConfigError: it is none of them, or 16 without a GPU.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision == "16" and accelerator == "cpu":
        raise ConfigError("--precision 16: half precision with loss scaling needs a GPU: use bf16 or 32 on the CPU")
    return PRECISIONS[precision]


def resolve_devices(gpus: str | None, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """``accelerator`` and ``devices``: 0 is the CPU (as many processes as lightning.trainer.devices
    says, if its accelerator is cpu), N the first N GPUs, "0,2" a list of them.

    Without the flag it is what lightning.trainer says, then every GPU that there is, then the CPU.

    Raises:
        ConfigError: a GPU that is not there.
    """
    there = torch.cuda.device_count()
    on_cpu = trainer.get("accelerator") == "cpu"
    if gpus is None:
        accelerator = trainer.get("accelerator", "auto")
        if accelerator == "auto":
            if not there:
                return {"accelerator": "cpu", "devices": 1}
            accelerator = "cuda"
        if accelerator in ("cuda", "gpu") and not there:
            raise ConfigError(f"lightning.trainer.accelerator: {accelerator}: this machine has no GPU; cpu is the CPU")
        devices = trainer.get("devices", "auto")
        if devices in ("auto", -1, "-1"):
            devices = there if accelerator in ("cuda", "gpu") else 1
        if isinstance(devices, str):
            devices = [int(part) for part in devices.split(",") if part] if "," in devices else int(devices)
        return {"accelerator": accelerator, "devices": devices}
    try:
        wanted = [int(part) for part in gpus.split(",") if part.strip()]
    except ValueError:
        wanted = []
    if not wanted or min(wanted) < 0:
        raise ConfigError(f"--gpus {gpus}: give a number of GPUs, as in 2, or a list, as in 0,2; 0 is the CPU")
    if "," not in gpus:
        if wanted[0] == 0:
            return {"accelerator": "cpu", "devices": trainer.get("devices", 1) if on_cpu else 1}
        wanted = list(range(wanted[0]))
    missing = [gpu for gpu in wanted if gpu >= there]
    if missing:
        has = f"this machine has {there} GPU{'' if there == 1 else 's'}" if there else "this machine has no GPU"
        raise ConfigError(f"--gpus {gpus}: {has}; --gpus 0 is the CPU")
    return {"accelerator": "cuda", "devices": wanted}
