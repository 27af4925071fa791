"""LPIPS against its package; rFID and KID against float64 by hand,
and on Inception against torch-fidelity.
"""

import errno
import json
import pickle
import sys
import tracemalloc
import warnings
from collections.abc import Callable

import lpips as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
import torchvision
from PIL import Image
from scipy.linalg import sqrtm
from timm.models import vision_transformer
from torch import nn
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from olvae.cli.main import main as olvae
from olvae.launcher import gather_parts, join, leave
from olvae.metrics import METRICS, build_metrics
from olvae.metrics.features import (
    DINOV2_MODEL,
    KID,
    LPIPS_SIZE,
    RFID,
    DINOv2,
    FeatureFile,
    Inception,
    LPIPSDistance,
    frechet_distance,
)
from olvae.metrics.metric import Unavailable
from olvae.modules.frozen import TRUNKS, VisionEncoder
from olvae.pretrained_networks import DINOV2, INCEPTION
from tests.export.latents import tiny_vae
from tests.forks import fork_ranks
from tests.metrics.conftest import pairs

WIDTH = 12


def extract(images: torch.Tensor) -> np.ndarray:
    """Mean colours of the quarters."""
    return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1).numpy() / 32


@pytest.fixture
def batch():
    return pairs(40, 16)


def both(reference=None, extractor=extract):
    shared = (extractor, FeatureFile() if reference is None else reference, FeatureFile())
    return RFID(METRICS["rfid"], *shared), KID(METRICS["kid"], *shared)


def distorted(y):
    return (y.int() * 3 // 4 + 20).to(torch.uint8)


def test_rfid_is_the_formula(batch, capsys):
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
    # Of equal sets only rounding is left; and torch-fidelity prints nothing.
    assert 0.0 <= frechet_distance(a, a) < 1e-3
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="one shape"):
        rfid.update(keys, x.float(), y)


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
    assert kid.details == {
        "subsets": 100,
        "subset_size": 40,
        "seed": 2020,
        "std": pytest.approx(0, abs=1e-3),
    }


def test_rfid_and_kid_do_not_depend_on_batches_order_and_processes(batch):
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
    for state in pickle.loads(pickle.dumps(list(first[0].states()))):
        second[0].merge(state)
        second[1].merge(state)
    for other in (whole, shuffled, second):
        assert [metric.compute() for metric in other] == values


def test_rfid_and_kid_compute_and_send_features_once(batch):
    keys, x, y = batch
    seen = []

    def counting(images):
        seen.append(len(images))
        return extract(images)

    reference = FeatureFile()
    targets = [both(reference, counting) for _ in range(3)]
    for number, both_metrics in enumerate(targets):
        for metric in both_metrics:
            metric.update(keys, x, y + number)
    assert sum(seen) == 4 * 40  # the images, and three targets' reconstructions
    values = [[metric.compute() for metric in target] for target in targets]
    assert len({value for pair in values for value in pair}) == 6
    sent = [len(state[1]) for target in targets for metric in target for state in metric.states()]
    assert sent == 4 * [40]

    # What came afterwards is sent alone, as in a second validation.
    targets[0][1].update(["new"], x[:1], y[:1])
    assert [state[1] for state in targets[0][0].states()] == [["new"], ["new"]]


def measured_by_two(keys, x, y, out) -> None:
    """Two processes that share the images, but for five that both saw."""
    rank, _ = join()
    metrics = both()
    own = range(22) if rank == 0 else range(39, 16, -1)
    for start in range(0, len(own), 5):
        part = list(own[start : start + 5])
        metrics[0].update([keys[i] for i in part], x[part], y[part])
    sent = []
    for state in gather_parts(metrics[0].states()):
        sent.append(len(state[1]))
        metrics[0].merge(state)
    if rank == 0:
        out.write_text(json.dumps([[metric.compute() for metric in metrics], sent]))
    leave()


def test_two_processes_get_what_one_gets_to_the_bit(batch, tmp_path, monkeypatch):
    """In parts of 4 rows of each process, and with images that both saw."""
    monkeypatch.setattr("olvae.metrics.features.ROWS_AT_ONCE", 8)
    keys, x, y = batch
    alone = both()
    alone[0].update(keys, x, y)
    fork_ranks(measured_by_two, keys, x, y, tmp_path / "out")
    values, sent = json.loads((tmp_path / "out").read_text())
    assert values == [metric.compute() for metric in alone]
    assert sent == 2 * [4, 4, 4, 4, 4, 3]


def test_at_least_one_row_is_sent_at_a_time(monkeypatch):
    monkeypatch.setattr("olvae.metrics.features.ROWS_AT_ONCE", 0)
    file = FeatureFile()
    file.add(["a", "b", "c"], np.eye(3, dtype=np.float32))
    assert [keys for keys, _ in file.unsent()] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("rows", [4096, 100])
def test_metrics_from_a_file_are_those_of_arrays(rows, monkeypatch):
    """Today's values to the bit if the images are read at once, else to rounding. The features are
    far from 0, as sums of plain squares would lose digits there.
    """
    monkeypatch.setattr("olvae.metrics.features.ROWS_AT_ONCE", rows)
    monkeypatch.setitem(DEFAULTS, "kid_subsets", 3)
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(16, 16))
    a = (rng.normal(size=(1300, 16)) @ mixed + 1000).astype(np.float32)
    b = (rng.normal(size=(1300, 16)) @ mixed + 1000.2).astype(np.float32)
    keys = [f"{i:04}" for i in range(1300)]
    metrics = both()
    for part in np.array_split(rng.permutation(1300), 7):
        some = [keys[i] for i in part]
        for place, rows_of in ((True, a), (False, b)):
            metrics[0].merge((place, some, rows_of[part]))

    rfid, kid = (metric.compute() for metric in metrics)
    expected = frechet_distance(a, b)
    assert expected > 0.1
    assert rfid == (expected if rows == 4096 else pytest.approx(expected, rel=1e-9))
    theirs = kid_features_to_metric(*map(torch.from_numpy, (a, b)), verbose=False)
    assert kid == theirs[KEY_METRIC_KID_MEAN]


def test_memory_for_features_does_not_grow_with_the_images(monkeypatch):
    """Bytes that Python and numpy hold: of an image, the keys but not the features, 2 KB twice."""
    monkeypatch.setattr("olvae.metrics.features.ROWS_AT_ONCE", 64)
    monkeypatch.setitem(DEFAULTS, "kid_subset_size", 64)
    peaks = []
    for images in (500, 2500):
        rng = np.random.default_rng(0)
        metrics, first = both(), both()
        tracemalloc.start()
        for start in range(0, images, 50):
            keys = [str(start + i) for i in range(50)]
            for place in (True, False):
                metrics[0].merge((place, keys, rng.normal(size=(50, 512)).astype(np.float32)))
        for state in metrics[0].states():
            first[0].merge(state)
        for metric in first:
            metric.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2000 < 1000


def test_features_leave_no_file_and_a_full_disk_has_a_remedy(
    batch, tmp_path, monkeypatch, full_disk
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys, x, y = batch
    metrics = both()
    metrics[0].update(keys, x, y)
    assert not list(tmp_path.iterdir())
    with (
        full_disk(1000),
        pytest.raises(OSError, match=r"too large.*`TMPDIR`") as error,
    ):
        both()[0].update(keys, x, y)
    assert error.value.filename == str(tmp_path)
    assert error.value.errno == errno.EFBIG


def test_rfid_and_kid_of_one_image_and_of_few_images(batch):
    keys, x, y = batch
    metrics = both()
    metrics[0].update(keys[:1], x[:1], y[:1])
    for metric, name in zip(metrics, ("rFID", "KID"), strict=True):
        with pytest.raises(Unavailable, match=rf"{name} .*2 images, got 1"):
            metric.compute()
    metrics[0].update(keys[:WIDTH], x[:WIDTH], y[:WIDTH])
    metrics[0].compute()
    assert "12 images for 12 features" in metrics[0].details["warning"]
    metrics[0].update(keys, x, y)
    metrics[0].compute()
    assert "warning" not in metrics[0].details


def test_kid_subsets_of_many_images_do_not_depend_on_the_order(monkeypatch):
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
    """What the Fréchet distance is computed from; its square root takes seconds with 2048
    features.
    """
    values = ((one[name] - two[name]) for name in ("mu", "sigma"))
    return {"frechet_inception_distance": sum(float(np.square(value).sum()) for value in values)}


@pytest.mark.parametrize(
    ("n", "whole"), [(2, False), pytest.param(100, True, marks=pytest.mark.slow)]
)
def test_rfid_and_kid_equal_torch_fidelity(tmp_path, weights_dir, monkeypatch, n, whole):
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


def test_inception_features_do_not_depend_on_the_batch(weights_dir):
    inception = Inception(weights_dir / INCEPTION.name)
    _, x, _ = pairs(2, 64)
    together, alone = inception(x), inception(x[1:])
    largest = float(together.max())
    assert together.shape == (2, 2048)
    assert together[1] == pytest.approx(alone[0], rel=1e-4, abs=1e-5 * largest)
    assert abs(together[0] - together[1]).max() > 0.1 * largest
    with pytest.raises(Unavailable, match="3 channels, got 1"):
        inception(x[:, :1])


WIDTH_OF_VIT, BLOCKS, HEADS = 24, 2, 3


def published_names(width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """The tensors of dinov2_vitl14_pretrain.pth, which has 1024 and 24:
    names and shapes of Meta's file.
    """
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
    }
    block |= {
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
    }
    block |= {
        "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "ls2.gamma": (width,),
        "mlp.fc1.bias": (4 * width,),
    }
    block |= {
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    names = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37**2, width),
        "mask_token": (1, width),
    }
    names |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    names |= {f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    return names | {"norm.weight": (width,), "norm.bias": (width,)}


@pytest.fixture
def dinov2(tmp_path, monkeypatch):
    """A folder with random weights under the name, and in the format, of DINOv2's file;
    the network is a narrow one.
    """
    whole = vision_transformer._create_vision_transformer
    narrow = {"embed_dim": WIDTH_OF_VIT, "depth": BLOCKS, "num_heads": HEADS}
    monkeypatch.setattr(
        vision_transformer,
        "_create_vision_transformer",
        lambda variant, pretrained=False, **settings: whole(
            variant, pretrained, **{**settings, **narrow}
        ),
    )
    torch.manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(shape)
        for name, shape in published_names(WIDTH_OF_VIT, BLOCKS).items()
    }
    torch.save(tensors, tmp_path / DINOV2.name)
    return tmp_path


def class_tokens(weights: dict[str, torch.Tensor], images: torch.Tensor) -> np.ndarray:
    """By hand in float64: Pillow's resize, patches of 14, attention, LayerScale, the last norm."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    planes = [
        Image.fromarray(p.numpy()).resize((224, 224), Image.BICUBIC)
        for p in images.float().flatten(0, 1)
    ]
    x = (
        torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
        .double()
        .unflatten(0, (-1, 3))
        / 255
    )
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    patches = (
        x.unflatten(3, (16, 14))
        .unflatten(2, (16, 14))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
    )
    # (B, 256, D).
    t = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    grid = w["pos_embed"][:, 1:].float().unflatten(1, (37, 37)).movedim(-1, 1)
    places = (
        nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
        .double()
        .flatten(2)
        .mT
    )
    t = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(t), -1, -1), t + places], 1)

    def of(operation: Callable, t: torch.Tensor, name: str, *settings: object) -> torch.Tensor:
        return operation(t, *settings, w[f"{name}.weight"], w[f"{name}.bias"])

    for b in (f"blocks.{i}" for i in range(BLOCKS)):
        normed = of(F.layer_norm, t, f"{b}.norm1", (WIDTH_OF_VIT,))
        q, k, v = (
            of(F.linear, normed, f"{b}.attn.qkv")
            .unflatten(2, (3, HEADS, -1))
            .permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        t = t + w[f"{b}.ls1.gamma"] * of(F.linear, seen, f"{b}.attn.proj")
        inner = of(F.linear, of(F.layer_norm, t, f"{b}.norm2", (WIDTH_OF_VIT,)), f"{b}.mlp.fc1")
        t = t + w[f"{b}.ls2.gamma"] * of(F.linear, F.gelu(inner), f"{b}.mlp.fc2")
    return of(F.layer_norm, t, "norm", (WIDTH_OF_VIT,))[:, 0].numpy()


def test_fdd_by_olvae_evaluate(dinov2, tmp_path, nowhere):
    """From the file to metrics.json."""
    keys, x, _ = pairs(6, 32)
    (tmp_path / "images").mkdir()
    for key, image in zip(keys, x, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / key)
    model = tiny_vae()
    model.save_pretrained(tmp_path / "vae")
    given = [
        "--data",
        str(tmp_path / "images"),
        "--size",
        "32",
        "--metrics",
        "fdd",
        "--weights-dir",
        str(dinov2),
    ]
    with pytest.raises(SystemExit) as leaving:
        olvae(
            [
                "evaluate",
                str(tmp_path / "vae"),
                *given,
                "--no-report",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert leaving.value.code == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    with torch.no_grad():
        y = ((model(x / 127.5 - 1)[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    weights = torch.load(dinov2 / DINOV2.name)
    a, b = (class_tokens(weights, images) for images in (x, y))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    (row,) = content["results"]
    assert row["metrics"]["fdd"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3
    assert f"6 images for {WIDTH_OF_VIT} " in row["details"]["fdd"]["warning"]
    assert row["details"]["fdd"]["weights"]["published"] is False
    assert "DINOv2 ViT-L/14" in content["protocol"]["fdd"]


def test_published_dinov2_file_fits_its_network():
    """All its names and shapes, without values."""
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in published_names(1024, 24).items()}
        # As published, with the mask token.
        assert sum(tensor.numel() for tensor in tensors.values()) == 304_368_640
        assert VisionEncoder(DINOV2_MODEL, tensors).class_token(
            torch.empty(1, 3, 64, 64), 224
        ).shape == (1, 1024)


def test_fdd_without_its_network_is_skipped(dinov2, monkeypatch):
    _, x, _ = pairs(2, 64)
    with pytest.raises(Unavailable, match="3 channels, got 1"):
        DINOv2(dinov2 / DINOV2.name)(x[:, :1])
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, dinov2 / DINOV2.name)
    with pytest.raises(
        ValueError,
        match=r"dinov2_vitl14_pretrain\.pth .*DINOv2",
    ):
        build_metrics(["fdd"], dinov2)
    monkeypatch.setattr("olvae.metrics.find_spec", lambda name: None)
    assert "install timm" in build_metrics(["fdd"], dinov2)().skipped["fdd"]


def test_inception_and_dinov2_files_of_something_else_are_refused(tmp_path, weights_dir):
    path = tmp_path / INCEPTION.name
    state = torch.load(weights_dir / INCEPTION.name, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"Inception weights: .*fc\.weight") as error:
        Inception(path)
    assert "\n" not in str(error.value)
    del state["Conv2d_1a_3x3.conv.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"Inception weights: .*Conv2d_1a_3x3\.conv\.weight"):
        Inception(path)
    path.write_bytes((weights_dir / INCEPTION.name).read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="cut off"):
        build_metrics(["rfid"], tmp_path)


PUBLISHED = {"vgg": torchvision.models.VGG16_Weights, "alex": torchvision.models.AlexNet_Weights}


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_lpips_equals_the_lpips_package(trunk, weights_dir, monkeypatch):
    """Bit for bit, with its gradients, where the package is not installed.

    The package loads the same file its own way: through torchvision's loader.
    """
    path = weights_dir / TRUNKS[trunk].name
    state = torch.load(path, weights_only=True)
    monkeypatch.setattr(PUBLISHED[trunk], "get_state_dict", lambda *args, **kwargs: state)
    # Take seconds, and are overwritten.
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: None)
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, *_: tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference.LPIPS(net=trunk, verbose=False)
    monkeypatch.setitem(sys.modules, "lpips", None)
    ours = LPIPSDistance(trunk, path)
    _, x, y = pairs(3, 64)
    with torch.no_grad():
        values = ours(x, y)
        assert ours(x, x).tolist() == [0.0, 0.0, 0.0]
    results = []
    for network in (theirs, ours._network):
        a, b = ((image.float() / 127.5 - 1).requires_grad_() for image in (x, y))
        distances = network(a, b)
        distances.mean().backward()
        results.append((distances, a.grad, b.grad))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)
        assert found.isfinite().all()
    assert values.dtype == torch.float64
    assert torch.equal(values, results[0][0].double().flatten())
    assert min(values) > 1e-3
    assert len({round(value, 6) for value in values.tolist()}) == 3

    least = torch.zeros(1, 3, LPIPS_SIZE[trunk], 64, dtype=torch.uint8)
    assert ours(least, least).item() == 0.0
    for wrong in (least[:, :, 1:], torch.zeros(1, 4, 64, 64, dtype=torch.uint8)):
        with pytest.raises(Unavailable, match=rf"3 channels .*{LPIPS_SIZE[trunk]} pixels"):
            ours(wrong, wrong)


def test_inception_rounds_images_to_whole_levels(weights_dir):
    inception = Inception(weights_dir / INCEPTION.name)
    x = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert np.array_equal(inception(x.float() - 0.25), inception(x))
