"""The README's tables of networks, counted now, beside what was published."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from olvae.modules.basicgan.patchgan import PatchGAN
from olvae.modules.counting import count_macs, count_parameters
from olvae.modules.gigagan.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan.unetgan import UNetGAN

__all__ = ["NetworkRow", "network_table", "print_table"]

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
