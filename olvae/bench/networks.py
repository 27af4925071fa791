"""Encoders and decoders beside Stable Diffusion's, in one run: images per second, and memory."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from olvae.models.memory import peak_bytes
from olvae.modules.counting import count_parameters
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.sdvae import SDDecoder, SDEncoder

__all__ = ["DECODERS", "ENCODERS", "bench_networks"]

LATENT, FACTOR = 12, 8
PEER = "sd"

ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    PEER: lambda: SDEncoder(latent_dim=2 * LATENT),
    **{scale: lambda scale=scale: LiteVAE_Encoder(scale=scale, latent_dim=2 * LATENT) for scale in "SBML"},  # type: ignore[misc]
}
DECODERS: Mapping[str, Callable[[], nn.Module]] = {
    PEER: lambda: SDDecoder(z_channels=LATENT),
    "open_litevae": lambda: LiteVAE_Decoder(z_channels=LATENT),
    "open_litevae, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=LATENT)),
    "paper_smc": lambda: LiteVAE_Decoder(z_channels=LATENT, variant="paper_smc"),
    "paper_smc, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=LATENT, variant="paper_smc")),
}


def bench_networks(
    networks: Mapping[str, Callable[[], nn.Module]], shape: tuple[int, int, int, int], device: str, rounds: int = 3
) -> list[dict[str, Any]]:
    """Time one forward pass of each, in turns; float32, without gradients.

    Args:
        networks: names to what builds them; the one named ``sd`` is the peer that ratios are taken from.
        shape: of the input.
        rounds: turns after one that warms up; the best counts.

    Returns:
        For each name, params, images_per_s, ratio (to the peer's images per second), and peak_memory_bytes beyond
        parameters and input: measured on a GPU, computed from shapes elsewhere.
    """
    built = {name: build().eval().to(device) for name, build in networks.items()}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    best = dict.fromkeys(built, float("inf"))
    memory = {name: _memory(network, x) for name, network in built.items()}  # on a GPU this warms up
    for turn in range(rounds + 1):
        for name, network in built.items():
            seconds = _time(network, x)
            if turn:
                best[name] = min(best[name], seconds)
    return [
        {
            "name": name,
            "params": count_parameters(network),
            "images_per_s": shape[0] / best[name],
            "ratio": best[PEER] / best[name],
            "peak_memory_bytes": memory[name],
        }
        for name, network in built.items()
    ]


@torch.inference_mode()
def _time(network: nn.Module, x: Tensor) -> float:
    _wait(x)
    start = time.perf_counter()
    network(x)
    _wait(x)
    return time.perf_counter() - start


def _memory(network: nn.Module, x: Tensor) -> int:
    if x.device.type != "cuda":
        return peak_bytes(network, lambda module, images: module(images), tuple(x.shape))
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    _time(network, x)
    return torch.cuda.max_memory_allocated(x.device) - before


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
