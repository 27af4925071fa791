from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from olvae.config import ConfigError, validate
from olvae.data.image import EvalTransform
from olvae.data.mix import MixSource
from olvae.data.source import LoaderProcess
from tests.conftest import tiny_config
from tests.data.images import write_shards


@pytest.fixture
def nodes(tmp_path, image_folder):
    """Twelve pictures in a folder, ten training and one validation; twenty in shards, four of them
    for validation."""
    write_shards(tmp_path / "shards", (5, 9, 6))
    write_shards(tmp_path / "val", (4,))
    folder = {"root": str(image_folder), "size": 16, "batch_size": 1, "val_fraction": 0.1}
    shards = {
        "shards": str(tmp_path / "shards"),
        "size": 16,
        "batch_size": 1,
        "val_shards": str(tmp_path / "val"),
    }
    return [
        {"target": "olvae.data.picture_folder.FolderSource", "params": folder},
        {
            "target": "olvae.data.shards.webdataset.WebDatasetSource",
            "params": {**shards, "shuffle": 4},
        },
    ]


def mix(nodes, **arguments) -> MixSource:
    return MixSource(nodes, **{"size": 16, "batch_size": 4, **arguments})


def test_each_source_of_a_mix_has_its_share(nodes):
    s = mix(nodes, weights=[3, 1])
    kinds = Counter("png" in sample.key for sample in islice(s.stream(0, 0, LoaderProcess()), 1000))
    assert kinds == {True: 750, False: 250}
    assert mix(nodes, weights=[0, 1]).shares == [0, 1000]
    assert mix(nodes, weights=[1, 1, 1][:2]).shares == [500, 500]
    assert mix(nodes, weights=[1e9, 1]).shares == [999, 1]
    assert mix(nodes[:1] * 3, weights=[1e9, 1, 1]).shares == [998, 1, 1]
    assert mix(nodes[:1] * 30).shares == [34] * 10 + [33] * 20
    assert sorted(mix(nodes[:1] * 600).shares) == [1] * 200 + [2] * 400
    own = mix(nodes)
    assert own.shares == [
        round(1000 * own.sources[0].samples_per_epoch / own.samples_per_epoch),
        own.shares[1],
    ]
    assert sum(own.shares) == 1000


def test_a_mix_is_its_sources_streams_in_an_order_of_the_seed_and_the_process(nodes):
    """Sources have no whole batches, and begin with their own first image."""
    s = mix(nodes, weights=[3, 1])
    streams = [source.stream(5, 0, LoaderProcess(1, 3)) for source in s.sources]
    rng = np.random.default_rng((5, 0, 1, 3, 3))
    order = rng.permutation([0] * 750 + [1] * 250)[:40]
    wanted = [f"{i}/{next(streams[i]).key}" for i in order]
    process = LoaderProcess(1, 3, batch_size=4, offset=7)
    assert [sample.key for sample in islice(s.stream(5, 0, process), 40)] == wanted


def test_a_mix_speaks_for_its_sources(nodes, monkeypatch):
    s = mix(nodes, weights=[3, 1], num_workers=2)
    a, b = s.sources
    assert s.describe() == f"75.0% {a.describe()}; 25.0% {b.describe()}"
    assert list(s.val_identities()) == [*a.val_identities(), *b.val_identities()]
    assert s.order == [a.order, b.order]
    asked = []
    for source in (a, b):
        monkeypatch.setattr(source, "check_processes", asked.append)
        monkeypatch.setattr(source, "keep_order", asked.append)
    s.check_processes(3)
    assert (asked, a.num_workers, b.num_workers) == ([3, 3], 2, 2)
    for orders, kept in ((["x", "y"], ["x", "y"]), (["x"], ["x"]), (None, [None, None])):
        asked.clear()
        s.keep_order(orders)
        assert asked == kept


def test_a_mix_goes_on_where_a_cycle_ends(nodes):
    s = mix(nodes, weights=[1, 2])
    everything = list(islice(s.stream(5, 0, LoaderProcess(1, 3)), 1011))
    for place in (996, 1003):
        whole = everything[place : place + 8]
        rest = list(islice(s.stream(5, place, LoaderProcess(1, 3)), 8))
        assert [x.key for x in rest] == [x.key for x in whole]
        assert all(torch.equal(a.image, b.image) for a, b in zip(rest, whole, strict=True))


@pytest.mark.parametrize("i", [0, 1])
def test_each_image_of_a_mix_has_its_own_key(nodes, i):
    s = mix([nodes[i], nodes[i]])
    alone = [sample.key for sample in s.sources[0].once(LoaderProcess())]
    assert [sample.key for sample in s.once(LoaderProcess())] == [
        f"{n}/{key}" for n in (0, 1) for key in alone
    ]
    drawn = {sample.key for sample in islice(s.stream(0, 0, LoaderProcess()), 150)}
    assert len(drawn) == s.samples_per_epoch
    assert {key[0] for key in drawn} == {"0", "1"}


def test_a_mix_refuses_wrong_weights_and_sources(nodes):
    with pytest.raises(ConfigError, match="2 weights"):
        mix(nodes, weights=[1])
    with pytest.raises(ConfigError, match="2 weights"):
        mix(nodes, weights=[0, 0])
    with pytest.raises(ConfigError, match="2 weights"):
        mix(nodes, weights=[-1, 2])
    with pytest.raises(ConfigError, match=r"sources\.0: .*3 channels .*16x16"):
        mix(nodes, size=32)
    with pytest.raises(ConfigError, match=r"sources\.0: .*3 channels .*16x16"):
        mix(nodes, channels=1)
    with pytest.raises(ConfigError, match=r"sources\.0: values of 8 bits.* do not mix with 0 to 9"):
        mix(nodes, range=[0, 9])
    with pytest.raises(ConfigError, match=r"collections\.OrderedDict is not"):
        mix([{"target": "collections.OrderedDict"}])
    remote = {**nodes[1], "params": {**nodes[1]["params"], "shards": "pipe:cat a.tar"}}
    with pytest.raises(ConfigError, match="weights: missing"):
        mix([nodes[0], remote])


def test_mistakes_in_a_mixs_nodes_are_found_by_validation(nodes):
    config = tiny_config()
    config["data"] = {
        "target": "olvae.data.mix.MixSource",
        "params": {"sources": nodes, "size": 16, "batch_size": 4},
    }
    assert validate(config) == []
    nodes[1]["params"]["shufle"] = 3
    (mistake,) = validate(config)
    assert mistake.startswith(
        "data.params.sources.1.params.shufle: unknown key; did you mean shuffle?"
    )


def test_an_evaluations_transform_reaches_the_sources_of_a_mix(nodes):
    s = mix(nodes)
    s.eval_transform = EvalTransform(16, "adm", "box")
    whole = {sample.key: sample.image for sample in s.once(LoaderProcess())}
    for source in mix(nodes).sources:
        source.eval_transform = EvalTransform(16, "adm", "box")
        for sample in source.once(LoaderProcess()):
            assert any(
                key[2:] == sample.key and torch.equal(image, sample.image)
                for key, image in whole.items()
            )
    assert len(whole) == s.val_images


def test_a_mix_describes_how_each_sources_images_are_made(nodes):
    assert mix(nodes).crops is None
    samples = {
        "target": "olvae.data.dataset.SamplePhotographs",
        "params": {"size": 16, "batch_size": 1},
    }
    images = mix([nodes[0], samples]).describe_val_images()
    assert "tiles" in images
    assert "centre crop" in images
    for node in nodes:
        assert mix(nodes).eval_transform.resample == "bicubic"
        node["params"]["filters"] = ["nearest"]
    assert (
        mix(nodes).describe_val_images()
        == "nearest resize of the shorter side (Pillow), centre crop"
    )


def test_groups_of_two_sources_are_two(nodes):
    nodes[0]["params"]["hold_out_by"] = "folder"
    (batch,) = mix([nodes[0], nodes[0]]).test_loader(20)
    assert len(set(batch["group"])) == 2
    assert {group[:7] for group in batch["group"]} == {"0/class", "1/class"}
