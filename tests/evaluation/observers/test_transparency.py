import numpy as np
import pytest
import torch
from PIL import Image

from olvae.evaluation.observers.observer import Observation
from olvae.evaluation.observers.transparency import Transparency


def test_psnr_over_three_backgrounds_as_pillow_lays_them():
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, (2, 32, 32, 4), dtype=np.uint8) for _ in range(2))
    y[1, ..., 3] = x[1, ..., 3]
    observer = Transparency()
    tensors = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (x, y)]
    observer.update(Observation("vae", 0, ["a", "b"], *tensors, torch.zeros(1), {}))
    entry = observer.result("vae", 0)

    def psnr(a: np.ndarray, b: np.ndarray) -> float:
        return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 255**2 * 1e-10))

    def flat(image: np.ndarray, grey: str) -> np.ndarray:
        whole = Image.fromarray(image)
        return np.asarray(Image.alpha_composite(Image.new("RGBA", whole.size, grey), whole).convert("RGB"))

    for name, grey in (("black", "black"), ("grey", "#808080"), ("white", "white")):
        expected = np.mean([psnr(flat(a, grey), flat(b, grey)) for a, b in zip(x, y, strict=True)])
        assert entry[name] == pytest.approx(expected, abs=0.03)  # Pillow rounds
    assert entry["alpha"] == pytest.approx(np.mean([psnr(x[0, ..., 3], y[0, ..., 3]), 100.0]), abs=1e-3)
    assert list(observer.columns(entry)) == ["over black", "over grey", "over white", "alpha"]
    opaque = Transparency()
    opaque.update(Observation("vae", 0, ["a"], tensors[0][:1, :3], tensors[1][:1, :3], torch.zeros(1), {}))
    assert opaque.result("vae", 0) is None
