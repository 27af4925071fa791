"""Validation during training: sums over images by hand, on one process and on two."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from olvae.data.pixels.size_and_range import EIGHT_BITS
from olvae.devices import tf32
from olvae.launcher import join, leave
from olvae.models import validation
from olvae.models.validation import Validation
from tests.forks import fork_ranks


class Darker:
    """A model whose reconstruction is darker by some levels, and by others as trained."""

    use_ema = True
    device = torch.device("cpu")
    global_rank = 0
    pixel_range = EIGHT_BITS
    trainer = SimpleNamespace()
    autoencoder = SimpleNamespace(shrink=lambda images: images)

    def __init__(self, *parts: Any) -> None:
        self.each_part = parts
        self.levels = 4

    def images(self, batch: dict[str, Any]) -> Tensor:
        return EIGHT_BITS.normalise(batch["image"])

    def __call__(self, images: Tensor, moments: Tensor | None = None) -> tuple[Tensor, None]:
        assert not torch.backends.cuda.matmul.allow_tf32
        return images - self.levels / 127.5, None


class Average:
    """Swaps the weights as trained in: another darkness."""

    def __init__(self, model: Darker) -> None:
        self.model = model

    @contextmanager
    def weights_as_trained(self) -> Iterator[None]:
        self.model.levels = 10
        yield
        self.model.levels = 4


class Brightness:
    """A part that measures the mean of a batch."""

    name = "brightness"

    def validate(self, model: Darker, x: Tensor, moments: Tensor | None) -> dict[str, float]:
        return {"mean": float(x.mean())}

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        return {f"{self.name}_{name}": value for name, value in means.items()}


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def run(model: Darker, batches: list[Tensor], names: tuple[str, ...] = ()) -> dict[str, float]:
    found = Validation(names, None)
    found.begin(model)  # type: ignore[arg-type]
    for number, x in enumerate(batches):
        keys = [f"{x[i].sum()}" for i in range(len(x))]
        found.update(model, {"image": x, "key": keys}, number)  # type: ignore[arg-type]
    return found.summarise(model.each_part)


def psnr(x: Tensor, levels: int) -> float:
    """The mean over images, by scikit-image."""
    values = []
    for image in x.numpy():
        darker = (image.astype(int) - levels).astype(np.uint8)
        values.append(peak_signal_noise_ratio(image, darker, data_range=255))
    return float(np.mean(values))


def test_both_weights_have_metrics_over_all_images(monkeypatch):
    model = Darker()
    monkeypatch.setattr(validation, "find_average", lambda _: Average(model))
    x = images(5)
    values = run(model, [x[:3], x[3:]], ("l1",))
    assert values["val/psnr"] == pytest.approx(psnr(x, 4), rel=1e-6)
    assert values["val_raw/psnr"] == pytest.approx(psnr(x, 10), rel=1e-6)
    assert values["val/l1"] == pytest.approx(4 / 255, rel=1e-5)
    assert values.keys() == {
        f"{weights}/{name}" for weights in ("val", "val_raw") for name in ("psnr", "ssim", "l1")
    }
    model.use_ema = False
    assert run(model, [x]).keys() == {"val/psnr", "val/ssim"}


def test_values_do_not_depend_on_batches_and_tf32_is_off(monkeypatch):
    monkeypatch.setattr(validation, "find_average", lambda _: None)
    x = images(6)
    with tf32(True):
        found = [run(Darker(Brightness()), [*x.split(n)]) for n in (1, 4, 6)]
        assert torch.backends.cuda.matmul.allow_tf32
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)


def test_a_parts_mean_is_weighted_by_the_images_of_its_batches(monkeypatch):
    monkeypatch.setattr(validation, "find_average", lambda _: None)
    x = images(5)
    values = run(Darker(Brightness()), [x[:4], x[4:]])
    expected = float(EIGHT_BITS.normalise(x).double().mean())
    assert values["val/brightness_mean"] == pytest.approx(expected, rel=1e-6)


def test_infinite_values_are_left_out(monkeypatch):
    monkeypatch.setattr(validation, "find_average", lambda _: None)
    perfect = Darker()
    perfect.levels = 0
    values = run(perfect, [images(2)])
    assert values == {"val/ssim": pytest.approx(1.0)}
    assert not math.isinf(values["val/ssim"])


def test_batches_without_keys_have_images_of_their_own(monkeypatch):
    """By rank, batch and place: no two are taken for one image."""
    monkeypatch.setattr(validation, "find_average", lambda _: None)
    model = Darker()
    found = Validation((), None)
    found.begin(model)  # type: ignore[arg-type]
    for number, x in enumerate(images(4).split(2)):
        found.update(model, {"image": x}, number)  # type: ignore[arg-type]
    keys = found.metrics["val"].per_image()["psnr"]
    assert sorted(keys) == ["0 0 0", "0 0 1", "0 1 0", "0 1 1"]


def test_a_missing_network_is_named_with_its_metric(nowhere):
    with pytest.raises(FileNotFoundError, match=r"val_metrics: lpips: .*vgg16"):
        Validation(("lpips",), None).set_up(torch.device("cpu"))
    with pytest.raises(ValueError, match="metric psnrr"):
        Validation(("psnrr",), None).set_up(torch.device("cpu"))


def test_networks_are_prepared_once_for_a_device():
    found = Validation((), None)
    cpu = torch.device("cpu")
    assert found.set_up(cpu) is found.set_up(cpu)


@pytest.mark.posix
def test_two_processes_have_the_values_of_one(monkeypatch):
    """Also where one of them has no image."""
    monkeypatch.setattr(validation, "find_average", lambda _: None)
    x = images(5)
    expected = run(Darker(Brightness()), [x])

    def work(*shares: Tensor) -> None:
        rank, _ = join()
        own = shares[rank]
        values = run(Darker(Brightness()), [own] if len(own) else [])
        leave()
        assert values == pytest.approx(expected, rel=1e-6)

    fork_ranks(work, x[:2], x[2:])
    fork_ranks(work, x, x[:0])
