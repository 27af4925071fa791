"""Parts of an encoding by a clock of the test's own: what each does, and for how many images."""

import pytest
import torch

from olvae.bench import encode_parts
from olvae.bench.encode_parts import FreeEncoder, encode_cases, time_part
from olvae.bench.measure import Setting, rows_of
from olvae.export.encode_inputs import DatasetInputs, Reader, ShardInputs
from olvae.export.encoding import EncodeJob
from tests.data.images import write_shards


@pytest.fixture
def eight(monkeypatch):
    """Encode eight images, not 256."""
    monkeypatch.setattr(encode_parts, "IMAGES_A_SHARD", 8)


def cases_of(*sources, workers=(0,)):
    names = [str(source) for source in sources]
    return encode_cases(Setting("cpu", 16, 4, sources=names, workers=workers))


def test_the_free_encoders_latent_is_every_eighth_pixel():
    x = torch.arange(3 * 16 * 24.0).view(1, 3, 16, 24)
    posterior = FreeEncoder().encode(x)
    picked = x[:, :, ::8, ::8]
    assert posterior.mean.shape == (1, 12, 2, 3)
    assert torch.equal(posterior.mean, picked.repeat(1, 4, 1, 1))
    with pytest.raises(NotImplementedError):
        FreeEncoder().decode(picked)


@pytest.mark.usefixtures("eight")
def test_each_source_has_its_parts_and_the_whole_for_each_number_of_readers(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (3, 2))
    cases = cases_of(image_folder, tmp_path / "shards", workers=(0, 2))
    parts = ["reading", "starting", "writing", "whole, 0 readers", "whole, 2 readers"]
    expected = [
        (str(source), part) for source in (image_folder, tmp_path / "shards") for part in parts
    ]
    assert [(case.name, case.variant) for case in cases] == expected
    assert {(case.images, case.size, case.batch_size) for case in cases} == {(1, 16, 4)}

    # The share of the rate of so many readers; reading has none of itself.
    assert [case.work for case in cases[:5]] == [1, 1, 1, 1, 0.5]
    assert not cases[0].limits
    assert all(case.limits == {"of_reading": cases[0]} for case in cases[1:5])
    assert all(case.limits == {"of_reading": cases[5]} for case in cases[6:])


@pytest.mark.usefixtures("eight")
def test_images_of_a_small_folder_are_taken_several_times_and_of_shards_the_first(
    tmp_path, image_folder
):
    for path in sorted(image_folder.rglob("*.png"))[3:]:
        path.unlink()
    write_shards(tmp_path / "shards", (3, 2))
    folder = cases_of(image_folder)[0].run.args[1]
    assert isinstance(folder, DatasetInputs)
    keys = [item.key for item in folder.read(0)]
    assert len(keys) == 8
    assert keys[3:6] == keys[:3]
    shards = cases_of(tmp_path / "shards")[0].run.args[1]
    assert isinstance(shards, ShardInputs)
    assert [shard.name for shard in shards.shards] == ["000"]


@pytest.mark.usefixtures("eight")
def test_the_seconds_of_a_part_are_its_own_and_of_an_image(image_folder, monkeypatch):
    """A clock that advances by 8 seconds with each step of a part."""
    done: list[str] = []
    monkeypatch.setattr(encode_parts, "now", lambda _: 8.0 * len(done))
    read, start, write = Reader.__getitem__, EncodeJob.started, EncodeJob.write
    monkeypatch.setattr(
        Reader, "__getitem__", lambda self, unit: done.append("reading") or read(self, unit)
    )
    monkeypatch.setattr(
        EncodeJob, "started", lambda self, *args: done.append("starting") or start(self, *args)
    )
    monkeypatch.setattr(
        EncodeJob, "write", lambda self, *args: done.append("writing") or write(self, *args)
    )
    cases = cases_of(image_folder)
    setting, inputs = cases[0].run.args[:2]
    seconds = {}
    for case in cases:
        done.clear()
        (seconds[case.variant],) = time_part(setting, inputs, case.variant, 0)
    # Two units of four images are read, eight images are started once, and written once.
    assert seconds == {
        "reading": 2.0,
        "starting": 1.0,
        "writing": 1.0,
        "whole, 0 readers": 4.0,
    }


@pytest.mark.usefixtures("eight")
def test_a_row_has_the_rate_and_its_share_of_reading(image_folder):
    rows = rows_of("encode", cases_of(image_folder), "cpu", 1, False)
    reading, *others = rows
    assert reading["images_per_s"] > 0
    for row in others:
        share = row["images_per_s"] / reading["images_per_s"]
        assert row["of_reading"] == pytest.approx(share, rel=1e-6)
