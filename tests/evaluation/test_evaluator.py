import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from olvae.evaluation.evaluator import bicubic_reconstruction, evaluate


def batches(images: torch.Tensor, size: int):
    return [{"image": part} for part in images.split(size)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


def darker(x: torch.Tensor) -> torch.Tensor:
    return (x.int() * 3 // 4).to(torch.uint8)


def test_the_mean_over_images_whatever_the_batches(images):
    expected = np.mean([peak_signal_noise_ratio(x.numpy(), darker(x).numpy(), data_range=255) for x in images])
    for size in (1, 3, 7):
        inputs, (result,) = evaluate({"darker": darker}, batches(images, size), ["psnr", "ssim"], {0, 5})
        assert torch.equal(inputs, images[[0, 5]])
        assert result.n == 7
        assert result.metrics["psnr"] == pytest.approx(expected, rel=1e-9)
        assert torch.equal(result.examples, darker(images[[0, 5]]))
    _, (backwards,) = evaluate({"darker": darker}, batches(images.flip(0), 3), ["ssim"], {0})
    assert backwards.metrics["ssim"] == pytest.approx(result.metrics["ssim"], rel=1e-6)


def test_equal_images_have_no_finite_psnr(images):
    _, (result, other) = evaluate({"same": lambda x: x, "darker": darker}, batches(images, 3), ["psnr", "ssim"], {0})
    assert other.metrics.keys() == {"psnr", "ssim"}
    assert "psnr" not in result.metrics
    assert result.skipped["psnr"].startswith("inf")
    assert result.metrics["ssim"] == pytest.approx(1.0)


def test_an_empty_set():
    with pytest.raises(ValueError, match="no images"):
        evaluate({"x": lambda x: x}, [], ["psnr"], {0})


def test_bicubic_is_pillows(images):
    reconstruction = bicubic_reconstruction(8)(images)
    for x, y in zip(images, reconstruction, strict=True):
        picture = Image.fromarray(x.permute(1, 2, 0).numpy())
        small = picture.resize((4, 4), Image.Resampling.BICUBIC)
        back = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(back, y.permute(1, 2, 0).numpy())
