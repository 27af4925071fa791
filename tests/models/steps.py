"""Small trainings through Lightning, and what they did to weights and optimizers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from olvae.data.picture_folder import FolderSource
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config

PATCHGAN = {
    "target": "olvae.modules.patchgan.PatchGAN",
    "params": {"base_channels": 4, "n_layers": 1},
}
UNETGAN = {
    "target": "olvae.modules.unetgan.UNetGAN",
    "params": {"base_channels": 2, "image_size": 128},
}


def against(discriminator: dict = PATCHGAN, **params) -> dict:
    """An adversary_config."""
    node = {"discriminator_config": discriminator, **params}
    return {"target": "olvae.models.adversary.Adversary", "params": node}


def objective(**params) -> dict:
    """A lossconfig, without LPIPS, whose network is a download."""
    return {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, **params}}


WITHOUT_KL = objective(kl_weight=0)


def shallow() -> dict[str, Any]:
    """The tiny encoder and decoder with one level each: half of the operations."""
    params = tiny_config()["model"]["params"]
    params["encoder_config"]["params"]["dct_levels"] = 1
    params["decoder_config"]["params"]["channel_mult"] = [1, 1]
    return {name: params[name] for name in ("encoder_config", "decoder_config")}


SHALLOW = shallow()


def build_shallow(adversary: dict | None = None, **model) -> LiteAutoencoderKL:
    """As :func:`build`, of shallow networks."""
    return build(adversary, **SHALLOW, **model)


def build(adversary: dict | None = None, **model) -> LiteAutoencoderKL:
    """The autoencoder starts from the same weights with and without an adversary."""
    torch.manual_seed(0)
    return LiteAutoencoderKL(**tiny_config(adversary_config=adversary, **model)["model"]["params"])


def source(root: Path, batch_size: int = 4, size: int = 16) -> FolderSource:
    return FolderSource(str(root), size, batch_size, val_fraction=0.2)


def trainer(steps: int, **settings) -> pl.Trainer:
    """A trainer that writes and shows nothing."""
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "log_every_n_steps": 1, **quiet, **settings}
    )


def fit(
    model: LiteAutoencoderKL,
    root: Path,
    steps: int,
    batch_size: int = 4,
    size: int = 16,
    **settings,
) -> LiteAutoencoderKL:
    """Train, and log the last step alone, because that takes longer than the networks."""
    settings = {"log_every_n_steps": steps, **settings}
    trainer(steps, limit_val_batches=0, **settings).fit(
        model, source(root, batch_size, size).train_loader()
    )
    return model


def kept(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    assert out is not None
    return sum(size for size, _ in seen.values())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def metrics(model: LiteAutoencoderKL) -> dict[str, float]:
    return {name: float(value) for name, value in model.trainer.callback_metrics.items()}


def norm(gradients: list[Tensor]) -> float:
    return torch.stack([g.double().norm() for g in gradients]).norm().item()


class Each(pl.Callback):
    """Calls a function after every batch."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.look(pl_module)


@dataclass
class Update:
    """An update as Adam sees it."""

    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    lr: float
    betas: tuple[float, float]


class Updates(list[Update]):
    def of(self, module: nn.Module) -> "Updates":
        """Those of a module's parameters."""
        own = {id(p) for p in module.parameters()}
        return Updates(u for u in self if any(id(p) in own for p in u.parameters))
