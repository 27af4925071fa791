import shutil

import pytest

from olvae.metrics import METRICS, build_metrics
from olvae.pretrained_networks import ALEXNET, INCEPTION, VGG16
from tests.metrics.conftest import pairs

# Whose network, with random weights, is tested in test_features.
NAMES = [name for name in METRICS if name != "fdd"]


def test_build_metrics_builds_all_metrics_with_their_weights(weights_dir, nowhere, monkeypatch):
    monkeypatch.setattr("olvae.metrics.provenance", lambda path, file: (path, file))
    keys, x, y = pairs(2, 176)
    make = build_metrics(NAMES, weights_dir)
    assert not make().skipped
    metrics = make().metrics
    assert list(METRICS) == [kind.name for kind in METRICS.values()]
    assert list(metrics) == NAMES
    for name, metric in metrics.items():
        assert metric.kind is METRICS[name]
        metric.update(keys, x, y)
    for name in ("lpips", "lpips_alex"):
        assert metrics[name].compute() > 0
        assert list(metrics[name].per_image()) == keys
    assert metrics["lpips"].compute() != metrics["lpips_alex"].compute()
    for name, file in (
        ("lpips", VGG16),
        ("lpips_alex", ALEXNET),
        ("rfid", INCEPTION),
        ("kid", INCEPTION),
    ):
        assert metrics[name].details == {"weights": (weights_dir / file.name, file)}
    assert metrics["psnr"].details == {}
    assert not any(make().metrics["psnr"].states())  # the next target starts empty


def test_build_metrics_skips_those_with_missing_weights(tmp_path, weights_dir, nowhere):
    (tmp_path / "some").mkdir()
    shutil.copy(weights_dir / ALEXNET.name, tmp_path / "some")
    metrics = build_metrics(NAMES, tmp_path / "some")()
    skipped = metrics.skipped
    assert list(metrics.metrics) == ["psnr", "ssim", "ssim_uniform", "ms_ssim", "l1", "lpips_alex"]
    assert list(skipped) == ["lpips", "rfid", "kid"]
    for name, file in (("lpips", VGG16), ("rfid", INCEPTION), ("kid", INCEPTION)):
        for part in (file.name, file.url, str(nowhere), "`weights_dir`", "no network"):
            assert part in skipped[name]
        assert "\n" not in skipped[name]


def test_build_metrics_takes_each_name_once_and_refuses_others(weights_dir):
    make = build_metrics(["l1", "psnr", "l1"])
    assert list(make().metrics) == ["l1", "psnr"]
    with pytest.raises(ValueError, match=r"fid: .*psnr, ssim"):
        build_metrics(["psnr", "fid"])


@pytest.mark.gpu
def test_metrics_on_a_gpu_give_the_same_numbers(weights_dir, nowhere):
    keys, x, y = pairs(4, 176)
    values = []
    for device in ("cpu", "cuda"):
        make = build_metrics(NAMES, weights_dir, device)
        metrics = make().metrics
        for metric in metrics.values():
            metric.update(keys, x.to(device), y.to(device))
        values.append({name: metric.compute() for name, metric in metrics.items()})
    assert values[1] == {
        name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in values[0].items()
    }
