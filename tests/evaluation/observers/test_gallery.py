import hashlib
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.evaluation.observers import gallery as module
from olvae.evaluation.observers.gallery import Gallery, Ranking
from olvae.figures import error_map, labelled_grid
from tests.evaluation.peers import seen


def pairs(n: int) -> tuple[list[str], list[float], torch.Tensor, torch.Tensor]:
    """Distinct values in no order; every image tells its number."""
    values = torch.randperm(n, generator=torch.Generator().manual_seed(1)).double()
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2).contiguous()
    return [f"{i:04}.png" for i in range(n)], values.tolist(), x, x + 1


def ranking(better, keys, values, x, y, size=7, **sizes) -> Ranking:
    kept = Ranking(better, **sizes)
    for i in range(0, len(keys), size):
        kept.add(keys[i : i + size], values[i : i + size], x[i : i + size], y[i : i + size])
    return kept


def shown(kept: Ranking) -> dict[str, list[tuple[str, float, int]]]:
    for group in kept.examples().values():
        assert all(torch.equal(e.y, e.x + 1) and e.x.shape == (3, 2, 2) for e in group)
    return {
        name: [(e.key, e.value, int(e.x[0, 0, 0])) for e in group]
        for name, group in kept.examples().items()
    }


def by_hash(keys: list[str]) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())


@pytest.mark.parametrize(("better", "worst"), [("higher", [0, 1, 2]), ("lower", [99, 98, 97])])
def test_gallery_has_the_worst_the_median_and_the_best_images(better, worst):
    keys, values, x, y = pairs(100)
    groups = shown(ranking(better, keys, values, x, y, each=3, pool=20))
    assert [value for _, value, _ in groups["worst"]] == worst
    assert [value for _, value, _ in groups["best"]] == [99 - value for value in worst][::-1]
    pool = sorted(
        (values[keys.index(key)] for key in by_hash(keys)[:20]), key=lambda value: abs(value - 49)
    )
    assert sorted(value for _, value, _ in groups["median"]) == sorted(pool[:3])
    for group in groups.values():
        assert all(keys[i] == key and values[i] == value for key, value, i in group)


def test_gallery_pool_with_all_images_gives_the_exact_median():
    keys, values, x, y = pairs(63)
    tenths = [value / 10 for value in values]
    groups = shown(ranking("higher", keys, tenths, x, y, each=2, pool=64))
    assert [value for _, value, _ in groups["median"]] in ([3.0, 3.1], [3.1, 3.2])


def test_a_ranking_refuses_a_pool_too_small_for_its_groups_and_a_value_too_few():
    Ranking("higher", each=4, pool=12)
    with pytest.raises(AssertionError):
        Ranking("higher", each=4, pool=11)
    keys, values, x, y = pairs(3)
    with pytest.raises(ValueError, match="shorter"):
        Ranking("higher").add(keys, values[:2], x, y)


def test_gallery_does_not_depend_on_batches_order_and_processes():
    keys, values, x, y = pairs(100)
    whole = ranking("higher", keys, values, x, y, size=100, pool=12)
    order = torch.randperm(100).tolist()
    picked = [keys[i] for i in order], [values[i] for i in order], x[order], y[order]
    shuffled = ranking("higher", *picked, size=3, pool=12)
    first = ranking("higher", keys[:60], values[:60], x[:60], y[:60], pool=12)
    # 20 in both.
    second = ranking("higher", keys[40:], values[40:], x[40:], y[40:], size=1, pool=12)
    second.merge(pickle.loads(pickle.dumps(first)))
    second.merge(second)
    for other in (shuffled, second):
        assert shown(other) == shown(whole)
        assert [e.key for e in other.arbitrary(12)] == by_hash(keys)[:12]
    everything = ranking("higher", keys, values, x, y, pool=100)
    # The other images are gone.
    assert len(pickle.dumps(second)) < 0.4 * len(pickle.dumps(everything))


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (1, (0, 1, 0)),
        (2, (0, 2, 0)),
        (3, (1, 1, 1)),
        (5, (1, 1, 1)),
        (11, (3, 3, 3)),
        (13, (4, 4, 4)),
    ],
)
def test_gallery_of_few_images_has_each_in_one_group_only(n, sizes):
    kept = ranking("higher", *pairs(n))
    groups = shown(kept)
    assert tuple(len(group) for group in groups.values()) == sizes
    everything = [key for group in groups.values() for key, _, _ in group]
    assert len(everything) == len(set(everything))
    assert len(kept.arbitrary(8)) == min(n, 8)


def test_gallery_ranks_infinite_values_and_ties():
    keys, _, x, y = pairs(9)
    kept = ranking("higher", keys, [math.inf] * 5 + [30.0] * 4, x, y, each=2, pool=9)
    groups = shown(kept)
    assert [value for _, value, _ in groups["worst"]] == [30, 30]
    assert [value for _, value, _ in groups["median"]] == [math.inf] * 2
    assert [key for key, _, _ in groups["worst"]] == by_hash(keys[5:])[:2]
    groups = shown(ranking("higher", keys, [math.inf] * 9, x, y, each=3, pool=9))
    assert sorted(key for group in groups.values() for key, _, _ in group) == keys  # none twice


def test_gallery_images_are_copied_out_of_their_batch():
    keys, values, x, y = pairs(9)
    kept = ranking("higher", keys, values, x, y)
    expected = shown(kept)
    x.zero_()
    y.zero_()
    assert shown(kept) == expected


def test_gallery_ranks_by_lpips_and_by_psnr_without_it():
    keys, values, x, y = pairs(6)
    x, y = (images.repeat(1, 1, 16, 16) for images in (x, y))  # 32 px
    scores = dict(zip(keys, values, strict=True))
    # LPIPS says little of so small images.
    for known, size, first in (
        ({"psnr": scores}, 32, min(values)),
        ({"psnr": scores, "lpips": scores}, 32, max(values)),
        (
            {"psnr": scores, "lpips": scores},
            16,
            min(values),
        ),
    ):
        observer = Gallery()
        for target, draw in (("a", 0), ("untrained", 0), ("a", 1)):
            observer.update(
                seen(target, keys, x[..., :size, :], y[..., :size, :], draw, values=known)
            )
        observer.update(seen("a", [*keys, "more"], values={}))  # without the metric
        other = Gallery()
        other.merge(pickle.loads(pickle.dumps(observer.state())))
        assert other.state()[0] == observer.state()[0]
        for gallery in (observer, other):
            assert list(gallery.rankings) == ["a"]  # nothing of the untrained
            assert gallery.rankings["a"].examples()["worst"][0].value == first
            assert gallery.result("a", 0) is None
    nothing = Gallery()
    nothing.update(seen("a", keys, x, y, values={}))
    assert not nothing.rankings


def test_the_section_and_the_figure_show_groups_and_arbitrary_images(tmp_path, monkeypatch):
    keys, values, x, y = pairs(5)
    observer = Gallery()
    page = SimpleNamespace(render=lambda name, **context: context)
    assert observer.section(page) is None
    assert observer.write(tmp_path, "") == {}
    observer.update(seen("untrained", keys, x, y, values={"psnr": dict.fromkeys(keys, 1.0)}))
    assert observer.section(page) is None
    for target, images in (("a", y), ("b", y + 10)):
        scores = dict(zip(keys, values, strict=True))
        observer.update(seen(target, keys, x, images, values={"psnr": scores}))

    # Of each target one image a group, three pictures each; four images beside both results.
    monkeypatch.setattr(module, "side_limit", lambda count: count)
    found = observer.section(page)
    assert [sorted(groups) for groups in found["groups"].values()] == [
        ["best", "median", "worst"]
    ] * 2
    assert found["limit"] == 2 * 3 * 3 + 4 * 3
    assert (found["metric"], found["unit"], len(found["beside"])) == ("PSNR", "dB", 4)
    for of_a, of_b in found["beside"]:
        assert (of_a.key, of_a.y[0, 0, 0] + 10) == (of_b.key, of_b.y[0, 0, 0])
    (worst,) = found["groups"]["b"]["worst"]
    triple = found["triple"](worst)
    assert [triple["input"] is worst.x, triple["reconstruction"] is worst.y] == [True, True]
    assert torch.equal(triple["error"], error_map(worst.x[None], worst.y[None])[0])

    # The figure: all five, in the order of hashes.
    (path,) = observer.write(tmp_path, "-x").values()
    assert path == tmp_path / "reconstructions-x.png"
    order = [keys.index(key) for key in by_hash(keys)]
    rows = {"input": x[order]}
    for target, images in (("a", y[order]), ("b", y[order] + 10)):
        rows[f"{target}: reconstruction"] = images
        rows[f"{target}: error, black 0 to white 64 of 255"] = error_map(x[order], images)
    assert np.array_equal(Image.open(path), labelled_grid(rows))
