import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save

from olvae.data.image import EvalTransform, Photo, image_to_tensor
from olvae.data.pixels.size_and_range import from_uint8
from olvae.data.read_errors import TooManyUnreadableError, UnreadableImageError
from olvae.data.shards.latent_files import LATENT, read_latent
from olvae.data.shards.latent_source import LatentSource
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.files import write_json
from tests.data.images import encoded, picture, rewrite, take, write_classes
from tests.export.latents import encode, tiny_vae


@pytest.fixture(scope="session")
def encoded_once(tmp_path_factory):
    """Latents of 23 images in three shards, with classes; moments, of mirrored images too."""
    root = tmp_path_factory.mktemp("latents")
    encode(write_classes(root / "shards", (9, 5, 9)), root / "latents", flip=True, dtype="float32")
    return root / "latents"


@pytest.fixture
def latents(encoded_once, tmp_path):
    return shutil.copytree(encoded_once, tmp_path / "latents")


def source(folder, **arguments) -> LatentSource:
    return LatentSource(str(folder), **{"batch_size": 4, "shuffle": 5, **arguments})


def test_latents_have_mean_0_and_deviation_1(latents):
    """Each value, over many visits, within its sampling error."""
    s = source(latents, batch_size=23)
    batches = take(s.train_loader(seed=0), 30)
    z = torch.cat([batch["latent"] for batch in batches]).double()
    assert batches[0]["latent"].dtype == torch.float32
    assert batches[0]["latent"].shape == (23, 4, 2, 2)
    assert float(z.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.02)


def test_per_channel_each_has_mean_0_and_deviation_1(latents):
    s, plain = source(latents, batch_size=23, per_channel=True), source(latents, batch_size=23)
    z = torch.cat([batch["latent"] for batch in take(s.train_loader(seed=0), 30)]).double()
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 4, abs=0.03)
    assert z.square().mean((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=0.04)
    (one,), (other,) = take(s.val_loader(), 1), take(plain.val_loader(), 1)
    assert one["key"] == other["key"]
    assert one["latent"].dtype == torch.float32
    stats = json.loads((latents / "stats.json").read_text())
    by_hand = torch.stack(
        [
            (
                other["latent"][:, c] / plain.scaling_factor
                + plain.shift_factor
                - stats["latents_mean"][c]
            )
            / stats["latents_std"][c]
            for c in range(4)
        ],
        dim=1,
    )
    torch.testing.assert_close(one["latent"], by_hand, rtol=1e-4, atol=1e-5)
    assert (by_hand - other["latent"]).abs().max() > 0.01
    back = [
        batch / s.scaling_factor + s.shift_factor
        for s, batch in ((s, one["latent"]), (plain, other["latent"]))
    ]
    torch.testing.assert_close(*back, rtol=1e-4, atol=1e-5)


def test_per_channel_refuses_a_channel_without_deviation(latents):
    stats = json.loads((latents / "stats.json").read_text())
    write_json({**stats, "latents_std": [1.0, 0.0, 1.0, 1.0]}, latents / "stats.json")
    source(latents)
    with pytest.raises(ValueError, match="channel 1"):
        source(latents, per_channel=True)


def test_visits_of_a_latent_draw_other_noise_and_other_sides(latents):
    s, model = source(latents, batch_size=23), tiny_vae()
    key, visits = "001/0010", []
    for batch in take(s.train_loader(seed=0), 40):
        visits.append(batch["latent"][batch["key"].index(key)])
    z = torch.stack(visits).double() / s.scaling_factor + s.shift_factor
    picture = EvalTransform(16)(Photo(encoded(10), "10.jpg").read())
    x = from_uint8(image_to_tensor(picture))[None]
    with torch.inference_mode():
        plain, mirrored = model.encode(x), model.encode(x.flip(-1))
    mean = (plain.mean + mirrored.mean)[0].double() / 2
    var = (plain.var + mirrored.var)[0].double() / 2 + (
        (plain.mean - mirrored.mean)[0].double() / 2
    ).square()
    assert ((z.mean(0) - mean).abs() < 5 * (var / 40).sqrt()).all()
    assert torch.allclose(z.var(0), var, rtol=1.0)
    fixed = source(latents, batch_size=23, sample=False, flip=False)
    for batch in take(fixed.train_loader(seed=0), 3):
        z = batch["latent"][batch["key"].index(key)] / fixed.scaling_factor + fixed.shift_factor
        assert torch.allclose(z, plain.mean[0], atol=1e-4)
    sides = {
        round(float(v[0, 0, 0]), 4)
        for v in (
            b["latent"][b["key"].index(key)]
            for b in take(source(latents, batch_size=23, sample=False).train_loader(), 20)
        )
    }
    assert len(sides) == 2


@pytest.mark.parametrize("seed", range(6))
def test_a_visit_is_by_the_numbers_of_its_generator(encoded_once, seed):
    """The side, then the noise; of a validation the mean."""
    s = source(encoded_once)
    (entry, *_) = read_shard(Shard(str(encoded_once / "000001.tar")), LATENT)
    latent, mirrored, meta = read_latent(entry)
    rng = np.random.default_rng(seed)
    side = mirrored if rng.random() < 0.5 else latent
    noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
    z = side.mean + side.std * torch.randn(side.mean.shape, generator=noise)
    found = s.train_sample(entry, np.random.default_rng(seed))
    torch.testing.assert_close(found.image, (z - s.shift_factor) * s.scaling_factor)
    assert (found.key, found.label) == (meta["key"], int(meta["key"].split("/")[1]) % 5)
    found = s.val_sample(entry).image
    torch.testing.assert_close(found, (latent.mean - s.shift_factor) * s.scaling_factor)


def test_a_latent_that_does_not_fit_is_named(encoded_once):
    s = source(encoded_once)
    (entry, *_) = read_shard(Shard(str(encoded_once / "000001.tar")), LATENT)
    for changed, why in (
        ({"latent_shape": [4, 2, 3]}, "a latent of shape [4, 2, 2], but [4, 2, 3] by stats.json"),
        ({"latents_mean": [0.0] * 2}, "a latent of 4 channels, but 2 by stats.json"),
        (
            {"latent_shape": None, "latents_mean": [0.0]},
            "a latent of 4 channels, but 1 by stats.js",
        ),
    ):
        known = s.stats
        s.stats = {**known, **changed}
        with pytest.raises(UnreadableImageError) as error:
            s.val_sample(entry)
        s.stats = known
        assert error.value.name == entry.name
        assert error.value.reason.startswith(why)


def test_labels_and_keys_of_latents_belong_together(latents):
    for batch in take(source(latents).train_loader(seed=0), 12):
        assert batch["label"].tolist() == [int(key.split("/")[1]) % 5 for key in batch["key"]]
        assert batch["label"].dtype == torch.int64


def test_latents_without_classes_have_no_label(tmp_path, image_folder):
    encode(image_folder, tmp_path / "latents")
    (batch,) = take(source(tmp_path / "latents").train_loader(), 1)
    assert set(batch) == {"latent", "key"}


def test_validation_of_latents_gives_each_mode_once_in_order(latents):
    s = source(latents)
    for loader in (s.val_loader(), s.test_loader(5)):
        batches = list(loader)
        keys = [key for batch in batches for key in batch["key"]]
        assert keys == [f"{0 if n < 9 else 1 if n < 14 else 2:03d}/{n:04d}" for n in range(23)]
    modes = (
        torch.cat([batch["latent"] for batch in batches]).double() / s.scaling_factor
        + s.shift_factor
    )
    stats = json.loads((latents / "stats.json").read_text())
    means = []
    for path in sorted(latents.glob("*.tar")):
        means += [read_latent(entry)[0].mean for entry in read_shard(Shard(str(path)), LATENT)]
    assert torch.allclose(modes, torch.stack(means).double(), atol=1e-5)
    assert s.val_images == s.samples_per_epoch == s.images == stats["count"] == 23
    assert s.describe() == "23 latents in 3 shards"


def test_a_broken_latent_is_counted_and_another_one_stands_in(latents):
    path = latents / "000001.tar"
    rewrite(path, {"0011.latent.safetensors": b"broken"})
    s = source(latents, max_unreadable=0.1)
    loader = s.train_loader()
    batches = take(loader, 12)
    assert all(len(batch["key"]) == 4 and "001/0011" not in batch["key"] for batch in batches)
    assert loader.read_errors.lost == 1
    with pytest.raises(TooManyUnreadableError, match="1 of 23"):
        take(source(latents, max_unreadable=0.0).train_loader(), 12)


@pytest.mark.parametrize(
    "tensors",
    [
        {"mean": torch.zeros(4, 2, 2), "std": torch.ones(4, 2)},
        {"mean": torch.zeros(4), "std": torch.ones(4)},
        {"mean": torch.zeros(4, 2, 2, dtype=torch.int64), "std": torch.ones(4, 2, 2)},
        {"mean": torch.zeros(4, 3, 2), "std": torch.ones(4, 3, 2)},
    ],
)
def test_a_latent_of_another_shape_is_unreadable(latents, tensors):
    path = latents / "000001.tar"
    rewrite(path, {"0011.latent.safetensors": save(tensors)})
    loader = source(latents, max_unreadable=0.1).val_loader()
    assert sum(len(batch["key"]) for batch in loader) == 22
    assert loader.read_errors.lost == 1


def test_latent_source_refuses_other_folders_and_shapes(latents, tmp_path, image_folder):
    with pytest.raises(FileNotFoundError, match=r"no stats\.json"):
        source(image_folder)
    picture(0, (24, 8)).save(image_folder / "wide.png")
    encode(image_folder, tmp_path / "native", size=0)
    with pytest.raises(ValueError, match="several shapes"):
        source(tmp_path / "native")
    assert source(tmp_path / "native", batch_size=1).size == (1, 1)
    shapes = [
        batch["latent"].shape for batch in source(tmp_path / "native", batch_size=1).val_loader()
    ]
    assert shapes[0] == (1, 4, 5, 6)
    assert shapes[-1] == (1, 4, 1, 3)
    stats = json.loads((latents / "stats.json").read_text())
    for broken in (
        {},
        {name: stats[name] for name in stats if name != "latent_shape"},
        {**stats, "downscale": None},
    ):
        (latents / "stats.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="of latents"):
            source(latents)


def test_one_number_for_several_channels_of_latents_of_several_shapes(tmp_path, image_folder):
    """Each latent says how many channels there are."""
    picture(0, (24, 8)).save(image_folder / "wide.png")
    encode(image_folder, tmp_path / "native", size=0)
    stats = json.loads((tmp_path / "native" / "stats.json").read_text())
    one = {name: [1.0] for name in ("latents_mean", "latents_std", "means_std")}
    (tmp_path / "native" / "stats.json").write_text(json.dumps({**stats, **one}))
    broken = source(tmp_path / "native", batch_size=1, per_channel=True)
    with pytest.raises(ValueError, match=r"4 channels.* 1 .*stats\.json"):
        next(iter(broken.val_loader()))
