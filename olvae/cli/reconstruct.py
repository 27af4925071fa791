"""Run ``olvae reconstruct`` and ``olvae app``: look at reconstructions in files or a browser."""

import importlib.util
import socket
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.evaluate import Targets
from olvae.cli.options import (
    AllowMismatch,
    ConfigFile,
    Device,
    ProgressBar,
    Raw,
    TargetArgument,
    check_applies,
    check_paths,
    check_precision,
    in_flags,
    loading,
    memory_option,
)
from olvae.config import ConfigError
from olvae.files import check_folder, legible, reason


def command(
    target: TargetArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Images or volumes, or folders of them.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for NAME.png and NAME_compare.png.")
    ] = Path("reconstructions"),
    config: ConfigFile = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    precision: Annotated[
        str, typer.Option(callback=check_precision, help="32, tf32, bf16 or fp16.")
    ] = "32",
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GiB",
            callback=memory_option,
            help="Memory for activations, besides images and weights; by default half of a GPU's "
            "free memory, or 1 on the CPU. Tiles do not change the result.",
        ),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Decode a sample of the posterior, not its mode.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Seed of --sample, the same for every image; 0 by default."
        ),
    ] = None,
) -> None:
    """Reconstruct images of any size; write each result, and input, output and error side by side.

    The picture of the three, NAME_compare.png, has the PSNR in it. A volume (NIfTI, DICOM, NRRD) is
    written in its own format, with its geometry and units.

    Example: olvae reconstruct olvae:photos-f8c12 photo.jpg

    Example: olvae reconstruct demo photo.jpg photos/ --out reconstructions
    """
    check_applies("--seed", seed is not None, "--sample", sample)
    check_paths(target)
    with loading():
        import torch

        from olvae.data.volumes.volume import ACQUIRED
        from olvae.devices import precision_name, resolve_device
        from olvae.export.reconstruction import ReconstructOptions, plan_outputs, reconstruct_files
        from olvae.models.autoencoder import LiteVAE
        from olvae.models.large.tiling import GIB, default_memory
        from olvae.models.loading.targets import find_target
        from olvae.runs import entry_of

    # What can be refused before weights are read, and where results go.
    check_folder(out)
    where = torch.device(resolve_device(device))
    found = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch)
    places = plan_outputs(images, out)

    # The autoencoder; only a LiteVAE can be computed in parts.
    model = found.load().to(where).fold()
    if memory is not None and not isinstance(model, LiteVAE):
        raise ConfigError(f"--memory: {found.name} is always computed whole: leave it out")
    budget = default_memory(where) if memory is None else int(memory * GIB)
    noise = None
    if sample:
        noise = seed or 0
    axis = entry_of(found.config, "data.params.axis") or ACQUIRED
    options = ReconstructOptions(where, budget, noise, precision_name(precision), axis)

    # Reconstruct; images that can't be read are reported, and the exit code is 1.
    if any(place.with_name(f"{place.name}_compare.png").is_file() for place in places.values()):
        typer.echo(
            f"note: {out}: earlier results of these images are replaced; --out keeps both", err=True
        )
    with ProgressBar("reconstructing", len(places)) as bar:
        done = reconstruct_files(
            model, places, options, lambda line: bar.print(in_flags(legible(line))), bar.set
        )
    if done:
        typer.echo(f"{done} of {len(places)} reconstructed by {found.name}: {out}", err=True)
    if done < len(places):
        raise typer.Exit(1)


def app_command(
    targets: Targets,
    device: Device = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")
    ] = 7860,
) -> None:
    """Look at autoencoders in a browser: drop an image, compare reconstructions, error, latents.

    Needs Gradio (pip install gradio). Serves this machine only, unless --host says otherwise; asks
    nothing of the network.

    Example: olvae app olvae:photos-f8c12

    Example: olvae app demo diffusers:stabilityai/sd-vae-ft-mse --port 0
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("olvae app needs Gradio: pip install gradio")
    check_paths(*targets)

    # Whether the address is free, before anything slow is imported. As servers do, take one whose
    # server has just ended.
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: can't be served on: {reason(error)}"
        ) from error

    # Load the autoencoders and serve the page until Ctrl-C.
    with loading():
        from olvae.app import page
        from olvae.devices import resolve_device

    blocks = page(targets, resolve_device(device))
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port or None,
        max_file_size="50mb",
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    typer.echo(f"serving at {url}; Ctrl-C stops it", err=True)
    blocks.block_thread()
