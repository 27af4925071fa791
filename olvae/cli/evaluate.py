"""``olvae evaluate``, and ``python scripts/compute_metrics.py``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Run folders, checkpoints, exports, ids of the Hugging Face hub, diffusers:ID_OR_FOLDER.",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="CFG", help="The config of a checkpoint; a run folder has its own.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="Images at a time; by default the config's.")
    ] = None,
    metrics: Annotated[str, typer.Option(metavar="LIST", help="Which metrics: psnr, ssim.")] = "psnr,ssim",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add the untrained first target, and bicubic by its factor.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go; by default the first target, if it is a run."),
    ] = None,
) -> None:
    """Evaluate reconstructions of the test images of a run's data source; several targets give one table.

    All targets see the same images: those of the first one's data source.

    Example: python scripts/compute_metrics.py -B 16 runs/2026-01-31T12-00-00_demo_32
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from olvae import config as cfg
    from olvae.config import ConfigError
    from olvae.evaluation.evaluator import METRICS, autoencoder_reconstruction, bicubic_reconstruction, evaluate
    from olvae.evaluation.protocol import Protocol
    from olvae.evaluation.report import print_results, write_figure, write_metrics
    from olvae.evaluation.targets import find_target, name_apart

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ConfigError(f"--metrics {metrics}: choose from {', '.join(METRICS)}")
    found = name_apart([find_target(target, config) for target in targets])
    first = found[0]
    if "data" not in first.config:
        raise ConfigError(f"{targets[0]}: its config has no data to evaluate on")
    if out is None and first.run is None:
        raise ConfigError("--out DIR says where the results go: the first target is not a run folder")
    source = cfg.instantiate(first.config["data"])
    folder = out or Path(targets[0])
    folder.mkdir(parents=True, exist_ok=True)

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    contenders = {target.name: autoencoder_reconstruction(target.load(), device) for target in found}
    if baselines:
        untrained = first.untrained()
        contenders[f"bicubic, {untrained.downscale}x smaller and back"] = bicubic_reconstruction(untrained.downscale)
        contenders["untrained"] = autoencoder_reconstruction(untrained, device)
    loader = source.test_loader(batch_size)
    count = source.count("test") or 1
    examples = {round(i * (count - 1) / 7) for i in range(8)}  # spread over the set
    batches = track(loader, description="evaluating", console=Console(stderr=True), transient=True)
    inputs, results = evaluate(contenders, batches, names, examples)

    protocol = Protocol(images=source.test_images, size=source.size)
    write_metrics(results, protocol, folder / "metrics.json")
    write_figure(inputs, results, folder / "reconstructions.png")
    print_results(results, protocol)
    typer.echo(f"numbers: {folder / 'metrics.json'}\nfigure:  {folder / 'reconstructions.png'}", err=True)
