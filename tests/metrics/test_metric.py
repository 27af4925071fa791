import math
import pickle

import pytest
import torch

from olvae.metrics import build_metrics
from olvae.metrics.metric import Kind, MetricSet, PerImage
from tests.metrics.conftest import pairs

NAMES = ["psnr", "ssim", "ssim_uniform", "ms_ssim", "l1"]


def merge(own, other) -> None:
    """As from another process."""
    for state in other.states():
        own.merge(pickle.loads(pickle.dumps(state)))


def run(name: str, keys, x, y, size: int = 4) -> PerImage:
    make = build_metrics([name])
    metric = make().metrics[name]
    for start in range(0, len(keys), size):
        metric.update(keys[start : start + size], x[start : start + size], y[start : start + size])
    return metric


@pytest.mark.parametrize("name", NAMES)
def test_pixel_metrics_do_not_depend_on_batches_order_and_processes(name):
    keys, x, y = pairs(7, 176 if name == "ms_ssim" else 32)
    whole = run(name, keys, x, y, size=7)
    assert len(set(whole.per_image().values())) == 7
    order = [3, 6, 0, 5, 1, 4, 2]
    shuffled = run(name, [keys[i] for i in order], x[order], y[order], size=2)
    # Two in both.
    first = run(name, keys[:4], x[:4], y[:4])
    second = run(name, keys[2:], x[2:], y[2:], size=1)
    merge(second, first)
    merge(second, second)
    rounding = 1e-12 if name in ("psnr", "l1") else 1e-6
    for other in (shuffled, second):
        assert other.compute() == pytest.approx(whole.compute(), rel=rounding)
        assert other.per_image() == pytest.approx(whole.per_image(), rel=rounding)
    assert whole.compute() == pytest.approx(sum(whole.per_image().values()) / 7, rel=1e-12)


def test_pixel_metrics_of_equal_images():
    keys, x, y = pairs(3, 176)
    assert {name: run(name, keys, x, x).compute() for name in NAMES} == {
        "psnr": math.inf,
        "ssim": pytest.approx(1.0, abs=1e-6),
        "ssim_uniform": pytest.approx(1.0, abs=1e-6),
        "ms_ssim": pytest.approx(1.0, abs=1e-6),
        "l1": 0.0,
    }
    y[1] = x[1]  # one of three
    metric = run("psnr", keys, x, y)
    assert metric.compute() == pytest.approx(sum(metric.per_image()[keys[i]] for i in (0, 2)) / 2)
    assert metric.details == {"equal_images": 1}
    assert [math.isinf(value) for value in metric.per_image().values()] == [False, True, False]


def test_nan_metric_of_one_pair_is_no_other_pair():
    """A float32 reconstruction that overflows, of a stated range: `compute` has words for it."""
    keys, x, y = pairs(2, 32)
    metric = run("psnr", keys, x.float(), y * math.nan)
    merge(metric, metric)
    assert math.isnan(metric.compute())
    with pytest.raises(ValueError, match="different pairs"):
        metric.update(keys, x, y)


def test_different_images_under_one_key_are_refused():
    keys, x, y = pairs(2, 32)
    with pytest.raises(ValueError, match=r"different .*'0000\.png'"):
        run("psnr", ["0000.png", "0000.png"], x, y)
    # Values of l1 are all close to 0.
    with pytest.raises(ValueError, match="different pairs"):
        run("l1", ["0000.png", "0000.png"], x, y)
    other = run("psnr", keys, x, x.flip(0))
    with pytest.raises(ValueError, match="different pairs"):
        merge(other, run("psnr", keys, x, y))


def metric_set(keys, x, y) -> MetricSet:
    make = build_metrics(["psnr", "ms_ssim", "rfid"])
    metrics = make()
    if keys:
        metrics.update(keys, x, y)
    return metrics


def test_metric_set_has_values_or_reasons(nowhere):
    keys, x, y = pairs(2, 32)
    metrics = metric_set(keys, x, y)
    assert metrics.compute() == {"psnr": run("psnr", keys, x, y).compute()}
    assert metrics.per_image() == {"psnr": run("psnr", keys, x, y).per_image()}
    assert list(metrics.skipped) == ["rfid", "ms_ssim"]
    assert "176 pixels" in metrics.skipped["ms_ssim"]
    assert "`weights_dir`" in metrics.skipped["rfid"]
    empty = metric_set([], x, y)
    assert empty.compute() == {}
    assert empty.skipped["psnr"] == "psnr needs an image, got none"
    overflown = metric_set(keys, x.float(), y * math.nan)
    assert overflown.compute() == {}
    assert overflown.skipped["psnr"] == "not a number"


def test_a_metric_that_one_process_dropped_is_dropped_by_all(nowhere):
    keys, x, y = pairs(5, 32)
    first, second = metric_set(keys[:3], x[:3], y[:3]), metric_set([], x, y)
    merge(second, first)
    assert "176 pixels" in second.skipped["ms_ssim"]
    merge(second, metric_set(keys[2:], x[2:], y[2:]))
    merge(second, second)
    assert second.compute() == {"psnr": pytest.approx(run("psnr", keys, x, y).compute(), rel=1e-12)}


def test_metric_refuses_images_that_do_not_fit_together():
    keys, x, y = pairs(2, 32)
    metric = run("l1", keys, x, y)
    for bad, message in (
        ((keys, x.float(), y), "got torch.float32"),
        ((keys, x, y[:1]), "one shape"),
        ((keys, x[0], y[0]), "one shape"),
        ((keys[:1], x, y), "and 1 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*bad)


def test_metrics_compute_in_full_precision():
    """Whatever the evaluation around it does: no autocast, no TF32, no graph."""
    before = torch.backends.cudnn.allow_tf32
    seen = {}

    def compare(x, y):
        seen["tf32"] = torch.backends.cudnn.allow_tf32
        weight = torch.ones(3, 3, requires_grad=True)
        product = x.float().flatten(2).transpose(1, 2) @ weight
        seen["dtype"], seen["graph"] = product.dtype, product.requires_grad
        return product.flatten(1).mean(1)

    keys, x, y = pairs(2, 16)
    metric = PerImage(Kind("mine", "mine", "lower"), compare)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(keys, x, y)
    # The image comes first.
    means = 3 * x.double().mean((1, 2, 3))
    assert metric.per_image() == pytest.approx(dict(zip(keys, means.tolist(), strict=True)))
    assert seen == {"tf32": False, "dtype": torch.float32, "graph": False}
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_comparison_gives_one_value_for_each_pair():
    keys, x, y = pairs(2, 16)
    metric = PerImage(Kind("mine", "mine", "lower"), lambda x, y: x.float().mean()[None])
    with pytest.raises(ValueError, match="shorter"):
        metric.update(keys, x, y)
