"""``olvae evaluate --cross`` and ``--precision``, which add rows to the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from olvae.models.loading.targets import find_target
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
        model.encoder.extractors[1].down_blocks[0][0].conv1.weight *= 1e6
    folder = tmp_path_factory.mktemp("scaled") / "scaled"
    model.save_pretrained(folder)
    return folder


def test_every_encoder_with_every_decoder(done, trained, teacher, photos, tmp_path):
    arguments = [
        "evaluate",
        teacher,
        trained,
        "--cross",
        "--data",
        photos,
        "--size",
        "32",
        "--images",
        5,
        *PIXELS,
    ]
    protocols = ["--protocol", "open-litevae,latent-diffusion"]
    err = done(*arguments, *protocols, "--baselines", "--out", tmp_path)
    found, a, b = rows(tmp_path), teacher, trained.name
    crossed = [a, b, f"{a}'s encoder, {b}'s decoder", f"{b}'s encoder, {a}'s decoder"]
    assert list(found) == [*crossed, "bicubic, 8x smaller and back", "untrained"]
    assert [found[name]["cost"] is not None for name in crossed] == [True, True, False, False]

    models = [find_target(target).load() for target in (teacher, trained)]
    x = np.stack([crop(path) for path in sorted(photos.iterdir())[:5]])  # (N, 32, 32, 3)
    images = torch.tensor(x).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        for name, (i, j) in zip(crossed, ((0, 0), (1, 1), (0, 1), (1, 0)), strict=True):
            y = models[j].decode(models[i].encode(images).mode())
            y = ((y.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
            expected = np.mean([peak_signal_noise_ratio(p, q) for p, q in zip(x, y, strict=True)])
            assert found[name]["metrics"]["psnr"] == pytest.approx(expected, abs=1e-3)
        first, second = (
            model.encode(images).mean.double().transpose(0, 1).flatten(1).numpy()
            for model in models
        )
    latents, expected = found[b]["latents"], np.sqrt(((second - first) ** 2).mean(1)) / first.std(1)
    assert latents["teacher"] == a
    assert latents["per_channel"] == pytest.approx(list(expected), rel=1e-4)
    assert latents["teacher_std"] == pytest.approx(list(first.std(1)), rel=1e-4)
    assert latents["rmse"] == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-4)
    assert [name for name, row in found.items() if "latents" in row] == [b]

    sampled = rows(tmp_path, "metrics_latent-diffusion.json")
    assert sampled[b]["latents"] == latents
    assert sampled[crossed[2]]["metrics"]["psnr"] != found[crossed[2]]["metrics"]["psnr"]
    line = f"latents of {b}: RMS error {latents['rmse']:.3f} in standard deviations of {a}; per channel"
    for text in (err, *((tmp_path / name).read_text() for name in ("metrics.md", "report.html"))):
        assert line in text


def crop(path: Path) -> np.ndarray:
    """As the protocol says: 48x40 to 38x32, then the middle."""
    picture = Image.open(path).resize((38, 32), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((3, 0, 35, 32)))


def test_rows_of_precisions(olvae, done, trained, overflowing, photos, tmp_path):
    given = ["--data", photos, "--size", 16, "--images", 5, *PIXELS]
    arguments = [
        "evaluate",
        overflowing,
        trained,
        *given,
        "--precision",
        "fp16,bf16,32",
        "--baselines",
    ]
    err = done(*arguments, "--out", tmp_path / "one")
    found = rows(tmp_path / "one")
    scaled, healthy = overflowing.name, trained.name
    lower = [f"{name}{end}" for name in (scaled, healthy) for end in ("", ", fp16", ", bf16")]
    assert list(found) == [*lower, "bicubic, 8x smaller and back", "untrained"]
    assert ["precision" in row for row in found.values()] == [True] * 6 + [False] * 2

    layer = "encoder.extractors.1.down_blocks.0.0.conv1"
    half = found[f"{scaled}, fp16"]["precision"]
    assert half["non_finite"]["first"] == layer
    assert half["non_finite"]["images"] == 5
    assert not half["safe"]
    assert all(np.isfinite(value) for value in found[f"{scaled}, fp16"]["metrics"].values())
    assert half["psnr_lost"] == pytest.approx(
        found[scaled]["metrics"]["psnr"] - found[f"{scaled}, fp16"]["metrics"]["psnr"]
    )
    for name in (scaled, f"{scaled}, bf16"):
        row = found[name]["precision"]
        assert row["largest_name"] == layer
        assert row["largest_value"] == row["largest"]["encoder.extractors.1"] > 65504
        assert row["non_finite"] == {"images": 0, "values": 0, "first": None}
    assert found[scaled]["precision"]["safe"]
    for name in (f"{healthy}, fp16", f"{healthy}, bf16"):
        assert found[name]["precision"]["non_finite"]["images"] == 0
        assert abs(found[name]["metrics"]["psnr"] - found[healthy]["metrics"]["psnr"]) <= 1
        assert found[name]["cost"]["encode_macs"] == found[healthy]["cost"]["encode_macs"]
        assert found[name]["cost"]["encode_images_per_s"] is None
    line = (
        f"5 of 5 images non-finite, first at {layer}; PSNR {-half['psnr_lost']:+.3f} dB: not safe"
    )
    assert (
        f"{scaled}, fp16: largest activation {found[scaled]['precision']['largest_value']:,.0f} at {layer} in"
        in err
    )
    page = (tmp_path / "one" / "report.html").read_text()
    for text in (err, (tmp_path / "one" / "metrics.md").read_text(), page):
        assert line in text
    assert len(set((tmp_path / "one" / "per_image.csv").read_text().split("\n")[0].split(","))) == 4

    beside = ("--no-report", "--beside", tmp_path / "one" / "metrics.json")
    assert olvae("evaluate", trained, *given, *beside, "--out", tmp_path / "beside")[0] == 0
    plain = rows(tmp_path / "beside")
    assert plain[f"{scaled}, fp16"]["precision"] == half
    assert line in (tmp_path / "beside" / "metrics.md").read_text()
    for name in (
        "metrics",
        "intervals",
        "bands",
    ):  # without the flag nothing is recorded, and nothing changes
        assert plain[healthy][name] == found[healthy][name]
    assert "precision" not in plain[healthy]


def test_many_images_in_fp16_on_a_cpu_take_long(olvae, trained, tmp_path):
    arguments = (
        "--precision",
        "fp16",
        "--metrics",
        "psnr",
        "--data",
        tmp_path,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    )
    code, _, err = olvae("evaluate", trained, *arguments)
    assert (code, err.count("fp16 is very slow on a CPU")) == (1, 1)


def test_a_sampled_latent_has_activations_of_its_own(done, trained, photos, tmp_path):
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
def test_mistakes_are_one_line_and_leave_nothing(
    olvae, trained, photos, tmp_path, targets, arguments, text
):
    given = [trained] * targets + ["--data", photos, "--out", tmp_path / "out", *arguments]
    code, out, err = olvae("evaluate", *given)
    assert (code, out) == (2, ""), err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert text in error
    assert not (tmp_path / "out").exists()
