"""``olvae train``."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import PREEMPTED, STOPPED, check_paths, end_on, loading

__all__ = ["command"]


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, which override all files.")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(
            "--base", "-b", metavar="CFG [CFG ...]", help="Config files or recipes; later ones override earlier ones."
        ),
    ] = None,
    logdir: Annotated[Path, typer.Option(help="The folder to create the run folder in.")] = Path("runs"),
    precision: Annotated[
        str | None, typer.Option(metavar="{32,16,bf16}", help="Floating-point precision; 32 by default.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="N_OR_LIST", help="The number of GPUs, or a list: 2, or 0,3. 0 is the CPU.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed of weights, data order and noise; 0 by default.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name; by default the first config file's.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Continue a run in its own folder.")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --resume: other data, networks or losses than the run's own.")
    ] = False,
    actual_resume: Annotated[
        Path | None,
        typer.Option("--actual_resume", "--actual-resume", metavar="CKPT", help="Start a new run from weights."),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TARGET",
            help="Start from an autoencoder that exists, with its networks: diffusers:ID_OR_FOLDER, a file, a run.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Learn the latents of this autoencoder, as in distil/both.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after this time with a checkpoint, and exit with 75: 3h50m, 45m, 2d."),
    ] = None,
) -> None:
    """Train an autoencoder.

    Example: olvae train --base demo --gpus 0 lightning.trainer.max_steps=100

    Example: olvae train --base finetune/sdxl --from diffusers:stabilityai/sdxl-vae data.params.root=photos
    """
    end_on(signal.SIGUSR1)
    from olvae.config import ConfigError, check, load
    from olvae.runs import open_run

    if resume is not None:
        open_run(resume)
    elif not base:
        raise ConfigError("--base names the config to train, as in --base demo")
    config = load(base or (), overrides or (), resolve=resume is None)
    check_paths(*(target for target in (start_from, teacher) if target is not None))
    if resume is None and start_from is None and teacher is None:
        check(config)
    with loading():
        from olvae.allocator import keep_freed_memory
        from olvae.devices import local_rank
        from olvae.training.run import TrainOptions, train
        from olvae.training.stopping import TrainingStopped

    keep_freed_memory()
    options = TrainOptions(
        base=base or (),
        overrides=overrides or (),
        logdir=logdir,
        name=name,
        precision=precision,
        gpus=gpus,
        seed=seed,
        resume=resume,
        actual_resume=actual_resume,
        start_from=start_from,
        teacher=teacher,
        allow_changes=allow_changes,
        time_limit=time_limit,
    )
    try:
        train(options)
    except TrainingStopped as stopped:
        # Only the first process of a machine reports it: if another one failed, torchrun would kill the first while it
        # draws the curves.
        sys.exit(0 if local_rank() else PREEMPTED if stopped.preempted else STOPPED)
