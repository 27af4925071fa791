"""rFID and KID on Inception, against torch-fidelity's own command."""

import pytest
import torch
import torch_fidelity
from PIL import Image

from olvae.metrics.features import Inception
from olvae.metrics.metric import Unavailable
from olvae.metrics.registry import build_metrics
from olvae.weights import INCEPTION
from tests.metrics.conftest import pairs


def theirs(folder, keys, x, y, weights) -> tuple[float, float]:
    for name, images in (("x", x), ("y", y)):
        (folder / name).mkdir()
        for key, image in zip(keys, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / key)
    result = torch_fidelity.calculate_metrics(
        input1=str(folder / "x"),
        input2=str(folder / "y"),
        fid=True,
        kid=True,
        kid_subset_size=len(keys),
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no loader processes
        verbose=False,
    )
    return result["frechet_inception_distance"], result["kernel_inception_distance_mean"]


def check(tmp_path, weights_dir, n: int, size: int) -> None:
    keys, x, y = pairs(n, size)
    y = y // 2 + 60
    make, skipped = build_metrics(["rfid", "kid"], weights_dir)
    assert not skipped
    metrics, same = make().metrics, make().metrics
    for part in (slice(n // 2, None), slice(0, n // 2)):
        for metric in metrics.values():
            metric.update(keys[part], x[part], y[part])
    fid, kid = theirs(tmp_path, keys, x, y, weights_dir / INCEPTION.name)
    assert metrics["rfid"].compute() == pytest.approx(fid, rel=1e-3)
    assert metrics["kid"].compute() == pytest.approx(kid, rel=1e-3)
    assert fid > 10
    assert abs(kid) > 0.05

    for metric in same.values():
        metric.update(keys[:3], x[:3], x[:3])
    assert 0 <= same["rfid"].compute() < 1e-3
    assert same["kid"].compute() < kid


def test_equals_torch_fidelity(tmp_path, weights_dir):
    check(tmp_path, weights_dir, n=4, size=64)


@pytest.mark.slow
def test_equals_torch_fidelity_on_more_images(tmp_path, weights_dir):
    check(tmp_path, weights_dir, n=100, size=96)


def test_features(weights_dir):
    inception = Inception(weights_dir / INCEPTION.name)
    _, x, _ = pairs(2, 64)
    together, alone = inception(x), inception(x[1:])
    largest = float(together.max())
    assert together.shape == (2, 2048)
    assert together[1] == pytest.approx(alone[0], rel=1e-4, abs=1e-5 * largest)
    assert abs(together[0] - together[1]).max() > 0.1 * largest
    with pytest.raises(Unavailable, match="3 channels, got 1"):
        inception(x[:, :1])


def test_files_of_something_else(tmp_path, weights_dir):
    path = tmp_path / INCEPTION.name
    state = torch.load(weights_dir / INCEPTION.name, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"is not a file of Inception weights: .*fc\.weight") as error:
        Inception(path)
    assert "\n" not in str(error.value)
    del state["Conv2d_1a_3x3.conv.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"is not a file of Inception weights: .*Conv2d_1a_3x3\.conv\.weight"):
        Inception(path)
    path.write_bytes((weights_dir / INCEPTION.name).read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="cut off"):
        build_metrics(["rfid"], tmp_path)
