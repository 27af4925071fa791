"""``olvae app``."""

from typing import Annotated

import typer

from olvae.cli.evaluate import Targets
from olvae.cli.options import Device, check_paths, loading


def command(
    targets: Targets,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 7860,
) -> None:
    """Look at autoencoders in a browser: drop an image, compare reconstructions under a slider, error, latent, pixels.

    Needs open-litevae[app]. Serves this machine only, unless --host says otherwise; asks nothing of the network.

    Example: olvae app olvae:photos-f8c12

    Example: olvae app runs/*_demo_32 diffusers:stabilityai/sd-vae-ft-mse --port 0
    """
    from importlib.util import find_spec

    from olvae.config import ConfigError

    if find_spec("gradio") is None:
        raise ConfigError("olvae app needs Gradio: pip install 'open-litevae[app]'")
    check_paths(*targets)
    with loading():
        from olvae.app.gradio_page import page
        from olvae.devices import resolve_device

    blocks = page(targets, resolve_device(device))
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port or None,
        max_file_size="50mb",
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    typer.echo(f"serving at {address}; Ctrl-C stops it", err=True)
    blocks.block_thread()
