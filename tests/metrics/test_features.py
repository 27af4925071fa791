"""LPIPS against its package; rFID and KID against float64 by hand, and on Inception against torch-fidelity."""

import pickle
import shutil
import warnings

import lpips as reference
import numpy as np
import pytest
import timm
import torch
import torch_fidelity
import torchvision
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torch_fidelity.defaults import DEFAULTS

from olvae.checkpoint import DINOV2, INCEPTION
from olvae.metrics import METRICS, build_metrics
from olvae.metrics.features import KID, LPIPS_SIZE, RFID, DINOv2, Inception, LPIPSDistance
from olvae.metrics.metric import Unavailable
from olvae.modules.frozen import TRUNKS
from tests.metrics.conftest import pairs

WIDTH = 12


def extract(images: torch.Tensor) -> np.ndarray:
    """Mean colours of the quarters."""
    return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1).numpy() / 32


@pytest.fixture
def batch():
    return pairs(40, 16)


def both(reference=None, extractor=extract):
    shared = (extractor, {} if reference is None else reference, {})
    return RFID(METRICS["rfid"], *shared), KID(METRICS["kid"], *shared)


def distorted(y):
    return (y.int() * 3 // 4 + 20).to(torch.uint8)


def test_rfid_is_the_formula(batch):
    keys, x, y = batch
    rfid, _ = both()
    rfid.update(keys, x, distorted(y))
    a, b = (extract(images).astype(np.float64) for images in (x, distorted(y)))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert rfid.compute() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1
    assert rfid.details == {"features": WIDTH}
    assert rfid.per_image() is None


def test_kid_of_all_images_is_the_unbiased_mmd(batch):
    """With N below 1000 every subset is the whole set."""
    keys, x, y = batch
    _, kid = both()
    kid.update(keys, x, distorted(y))
    a, b = (extract(images).astype(np.float64) for images in (x, distorted(y)))

    def kernel(p, q):
        return (p @ q.T / WIDTH + 1) ** 3

    n = len(a)
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
    expected = within - 2 * kernel(a, b).mean()
    assert kid.compute() == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 0.1
    assert kid.details == {"subsets": 100, "subset_size": 40, "seed": 2020, "std": pytest.approx(0, abs=1e-3)}


def test_batches_order_and_processes_make_no_difference(batch):
    keys, x, y = batch
    whole = both()
    whole[0].update(keys, x, y)
    values = [metric.compute() for metric in whole]
    whole[0].update([keys[3], keys[3], keys[0]], x[[3, 3, 0]], y[[3, 3, 0]])  # a key counts once
    shuffled, first, second = both(), both(), both()
    order = np.random.default_rng(0).permutation(40).tolist()
    for start in range(0, 40, 7):
        part = order[start : start + 7]
        for metric in shuffled:
            metric.update([keys[i] for i in part], x[part], y[part])
    first[0].update(keys[:25], x[:25], y[:25])
    second[0].update(keys[20:], x[20:], y[20:])  # five in both
    for metric, state in zip(second, pickle.loads(pickle.dumps([metric.state() for metric in first])), strict=True):
        metric.merge(state)
    for other in (whole, shuffled, second):
        assert [metric.compute() for metric in other] == values


def test_features_are_computed_once_and_pickled_once(batch):
    keys, x, y = batch
    seen = []

    def counting(images):
        seen.append(len(images))
        return extract(images)

    reference: dict = {}
    targets = [both(reference, counting) for _ in range(3)]
    for number, both_metrics in enumerate(targets):
        for metric in both_metrics:
            metric.update(keys, x, y + number)
    assert sum(seen) == 4 * 40  # the images, and three targets' reconstructions
    values = [[metric.compute() for metric in target] for target in targets]
    assert len({value for pair in values for value in pair}) == 6
    pair = len(pickle.dumps(targets[0][0].state()))
    everything = len(pickle.dumps([metric.state() for target in targets for metric in target]))
    assert everything < 2.2 * pair


def test_one_image_and_few_images(batch):
    keys, x, y = batch
    metrics = both()
    metrics[0].update(keys[:1], x[:1], y[:1])
    for metric, name in zip(metrics, ("rFID", "KID"), strict=True):
        with pytest.raises(Unavailable, match=f"{name} needs at least 2 images, got 1"):
            metric.compute()
    metrics[0].update(keys[:WIDTH], x[:WIDTH], y[:WIDTH])
    metrics[0].compute()
    assert "12 images for 12 features: the covariances are singular" in metrics[0].details["warning"]
    metrics[0].update(keys, x, y)
    metrics[0].compute()
    assert "warning" not in metrics[0].details


def test_subsets_of_many_images_do_not_depend_on_the_order(monkeypatch):
    monkeypatch.setitem(DEFAULTS, "kid_subsets", 2)
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1200, 3, 2, 2), dtype=np.uint8))
    results = []
    for order in (torch.arange(1200), torch.randperm(1200)):
        _, kid = both()
        kid.update([f"{i:05d}" for i in order.tolist()], x[order], distorted(x)[order])
        results.append(kid.compute())
        assert kid.details["subset_size"] == 1000
        assert kid.details["std"] > 0
    assert results[0] == results[1]


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


def without_root(one, two, verbose) -> dict[str, float]:
    """What the Fréchet distance is computed from; its square root takes seconds with 2048 features."""
    values = ((one[name] - two[name]) for name in ("mu", "sigma"))
    return {"frechet_inception_distance": sum(float(np.square(value).sum()) for value in values)}


@pytest.mark.parametrize(("n", "whole"), [(2, False), pytest.param(100, True, marks=pytest.mark.slow)])
def test_equals_torch_fidelity(tmp_path, weights_dir, monkeypatch, n, whole):
    for module in [] if whole else ["metric_fid", "metrics"]:
        monkeypatch.setattr(f"torch_fidelity.{module}.fid_statistics_to_metric", without_root)
    keys, x, y = pairs(n, 64)
    y = y // 2 + 60
    metrics = build_metrics(["rfid", "kid"], weights_dir)().metrics
    for part in (slice(n // 2, None), slice(0, n // 2)):
        for metric in metrics.values():
            metric.update(keys[part], x[part], y[part])
    fid, kid = theirs(tmp_path, keys, x, y, weights_dir / INCEPTION.name)
    assert metrics["rfid"].compute() == pytest.approx(fid, rel=1e-3)
    assert metrics["kid"].compute() == pytest.approx(kid, rel=1e-3)
    assert fid > 10
    assert abs(kid) > 0.01


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


@pytest.fixture
def dinov2(tmp_path, vit, monkeypatch):
    """A folder with a small ViT's random weights, under the file name and in the format of DINOv2's."""
    monkeypatch.setattr("olvae.metrics.features.DINOV2_MODEL", "test_vit")
    monkeypatch.setattr("olvae.metrics.provenance", lambda path, file: {})
    shutil.copy(vit, tmp_path / DINOV2.name)
    return tmp_path


def test_fdd_is_the_distance_of_class_tokens(dinov2, vit):
    """Features by timm alone, from images that Pillow resized."""
    keys, x, y = pairs(5, 64)
    fdd = build_metrics(["fdd"], dinov2)().metrics["fdd"]
    fdd.update(keys, x, y)
    network = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True).eval()
    config, sides = network.pretrained_cfg, []
    for images in (x, y):
        pictures = [
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC) for image in images
        ]
        seen = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        with torch.no_grad():
            sides.append(network.forward_features((seen - mean) / std)[:, 0].double().numpy())
    a, b = sides
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fdd.compute() == pytest.approx(expected, rel=0.02)  # Pillow rounds to 8 bits
    assert "5 images for 64 features" in fdd.details["warning"]


def test_fdd_without_its_network(dinov2, monkeypatch):
    _, x, _ = pairs(2, 64)
    with pytest.raises(Unavailable, match="DINOv2 needs images of 3 channels, got 1"):
        DINOv2(dinov2 / DINOV2.name)(x[:, :1])
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, dinov2 / DINOV2.name)
    with pytest.raises(ValueError, match=r"dinov2_vitl14_pretrain\.pth is not a file of DINOv2 weights: these are not"):
        build_metrics(["fdd"], dinov2)
    monkeypatch.setattr("olvae.metrics.find_spec", lambda name: None)
    assert "open-litevae[align]" in build_metrics(["fdd"], dinov2)().skipped["fdd"]


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


PUBLISHED = {"vgg": torchvision.models.VGG16_Weights, "alex": torchvision.models.AlexNet_Weights}


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_equals_the_lpips_package(trunk, weights_dir, monkeypatch):
    """The package loads the same file its own way: through torchvision's loader."""
    path = weights_dir / TRUNKS[trunk].name
    state = torch.load(path, weights_only=True)
    monkeypatch.setattr(PUBLISHED[trunk], "get_state_dict", lambda *args, **kwargs: state)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: None)  # takes seconds, and is overwritten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference.LPIPS(net=trunk, verbose=False)
    ours = LPIPSDistance(trunk, path)
    _, x, y = pairs(3, 64)
    with torch.no_grad():
        values = ours(x, y)
        expected = theirs(*((image.float() / 127.5 - 1) for image in (x, y))).flatten()
        assert ours(x, x).tolist() == [0.0, 0.0, 0.0]
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert min(values) > 1e-3
    assert len({round(value, 6) for value in values.tolist()}) == 3

    least = torch.zeros(1, 3, LPIPS_SIZE[trunk], 64, dtype=torch.uint8)
    assert ours(least, least).item() == 0.0
    for wrong in (least[:, :, 1:], torch.zeros(1, 4, 64, 64, dtype=torch.uint8)):
        with pytest.raises(Unavailable, match=f"3 channels and at least {LPIPS_SIZE[trunk]} pixels"):
            ours(wrong, wrong)
