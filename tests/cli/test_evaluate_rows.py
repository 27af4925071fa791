"""``olvae evaluate --cross`` and ``--precision``, which add rows to the table."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from olvae import LiteVAE
from olvae.models.loading.targets import find_target
from tests.cli.conftest import run_once
from tests.conftest import tiny
from tests.evaluation.peers import kl

PIXELS = ("--metrics", "psnr,ssim")


def rows(folder: Path, name: str = "metrics.json") -> dict[str, dict]:
    return {row["target"]: row for row in json.loads((folder / name).read_text())["results"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("peers") / "kl"
    kl().model.save_pretrained(folder)
    return f"diffusers:{folder}"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """A GroupNorm follows the scaled layer, so in float32 nothing changes."""
    torch.manual_seed(2)
    model = tiny()
    with torch.no_grad():
        model.encoder.extractors[1].mid_block[0].conv1.weight *= 1e6
    folder = tmp_path_factory.mktemp("scaled") / "scaled"
    model.save_pretrained(folder)
    return folder


class Evaluated(NamedTuple):
    folder: Path
    rows: dict[str, dict]
    err: str


def evaluated(folder: Path, *arguments: object) -> Evaluated:
    code, _, err = run_once("evaluate", *arguments, "--out", folder)
    assert code == 0, err
    return Evaluated(folder, rows(folder), err)


@pytest.fixture(scope="module")
def crossed(trained, teacher, photos, tmp_path_factory) -> Evaluated:
    """Every encoder with every decoder, by two protocols."""
    data = ("--data", photos, "--size", "32", "--images", 5, *PIXELS)
    protocols = ("--protocol", "open-litevae,latent-diffusion", "--baselines")
    folder = tmp_path_factory.mktemp("crossed")
    return evaluated(folder, teacher, trained, "--cross", *data, *protocols)


@pytest.fixture(scope="module")
def images(photos) -> Tensor:
    """The five images of :func:`crossed`, in [-1, 1]."""
    x = np.stack([crop(path) for path in sorted(photos.iterdir())[:5]])  # (N, 32, 32, 3)
    return torch.tensor(x).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def models(teacher, trained) -> list[LiteVAE]:
    return [find_target(target).load() for target in (teacher, trained)]


def names(teacher: str, student: str) -> list[str]:
    """The rows of --cross, in order."""
    mixed = (
        f"{teacher}'s encoder, {student}'s decoder",
        f"{student}'s encoder, {teacher}'s decoder",
    )
    return [teacher, student, *mixed]


def test_cross_has_a_row_for_every_encoder_with_every_decoder(
    crossed, images, models, teacher, trained
):
    found, four = crossed.rows, names(teacher, trained.name)
    assert list(found) == [*four, "bicubic, 8x smaller and back", "untrained"]
    assert [found[name]["cost"] is not None for name in four] == [True, True, False, False]
    x = to_pixels(images)
    with torch.inference_mode():
        for name, (i, j) in zip(four, ((0, 0), (1, 1), (0, 1), (1, 0)), strict=True):
            y = to_pixels(models[j].decode(models[i].encode(images).mode()))
            expected = np.mean([peak_signal_noise_ratio(p, q) for p, q in zip(x, y, strict=True)])
            assert found[name]["metrics"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_cross_measures_the_students_latents_in_deviations_of_the_teachers(
    crossed, images, models, teacher, trained
):
    with torch.inference_mode():
        first, second = (
            model.encode(images).mean.double().transpose(0, 1).flatten(1).numpy()
            for model in models
        )
    latents = crossed.rows[trained.name]["latents"]
    expected = np.sqrt(((second - first) ** 2).mean(1)) / first.std(1)
    assert latents["teacher"] == teacher
    assert latents["per_channel"] == pytest.approx(list(expected), rel=1e-4)
    assert latents["teacher_std"] == pytest.approx(list(first.std(1)), rel=1e-4)
    assert latents["rmse"] == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-4)
    assert [name for name, row in crossed.rows.items() if "latents" in row] == [trained.name]
    # The page names a run by its name alone, without the time.
    places = {
        crossed.err: trained.name,
        (crossed.folder / "metrics.md").read_text(): trained.name,
        (crossed.folder / "report.html").read_text(): "tiny",
    }
    for text, name in places.items():
        assert f"latents of {name}: RMS error {latents['rmse']:.3f} " in text


def test_cross_under_a_protocol_that_samples_has_the_same_latents(crossed, teacher, trained):
    found, sampled = crossed.rows, rows(crossed.folder, "metrics_latent-diffusion.json")
    mixed = names(teacher, trained.name)[2]
    assert sampled[trained.name]["latents"] == found[trained.name]["latents"]
    assert sampled[mixed]["metrics"]["psnr"] != found[mixed]["metrics"]["psnr"]


def to_pixels(x: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def crop(path: Path) -> np.ndarray:
    """As the protocol says: 48x40 to 38x32, then the middle."""
    picture = Image.open(path).resize((38, 32), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((3, 0, 35, 32)))


SMALL = ("--size", 16, "--images", 5, *PIXELS)
LAYER = "encoder.extractors.1.mid_block.0.conv1"


@pytest.fixture(scope="module")
def lowered(trained, overflowing, photos, tmp_path_factory) -> Evaluated:
    """A model that overflows in fp16 and one that does not, in three precisions."""
    precisions = ("--precision", "fp16,bf16,32", "--baselines")
    folder = tmp_path_factory.mktemp("precisions")
    return evaluated(folder, overflowing, trained, "--data", photos, *SMALL, *precisions)


def unsafe(found: dict[str, dict], scaled: str) -> str:
    """What is said of the row in fp16."""
    lost = found[f"{scaled}, fp16"]["precision"]["psnr_lost"]
    return f"5 of 5 images non-finite, first at {LAYER}; PSNR {-lost:+.3f} dB: not safe"


def test_precision_adds_a_row_for_each_lower_precision(lowered, overflowing, trained):
    found = lowered.rows
    targets = (overflowing.name, trained.name)
    lower = [f"{name}{end}" for name in targets for end in ("", ", fp16", ", bf16")]
    assert list(found) == [*lower, "bicubic, 8x smaller and back", "untrained"]
    assert ["precision" in row for row in found.values()] == [True] * 6 + [False] * 2


def test_precision_names_the_layer_that_overflows_in_fp16(lowered, overflowing):
    found, scaled = lowered.rows, overflowing.name
    half = found[f"{scaled}, fp16"]["precision"]
    assert half["non_finite"]["first"] == LAYER
    assert half["non_finite"]["images"] == 5
    assert not half["safe"]
    assert all(np.isfinite(value) for value in found[f"{scaled}, fp16"]["metrics"].values())
    assert half["psnr_lost"] == pytest.approx(
        found[scaled]["metrics"]["psnr"] - found[f"{scaled}, fp16"]["metrics"]["psnr"]
    )
    for name in (scaled, f"{scaled}, bf16"):
        row = found[name]["precision"]
        assert row["largest_name"] == LAYER
        assert row["largest_value"] == row["largest"]["encoder.extractors.1"] > 65504
        assert row["non_finite"] == {"images": 0, "values": 0, "first": None}
    assert found[scaled]["precision"]["safe"]


def test_precision_of_a_healthy_model_loses_little_and_is_not_timed(lowered, trained):
    found, healthy = lowered.rows, trained.name
    for name in (f"{healthy}, fp16", f"{healthy}, bf16"):
        assert found[name]["precision"]["non_finite"]["images"] == 0
        assert abs(found[name]["metrics"]["psnr"] - found[healthy]["metrics"]["psnr"]) <= 1
        assert found[name]["cost"]["encode_macs"] == found[healthy]["cost"]["encode_macs"]
        assert found[name]["cost"]["encode_images_per_s"] is None


def test_precision_is_told_on_standard_error_and_in_every_report(lowered, overflowing):
    found, scaled = lowered.rows, overflowing.name
    largest = f"{found[scaled]['precision']['largest_value']:,.0f}"
    assert f"{scaled}, fp16: largest activation {largest} at {LAYER}" in lowered.err
    pages = (lowered.folder / name for name in ("metrics.md", "report.html"))
    for text in (lowered.err, *(page.read_text() for page in pages)):
        assert unsafe(found, scaled) in text
    assert len(set((lowered.folder / "per_image.csv").read_text().split("\n")[0].split(","))) == 4


def test_beside_shows_precisions_of_earlier_results_and_records_none(
    olvae, lowered, overflowing, trained, photos, tmp_path
):
    beside = ("--no-report", "--beside", lowered.folder / "metrics.json", "--out", tmp_path)
    assert olvae("evaluate", trained, "--data", photos, *SMALL, *beside)[0] == 0
    plain, found, healthy = rows(tmp_path), lowered.rows, trained.name
    half = f"{overflowing.name}, fp16"
    assert plain[half]["precision"] == found[half]["precision"]
    assert unsafe(found, overflowing.name) in (tmp_path / "metrics.md").read_text()
    # without the flag nothing is recorded, and nothing changes
    for name in ("metrics", "intervals", "bands"):
        assert plain[healthy][name] == found[healthy][name]
    assert "precision" not in plain[healthy]


def test_many_images_in_fp16_on_a_cpu_are_a_warning(olvae, trained, tmp_path):
    arguments = (
        "--precision",
        "fp16",
        "--metrics",
        "psnr",
        "--data",
        tmp_path / "photos",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    )
    (tmp_path / "photos").mkdir()
    code, _, err = olvae("evaluate", trained, *arguments)
    assert (code, err.count("fp16 is very slow on a CPU")) == (1, 1)


def test_rows_of_precisions_of_a_sampled_latent_have_activations_of_their_own(
    done, trained, photos, tmp_path
):
    protocols = (
        "--protocol",
        "open-litevae,latent-diffusion",
        "--precision",
        "bf16",
        "--no-report",
        "--images",
        4,
    )
    done("evaluate", trained, "--data", photos, *PIXELS, *protocols, "--out", tmp_path)
    mode, sampled = rows(tmp_path), rows(tmp_path, "metrics_latent-diffusion.json")
    for name in (trained.name, f"{trained.name}, bf16"):
        one, other = mode[name]["precision"], sampled[name]["precision"]
        assert one["largest"]["encoder"] == other["largest"]["encoder"]
        assert one["largest"]["decoder.conv_in"] != other["largest"]["decoder.conv_in"]
        assert mode[name]["metrics"]["psnr"] > sampled[name]["metrics"]["psnr"]
        assert (other["psnr_lost"] == 0.0) == (other["dtype"] == "32")


@pytest.mark.parametrize(
    ("targets", "arguments", "text"),
    [
        (1, ["--cross"], "--cross takes two targets, TEACHER STUDENT, and got 1"),
        (2, ["--cross", "--precision", "fp16"], "--cross and --precision are two evaluations"),
        (
            1,
            ["--precision", "bf16", "--metrics", "ssim"],
            "--precision is judged by PSNR: add psnr to --metrics",
        ),
    ],
)
def test_mistakes_in_cross_and_precision_are_one_line_and_leave_nothing(
    olvae, trained, photos, tmp_path, targets, arguments, text
):
    given = [trained] * targets + ["--data", photos, "--out", tmp_path / "out", *arguments]
    code, out, err = olvae("evaluate", *given)
    assert (code, out) == (2, ""), err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert text in error
    assert not (tmp_path / "out").exists()
