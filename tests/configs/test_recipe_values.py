"""Every value of every recipe in configs/imagenet/, against a table of what the sources say.

A file without a row, a value that no row has, or another value than the row's fails. The second of a pair is the
source: P, the paper (arXiv 2405.14477v2), R, open-LiteVAE's README or its author in issue 3 of its repository, M,
measured on the published modules, D, decided here because no source says.
"""

import inspect
import re
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest

from olvae.config import load, resolve_target

FOLDER = Path(__file__).parents[2] / "configs" / "imagenet"

Row = dict[str, tuple[Any, str]]

MODEL = "model.params."
ENCODER = MODEL + "encoder_config."
DECODER = MODEL + "decoder_config."
LOSS = MODEL + "lossconfig.params."
ADVERSARY = MODEL + "adversary_config."
DISCRIMINATOR = ADVERSARY + "params.discriminator_config."
TRAINER = "lightning.trainer."
SIZE, BATCH, STEPS = "data.params.size", "data.params.batch_size", TRAINER + "max_steps"


def adversary(name: str, module: str, source: str, **params: tuple[Any, str]) -> Row:
    return {
        ADVERSARY + "target": ("olvae.models.adversary.Adversary", "D: ours"),
        ADVERSARY + "params.loss": ("hinge", "D: no source; P Table 16 finds logistic equally good"),
        ADVERSARY + "params.weight": (0.1, "D: no source; it is constant by P Table 8"),
        DISCRIMINATOR + "target": (f"olvae.modules.{module}.{name}", source),
        **{f"{DISCRIMINATOR}params.{key}": value for key, value in params.items()},
    }


PATCHGAN = adversary("PatchGAN", "patchgan", "R: discriminator table")
GIGAGAN = adversary("GigaGAN", "gigagan", "R: discriminator table", image_size=(256, "R: phase B"))
UNETGAN = {
    name: adversary(
        "UNetGAN",
        "unetgan",
        "R: discriminator table; P Table 1",
        base_channels=(base, "R: discriminator table, D_ch"),
        image_size=(256, "R: phase B"),
    )
    for name, base in (("S", 16), ("M", 32), ("L", 64))
}

A2: Row = {
    "model.target": ("olvae.models.liteautoencoder.LiteAutoencoderKL", "R: published YAML"),
    "model.base_learning_rate": (1e-4, "P App. F; R issue 3"),
    MODEL + "betas": ([0.5, 0.9], "P App. F"),
    MODEL + "embed_dim": (12, "R: n_z"),
    ENCODER + "target": ("olvae.modules.litevae.encoder_model.LiteVAE_Encoder", "R: published YAML"),
    ENCODER + "params.scale": ("B", "R"),
    DECODER + "target": ("olvae.modules.litevae.decoder_model.LiteVAE_Decoder", "R: published YAML"),
    DECODER + "params.channels": (128, "R: published YAML"),
    DECODER + "params.z_channels": (12, "R: published YAML"),
    DECODER + "params.channel_mult": ([1, 2, 4, 4], "R: published YAML"),
    DECODER + "params.num_res_blocks": (2, "R: published YAML; M: three blocks per level"),
    MODEL + "lossconfig.target": ("olvae.losses.objective.Objective", "D: ours"),
    LOSS + "rec_weight": (1.0, "D: no source"),
    LOSS + "lpips_weight": (1.0, "D: no source"),
    LOSS + "kl_weight": (0.01, "R; D: per value of the image"),
    LOSS + "wavelet_weight": (1.0, "R"),
    LOSS + "gaussian_weight": (0.5, "R"),
    "data.target": ("olvae.data.shards.webdataset.WebDatasetSource", "D: ours"),
    "data.params.shards": ("data/imagenet/train", "D: ours"),
    "data.params.val_shards": ("data/imagenet/val", "D: ours"),
    "data.params.num_workers": (8, "D: ours"),
    SIZE: (128, "R: phase A"),
    BATCH: (32, "R issue 3; P App. F says 16 on two GPUs, which may be 32 or 16 in all"),
    STEPS: (100_000, "R: phase A"),
    TRAINER + "gradient_clip_val": (1.0, "D: no source"),
    TRAINER + "val_check_interval": (10_000, "D: ours"),
    TRAINER + "limit_val_batches": (100, "D: ours"),
}

B0: Row = {**A2, SIZE: (256, "R: phase B"), STEPS: (50_000, "R: phase B")}

BASELINE: Row = {
    MODEL + "use_quant": (True, "D: with both 1x1 convolutions, as Stable Diffusion's"),
    ENCODER + "target": ("olvae.modules.sdvae.SDEncoder", "P Table 2a; M: 34.16 M"),
    ENCODER + "params.latent_dim": (24, "P: 2 n_z moments"),
    DECODER + "target": ("olvae.modules.sdvae.SDDecoder", "P Table 2a; M: 49.49 M"),
    DECODER + "params.z_channels": (12, "P Table 2a: n_z"),
}
"""Over A2, whose params of the other networks go."""

LITEVAES = (
    ENCODER + "params.scale",
    *(f"{DECODER}params.{name}" for name in ("channels", "channel_mult", "num_res_blocks")),
)

PAPER: Row = {
    **A2,
    **UNETGAN["M"],
    DISCRIMINATOR + "params.base_channels": (32, "D: the paper names UNetGAN, not its size"),
    ADVERSARY + "params.start_step": (50_000, "D: half-way"),
    ENCODER + "params.variant": ("paper", "P App. G"),
    DECODER + "params.variant": ("paper_smc", "P App. G"),
    SIZE: (256, "P Table 1"),
    BATCH: (32, "P App. F, 16 on two GPUs; D: 16 each"),
    STEPS: (100_000, "P App. F: ImageNet 256"),
    LOSS + "kl_weight": (0.01, "D: the README's"),
    LOSS + "wavelet_weight": (1.0, "D: the README's"),
    LOSS + "gaussian_weight": (0.5, "D: the README's"),
}


def without(row: Row, prefixes: tuple[str, ...]) -> Row:
    return {key: value for key, value in row.items() if not key.startswith(prefixes)}


ROWS: dict[str, Row] = {
    "A1": {**A2, LOSS + "wavelet_weight": (0.1, "R"), LOSS + "gaussian_weight": (0.1, "R")},
    "A2": A2,
    "B0": B0,
    "B1": {**B0, **PATCHGAN},
    "B2": {**B0, **GIGAGAN},
    "B3": {**B0, **UNETGAN["S"]},
    "B4": {**B0, **UNETGAN["M"]},
    "B5": {**B0, **UNETGAN["L"]},
    **{f"LiteVAE-{s}": {**A2, ENCODER + "params.scale": (s, "R: encoder table")} for s in "SML"},
    "VAE": without({**A2, **BASELINE}, LITEVAES),
    "VAE_b": without({**B0, **BASELINE, **PATCHGAN}, LITEVAES),
    "large_batch": {
        **B0,
        **UNETGAN["L"],
        "model.base_learning_rate": (2.83e-4, "D: 1e-4 times the root of 8"),
        MODEL + "warmup_steps": (500, "D"),
        BATCH: (4, "D: 256 in all, on 64 GPUs"),
        STEPS: (12_500, "D: twice B5's images"),
        TRAINER + "val_check_interval": (1250, "D: ours"),
        TRAINER + "limit_val_batches": (13, "D: ours"),
        TRAINER + "devices": (8, "D: ours"),
        TRAINER + "num_nodes": (8, "D: ours"),
    },
    "paper_f8c12": PAPER,
    "paper_f8c4": {
        **PAPER,
        MODEL + "embed_dim": (4, "P Table 1: n_z"),
        DECODER + "params.z_channels": (4, "P Table 1: n_z"),
    },
    "paper_f8c12_128": {
        **PAPER,
        SIZE: (128, "P Table 2a"),
        STEPS: (200_000, "P App. F: ImageNet 128"),
        ADVERSARY + "params.start_step": (100_000, "D: half-way"),
        DISCRIMINATOR + "params.image_size": (128, "P Table 2a"),
    },
    "paper_f8c12_a": {
        **without(PAPER, (ADVERSARY,)),
        SIZE: (128, "P Table 5: 128-tuned"),
        STEPS: (100_000, "R: phase A; with phase B the 150k of 256-full, P Table 5"),
    },
    "paper_f8c12_b": {
        **PAPER,
        ADVERSARY + "params.start_step": (0, "R: phase B; D for the paper"),
        STEPS: (50_000, "R: phase B; with phase A the 150k of 256-full, P Table 5"),
    },
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "olvae.losses.objective.Objective": {"reconstruction": "l1"},  # P
    "olvae.models.adversary.Adversary": {
        "start_step": 0,  # R: phase B
        "betas": (0.5, 0.9),  # P App. F
        "adaptive_weight": False,  # P Table 8
        **dict.fromkeys(("ramp_steps", "warmup_updates", "r1_weight", "lecam_weight", "cutmix_weight"), 0),  # D
        **dict.fromkeys(("updates_per_step", "learning_rate_ratio"), 1),  # D
    },
    "olvae.modules.litevae.encoder_model.LiteVAE_Encoder": {
        "variant": "open_litevae",  # R
        "dct_levels": 3,  # R: f8
        "wavelet": "haar",  # P 4.1
        "pool": "average",  # P App. G; D: average or learned
        "shared_extractor": False,  # P Table 19
        "skip_levels": 0,  # P Table 21
    },
    "olvae.modules.litevae.decoder_model.LiteVAE_Decoder": {"variant": "open_litevae"},  # R
    "olvae.modules.patchgan.PatchGAN": {"base_channels": 64, "n_layers": 3},  # R
    "olvae.modules.gigagan.GigaGAN": {"base": 4096, "max_channels": 256, "blocks": 2, "attention": (8, 16)},  # R
    "olvae.models.liteautoencoder.LiteAutoencoderKL": {
        "use_ema": False,
        "scheduler": "constant",
        "warmup_steps": 0,  # D
    },
}
"""Arguments that decide results and that no recipe sets, except where a row has them."""


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted path; a list is a value."""
    if not isinstance(node, dict):
        return {path.removeprefix("."): node}
    return dict(ChainMap(*(leaves(value, f"{path}.{key}") for key, value in node.items())))


def test_every_recipe_has_a_row():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_its_row(name, monkeypatch):
    monkeypatch.delenv("IMAGENET", raising=False)
    found = leaves(load([FOLDER / f"{name}.yaml"]))
    assert found == {key: value for key, (value, _) in ROWS[name].items()}


@pytest.mark.parametrize("target", DEFAULTS)
def test_what_no_recipe_sets(target):
    arguments = inspect.signature(resolve_target(target)).parameters
    for name, value in DEFAULTS[target].items():
        default = arguments[name].default
        assert (tuple(default) if isinstance(default, list) else default) == value, name


def test_decisions_are_marked_where_they_stand():
    """The file that sets the weights of L1 and LPIPS, or an adversarial weight, says that no source gives them."""
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        if re.search(r"\b(lpips_weight|loss|weight): ", text):
            comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
            assert re.search(r"(No source gives|gives neither).*\[D\]", comments), path.name


ROOT = FOLDER.parents[1]
TRAINED = [
    path
    for path in sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "study").glob("*.yaml")])
    if load([path]).get("lightning")
]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: str(path.relative_to(ROOT)))
def test_gradients_are_clipped(path):
    """A loss that is large once, and finite, then moves the weights no further than any other."""
    assert load([path])["lightning"]["trainer"]["gradient_clip_val"] > 0
