"""``olvae evaluate``, and ``python scripts/compute_metrics.py``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run folder, or a checkpoint with --config.")],
    config: Annotated[
        Path | None, typer.Option(metavar="CFG", help="The config of a checkpoint; a run folder has its own.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="Images at a time; by default the config's.")
    ] = None,
    metrics: Annotated[str, typer.Option(metavar="LIST", help="Which metrics: psnr, ssim.")] = "psnr,ssim",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add the untrained model, and bicubic down and up by the same factor.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where metrics.json and the figure go; by default the run folder."),
    ] = None,
) -> None:
    """Evaluate reconstructions of the test images of a run's data source.

    Example: python scripts/compute_metrics.py -B 16 runs/2026-01-31T12-00-00_demo_32
    """
    from olvae import config as cfg
    from olvae.config import ConfigError
    from olvae.evaluation.evaluator import METRICS, autoencoder_reconstruction, bicubic_reconstruction, evaluate
    from olvae.evaluation.protocol import Protocol
    from olvae.evaluation.report import print_results, write_figure, write_metrics
    from olvae.evaluation.targets import find_target

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ConfigError(f"--metrics {metrics}: choose from {', '.join(METRICS)}")
    found = find_target(target, config)
    if "data" not in found.config:
        raise ConfigError(f"{target}: its config has no data to evaluate on")
    if out is None and found.run is None:
        raise ConfigError("--out DIR says where the results of a checkpoint go")
    node = found.config["data"]
    if batch_size is not None:
        node = {**node, "params": {**node["params"], "batch_size": batch_size}}
    source = cfg.instantiate(node)
    model = found.load()

    contenders = {found.run.path.name if found.run else str(target): autoencoder_reconstruction(model)}
    if baselines:
        contenders[f"bicubic, {model.downscale}x smaller and back"] = bicubic_reconstruction(model.downscale)
        contenders["untrained"] = autoencoder_reconstruction(found.untrained())
    count = len(source.test_loader().dataset)
    examples = {round(i * (count - 1) / 7) for i in range(8)}  # spread over the set
    results = [evaluate(name, run, source.test_loader(), names, examples) for name, run in contenders.items()]

    protocol = Protocol(size=source.size)
    folder = out or target
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(results, protocol, folder / "metrics.json")
    inputs = evaluate("input", lambda x: x, source.test_loader(), [], examples).examples
    write_figure(inputs, results, folder / "reconstructions.png")
    print_results(results, protocol)
    typer.echo(f"numbers: {folder / 'metrics.json'}\nfigure:  {folder / 'reconstructions.png'}", err=True)
