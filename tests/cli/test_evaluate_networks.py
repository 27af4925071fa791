"""LPIPS, rFID and KID of ``olvae evaluate``, against the packages that define them, on the same images as PNG files."""

import json
import warnings
from pathlib import Path

import lpips as reference
import numpy as np
import pytest
import torch
import torch_fidelity
import torchvision
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from olvae import LiteVAE
from olvae.checkpoint import ALEXNET, INCEPTION, VGG16
from tests.test_devices import run_on_two

SIZE = 32
PUBLISHED = {"vgg": torchvision.models.VGG16_Weights, "alex": torchvision.models.AlexNet_Weights}
METRICS = "psnr,ssim,lpips,lpips_alex,rfid,kid"


def as_png(run: Path, photos: Path, folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Crops and their reconstructions, made here from Pillow's resize and the model alone; (H, W, 3) each."""
    model = LiteVAE.from_pretrained(run)
    both: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for path in sorted(photos.iterdir()):
        picture = Image.open(path)
        scale = SIZE / min(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
        left, top = ((side - SIZE) // 2 for side in picture.size)
        x = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)))
        with torch.inference_mode():
            z = model.encode(torch.tensor(x).permute(2, 0, 1)[None] / 127.5 - 1).mode()
            y = ((model.decode(z)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        for images, image, name in zip(both, (x, y), ("x", "y"), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name / f"{path.stem}.png")
            images.append(image)
    return both


def theirs(folder: Path, x: list[np.ndarray], y: list[np.ndarray], weights: Path, monkeypatch) -> dict[str, float]:
    found = {
        "psnr": np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(x, y, strict=True)]),
        "ssim": np.mean(
            [
                structural_similarity(
                    a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
                for a, b in zip(x, y, strict=True)
            ]
        ),
    }
    pair = [torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1 for images in (x, y)]
    for name, trunk, file in (("lpips", "vgg", VGG16), ("lpips_alex", "alex", ALEXNET)):
        state = torch.load(weights / file.name, weights_only=True)
        monkeypatch.setattr(PUBLISHED[trunk], "get_state_dict", lambda *_, state=state, **__: state)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found[name] = float(reference.LPIPS(net=trunk, verbose=False)(*pair).mean())
    sets = torch_fidelity.calculate_metrics(
        input1=str(folder / "x"),
        input2=str(folder / "y"),
        fid=True,
        kid=True,
        kid_subset_size=len(x),
        feature_extractor_weights_path=str(weights / INCEPTION.name),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    found["rfid"] = sets["frechet_inception_distance"]
    found["kid"] = sets["kernel_inception_distance_mean"]
    return {name: float(value) for name, value in found.items()}


@pytest.mark.slow
def test_the_command_gives_the_references_numbers_on_one_process_and_on_two(
    olvae, trained, weights_dir, tmp_path, monkeypatch
):
    photos = trained.parent.parent / "photos"
    arguments = ["evaluate", str(trained), "--data", str(photos), "--size", str(SIZE), "--weights-dir"]
    arguments += [str(weights_dir), "--metrics", METRICS, "--no-report"]
    code, _, err = olvae(*arguments, "-B", 5, "--out", tmp_path / "one")
    assert code == 0, err
    run_on_two("-m", "olvae.cli.main", *arguments, "-B", "2", "--out", str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text())["results"][0] for n in ("one", "two"))
    expected = theirs(tmp_path, *as_png(trained, photos, tmp_path), weights_dir, monkeypatch)
    assert one["skipped"] == two["skipped"] == {}
    for name, value in expected.items():
        tolerance = {"rel": 1e-3} if name in ("rfid", "kid") else {"abs": 1e-5}
        assert one["metrics"][name] == pytest.approx(value, **tolerance), name
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
    assert one["metrics"]["rfid"] > 1
    assert "rests on a vgg16-397923af.pth that is not the published file" in err
