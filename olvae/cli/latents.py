"""Run ``olvae latents``: describe the distribution of latents."""

import json
from typing import Annotated

import typer

from olvae.cli.evaluate import (
    EvaluateBatchSize,
    First,
    Out,
    Targets,
    TestImages,
    WeightsDir,
    results_folder,
)
from olvae.cli.options import (
    AllowMismatch,
    ConfigFile,
    Device,
    ProgressBar,
    Raw,
    check_applies,
    check_paths,
    loading,
    with_progress,
)
from olvae.data.places import place_of
from olvae.files import no_empty_folders, remove_partials, write_json


def command(
    targets: Targets,
    config: ConfigFile = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    data: TestImages = None,
    batch_size: EvaluateBatchSize = None,
    images: First = None,
    device: Device = None,
    ifid: Annotated[
        bool, typer.Option("--ifid", help="Add iFID: FID of images decoded between two latents.")
    ] = False,
    weights_dir: WeightsDir = None,
    out: Out = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print the report to standard output.")
    ] = False,
) -> None:
    """Compare the latents of one or several models, on the same images, with N(0, I).

    Reports histogram, moments, KL and activity per channel, MMD, and the shift and scaling factors
    that a diffusion config needs. Under torchrun, processes share the images. What the numbers
    mean: https://open-litevae.github.io/open-litevae/latents/

    Example: olvae latents demo --data photos --images 1000 --out report
    """
    check_paths(*targets, data=data)
    check_applies("--weights-dir", weights_dir is not None, "--ifid", ifid)
    with loading():
        from olvae.checkpoint import tensors_sum
        from olvae.devices import resolve_device
        from olvae.evaluation.latent_report import (
            draw_distribution,
            encode_latents,
            print_latents,
            report_latents,
        )
        from olvae.evaluation.observers.enlarged import ShrunkAgain
        from olvae.evaluation.observers.ifid import InterpolatedFID
        from olvae.evaluation.observers.observer import Observer, Subject
        from olvae.evaluation.round_trip import open_images_for
        from olvae.evaluation.runner import is_examined
        from olvae.launcher import together
        from olvae.models.loading.targets import find_target, name_apart
        from olvae.modules.moments import FEW_IMAGES

    # Models, what iFID needs of them if asked for, and images that all of them can encode.
    with together():
        found = [
            find_target(target, config, raw=raw, allow_mismatch=allow_mismatch)
            for target in targets
        ]
        folder = results_folder(out, targets[0], found[0].run, data)
        device = resolve_device(device)
        models = {target.name: target.load() for target in name_apart(found)}
        observer = InterpolatedFID(weights_dir) if ifid else Observer()
        # Here images are encoded whole: what a decoder at 2x makes is compared at their size.
        shrunk = {name: ShrunkAgain(model) for name, model in models.items()}
        subjects = observer.derive({name: Subject(model) for name, model in shrunk.items()})
        source = open_images_for(shrunk, found[0].config, data)
        if images is not None:
            source.limit(images)

        # Encode; processes share the images, and the first one has the result.
        if batch_size is None and data:
            batch_size = 8
        batches = source.test_loader(batch_size)
        shown = with_progress("encoding", batches, source.val_images)
        accumulators = encode_latents(models, shown, device, source.pixel_range, observer)
        batches.read_errors.share()
    if accumulators is None:
        return

    # Compute the report; without iFID if that fails.
    if not is_examined(observer, subjects, source, device):
        observer = Observer()
    about = {
        "source": data or place_of(found[0].config["data"]),
        "images": source.describe_val_images(),
        "size": source.size.node,
    }
    with ProgressBar("comparing with N(0, I)", len(models), unit="models") as bar:
        sums = {name: tensors_sum(model.state_dict()) for name, model in models.items()}
        content = report_latents(accumulators, sums, observer, about, bar.advance)

    # Write and print it.
    with no_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.glob(".partial-*"), idle_s=1.0)
        write_json(content, folder / "latents.json")
        rows = {row["target"]: row for row in content["results"]}
        draw_distribution(rows, folder / "latents.png")
    print_latents(content, observer)
    n = content["data"]["n"]
    if n < FEW_IMAGES:
        typer.echo(
            f"warning: factors of few images, {n}: measure them on {FEW_IMAGES} or more, with "
            "--data",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    typer.echo(f"numbers: {folder / 'latents.json'}\nfigure:  {folder / 'latents.png'}", err=True)
