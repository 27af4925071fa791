"""Run ``olvae train``: train from config files, or continue a run."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import (
    PREEMPTED,
    STOPPED,
    check_paths,
    end_on,
    ignore_echoes,
    loading,
    shell_word,
)
from olvae.files import SIGNALS, unread_output


@unread_output()
def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings, which override all files."),
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(
            "--base",
            "-b",
            metavar="CFG [CFG ...]",
            help="Config files or recipes; later ones override earlier ones.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Images to train on: a folder, shards, a list, a data set; sets data.params.root.",
        ),
    ] = None,
    logdir: Annotated[Path, typer.Option(help="The folder to create the run folder in.")] = Path(
        "runs"
    ),
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="{32,tf32,bf16,fp16}", help="Floating-point precision; 32 by default."
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N_OR_LIST", help="The number of GPUs, or a list: 2, or 0,3. 0 is the CPU."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="The seed of weights, data order and noise; 0 by default."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The run's name; by default the first config file's.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue a run in its own folder.")
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="With --resume: allow other data, networks or losses than the run's.",
        ),
    ] = False,
    actual_resume: Annotated[
        Path | None,
        typer.Option(
            "--actual_resume",
            "--actual-resume",
            metavar="CKPT",
            help="Start a new run from weights.",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TARGET",
            help="Start from an existing autoencoder, with its networks: diffusers:ID_OR_FOLDER, a "
            "file, a run; or from a vision encoder, timm:NAME.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="Learn the latents of this autoencoder, as in distil/both."
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop after this time with a checkpoint, and exit with 75: 3h50m, 45m, 2d.",
        ),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT",
            help="Log to this project of Weights & Biases too; needs pip install wandb.",
        ),
    ] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Trace N steps into trace.json and trace.txt of the run."
        ),
    ] = None,
) -> None:
    """Train an autoencoder.

    Example: olvae train --base folder --data photos

    Example: olvae train --base finetune/sdxl --from diffusers:stabilityai/sdxl-vae --data photos
    """
    # The flags that are given: nothing else is a local variable yet.
    given = {name: value for name, value in locals().items() if value is not None}
    end_on(*SIGNALS)
    check_paths(data=data)

    # Read the config, and find its mistakes, before anything slow is imported.
    from olvae.training.settings import TrainOptions, read_plan

    plan = read_plan(TrainOptions(**given))
    with loading():
        from olvae.devices import keep_freed_memory
        from olvae.launcher import local_rank
        from olvae.training.processes import is_first
        from olvae.training.run import ProcessDiedError, TrainingStopped, train

    # Train; a run that ends early says how to continue.
    keep_freed_memory()
    try:
        run = train(plan)
    except TrainingStopped as stopped:
        # The first process of a machine reports the stop: torchrun kills the others when one exits
        # with an error, and the first one is the last to end.
        code = PREEMPTED if stopped.preempted else STOPPED
        if local_rank():
            code = 0
        # An echo of the signal would change the exit code, while Python ends as well.
        ignore_echoes(code)
        if is_first():
            typer.echo(
                f"continue with: olvae train --resume {shell_word(stopped.run.path)}", err=True
            )
        sys.exit(code)
    except ProcessDiedError as died:
        if not died.run.newest_checkpoint.is_file():
            raise
        raise ChildProcessError(
            f"{died}; continue with: olvae train --resume {shell_word(died.run.path)}"
        ) from died

    if is_first():
        path = shell_word(run.path)
        typer.echo(f"next: olvae evaluate --baselines {path}  (numbers and a report)", err=True)
        typer.echo(f"  or: olvae reconstruct {path} PHOTO  (pictures)", err=True)
