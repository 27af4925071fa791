"""Encoders and decoders beside Stable Diffusion's, in one run: images per second, and memory."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pywt
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from olvae.models.large.memory import peak_bytes
from olvae.modules.base import count_macs, count_parameters
from olvae.modules.discriminators.gigagan import GigaGAN
from olvae.modules.discriminators.patchgan import PatchGAN
from olvae.modules.discriminators.unetgan import UNetGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.wavelet import dwt2

__all__ = ["DECODERS", "ENCODERS", "NetworkRow", "bench_dwt", "bench_networks", "network_table", "print_table"]


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


PYWAVELETS = "PyWavelets"


def bench_dwt(batch_size: int, size: int, wavelet: str, device: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Time one level of the transform of RGB images, in turns; float32.

    PyWavelets runs on the CPU whatever the device. The convolution has the same filters, four outputs per channel and
    stride 2, and stands for what one would write without a library; it is there for Haar only.

    Returns:
        For each name, images_per_s, ratio (to PyWavelets), and max_difference from its coefficients.
    """
    x = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    on_device = x.to(device)
    contenders: dict[str, Callable[[], Tensor]] = {
        PYWAVELETS: lambda: _pywavelets(x, wavelet),
        "olvae.modules.wavelet.dwt2": lambda: dwt2(on_device, wavelet),
    }
    if wavelet == "haar":
        filters = _haar_filters().to(device)
        contenders["strided convolution"] = lambda: _convolution(on_device, filters)
    expected = _pywavelets(x, wavelet)
    best = dict.fromkeys(contenders, float("inf"))
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if device != "cpu":
                    torch.cuda.synchronize(device)
                if turn:
                    best[name] = min(best[name], time.perf_counter() - start)
        differences = {name: float((run().cpu() - expected).abs().max()) for name, run in contenders.items()}
    return [
        {
            "name": name,
            "images_per_s": batch_size / best[name],
            "ratio": best[PYWAVELETS] / best[name],
            "max_difference": differences[name],
        }
        for name in contenders
    ]


def _pywavelets(x: Tensor, wavelet: str) -> Tensor:
    ll, (height, width, diagonal) = pywt.dwt2(x.numpy(), wavelet, mode="periodization")
    return torch.cat([torch.from_numpy(band) for band in (ll, width, height, diagonal)], dim=1)  # (B, 4C, H/2, W/2)


def _haar_filters() -> Tensor:
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    bands = torch.tensor(signs, dtype=torch.float32).reshape(4, 1, 2, 2) / 2.0
    return bands.repeat(3, 1, 1, 1)  # (12, 1, 2, 2), four for each channel


def _convolution(x: Tensor, filters: Tensor) -> Tensor:
    bands: Tensor = F.conv2d(x, filters, stride=2, groups=3)  # (B, 12, H/2, W/2), channel by channel
    ordered: Tensor = bands.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)  # band by band
    return ordered


IMAGE = (1, 3, 256, 256)


class NetworkRow(NamedTuple):
    """One network; numbers of parameters, and multiply-accumulates of one 256x256 image."""

    group: str
    variant: str
    name: str
    params: int
    macs: int
    published_params: float | None
    published_macs: float | None


class _Published(NamedTuple):
    group: str
    variant: str
    name: str
    params: float | None
    macs: float | None
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]


def _published() -> Iterator[_Published]:
    """What is counted. The README's encoders have latent_dim = n_z = 12, as the published YAML gives it [M]; the
    paper's give 2 n_z moments of n_z = 4; the Stable Diffusion networks n_z = 4; the other decoders take 12."""
    for name, params, macs in (("S", 0.97, 5.5), ("B", 6.6, 37.4), ("M", 34.0, 234.9), ("L", 41.15, 242.1)):  # [R]
        yield _Published(
            "encoder",
            "open_litevae",
            name,
            params * 1e6,
            macs * 1e9,
            lambda name=name: LiteVAE_Encoder(latent_dim=12, scale=name),  # type: ignore[misc]
            IMAGE,
        )
    for name, params in (("S", 1.03), ("B", 6.75), ("M", 32.75), ("L", 41.42)):  # [P]
        yield _Published(
            "encoder",
            "paper",
            name,
            params * 1e6,
            None,
            lambda name=name: LiteVAE_Encoder(latent_dim=8, scale=name, variant="paper"),  # type: ignore[misc]
            IMAGE,
        )
    yield _Published("encoder", "sd", "sd", 34.16e6, 137e9, lambda: SDEncoder(latent_dim=8), IMAGE)  # [R]
    yield _Published("decoder", "open_litevae", "open_litevae", 53.33e6, 324e9, LiteVAE_Decoder, (1, 12, 32, 32))
    yield _Published(
        "decoder",
        "paper_smc",
        "paper_smc",
        48.46e6,
        None,
        lambda: LiteVAE_Decoder(variant="paper_smc"),
        (1, 12, 32, 32),
    )
    yield _Published("decoder", "sd", "sd", 49.49e6, 312e9, lambda: SDDecoder(z_channels=4), (1, 4, 32, 32))  # [R]
    yield _Published("discriminator", "patchgan", "PatchGAN", 2.77e6, 3.15e9, PatchGAN, IMAGE)  # [R]
    yield _Published("discriminator", "gigagan", "GigaGAN", 14.38e6, 3.23e9, GigaGAN, IMAGE)  # [R]
    for name, base, params, macs in (("S", 16, 2.75, 2.31), ("M", 32, 11.0, 9.13), ("L", 64, 44.1, 36.34)):  # [R]
        yield _Published(
            "discriminator",
            "unetgan",
            f"UNetGAN-{name}",
            params * 1e6,
            macs * 1e9,
            lambda base=base: UNetGAN(base_channels=base),  # type: ignore[misc]
            IMAGE,
        )


def network_table() -> list[NetworkRow]:
    """Count every network of the tables, on the meta device: seconds, and no memory."""
    rows: list[NetworkRow] = []
    for entry in _published():
        with torch.device("meta"):
            network = entry.build()
        rows.append(
            NetworkRow(
                entry.group,
                entry.variant,
                entry.name,
                count_parameters(network),
                count_macs(network, *entry.shape),
                entry.params,
                entry.macs,
            )
        )
    return rows


def print_table(rows: list[NetworkRow]) -> None:
    """The rows as a table on standard output."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Networks at 256x256: counted now, and as published",
    )
    for heading in ("group", "variant", "name"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M\nparams", "pub-\nlished", "\nGMACs", "pub-\nlished"):
        table.add_column(heading, justify="right")
    group = ""
    for row in rows:
        if row.group != group and group:
            table.add_section()
        group = row.group
        table.add_row(
            row.group,
            row.variant,
            row.name,
            f"{row.params / 1e6:.4f}",
            "-" if row.published_params is None else f"{row.published_params / 1e6:.2f}",
            f"{row.macs / 1e9:.2f}",
            "-" if row.published_macs is None else f"{row.published_macs / 1e9:.1f}",
        )
    Console().print(table)
