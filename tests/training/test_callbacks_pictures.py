"""The picture of a validation: which images are in it, how they are decoded, where it goes."""

import logging
from types import SimpleNamespace

import pytest
import torch

from olvae.data.pixels.size_and_range import EIGHT_BITS, from_uint8, to_uint8
from olvae.figures import error_map
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training import callbacks
from olvae.training.callbacks import ImageGrids
from tests.models.steps import build


@pytest.fixture(scope="module")
def model() -> LiteAutoencoderKL:
    return build().eval()


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The rows of each picture, and what loggers get."""
    found: list = []
    grid = SimpleNamespace(save=lambda path: path.write_text("picture"))
    monkeypatch.setattr(callbacks, "labelled_grid", lambda rows: found.append(rows) or grid)
    monkeypatch.setattr(
        callbacks, "log_picture", lambda *given: found.append((given[0], given[1], given[3]))
    )
    return found


def trainer_in(folder, **changes) -> SimpleNamespace:
    (folder / "images").mkdir(exist_ok=True)
    settings = {"sanity_checking": False, "is_global_zero": True, "global_step": 7}
    return SimpleNamespace(default_root_dir=folder, loggers=["a", "b"], **{**settings, **changes})


def show(grids: ImageGrids, batches: list[dict], trainer, model) -> None:
    grids.on_validation_epoch_start()
    for number, batch in enumerate(batches):
        grids.on_validation_batch_end(trainer, model, None, batch, number)
    grids.on_validation_epoch_end(trainer, model)


def batches_of(*sizes: int, **more) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (sum(sizes), 3, 16, 16), dtype=torch.uint8, generator=generator)
    parts = {name: tensor.split(sizes) for name, tensor in more.items()}
    return [
        {"image": image, **{name: tensors[number] for name, tensors in parts.items()}}
        for number, image in enumerate(images.split(sizes))
    ]


@pytest.mark.parametrize(
    ("sizes", "count", "shown"), [((2, 2, 2), 3, 3), ((4, 2), 4, 4), ((1, 1), 8, 2), ((3,), 1, 1)]
)
@torch.no_grad()
def test_a_picture_has_the_first_images_by_hand(tmp_path, model, drawn, sizes, count, shown):
    grids = ImageGrids(count)
    batches = batches_of(*sizes)
    for _ in range(2):  # the second picture begins anew
        drawn.clear()
        show(grids, batches, trainer_in(tmp_path), model)
        rows, *logged = drawn
        x = torch.cat([batch["image"] for batch in batches])[:shown]
        decoded, posterior = model(from_uint8(x))
        y = to_uint8(decoded)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        samples = to_uint8(model.decode(noise))
        for row, images in zip(rows.values(), (x, y, None, samples), strict=True):
            expected = error_map(x, y) if images is None else EIGHT_BITS.picture(images)
            assert torch.equal(row, expected)
        assert "step 7" in next(iter(rows))
        assert logged == [("a", "val/images", 7), ("b", "val/images", 7)]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["step=00000007.png"]


@torch.no_grad()
def test_a_picture_is_of_the_latents_that_the_data_bring(tmp_path, model, drawn, monkeypatch):
    moments = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 8, 2, 2)
    given = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, x, moments=None: given.append(moments) or forward(self, x),
    )
    show(ImageGrids(3), batches_of(2, 2, moments=moments), trainer_in(tmp_path), model)
    assert torch.equal(given[0], moments[:3])


@pytest.mark.parametrize("change", [{"sanity_checking": True}, {"is_global_zero": False}, None])
def test_no_picture_of_a_trial_another_process_or_no_image(tmp_path, model, drawn, change):
    batches = [] if change is None else batches_of(2)
    show(ImageGrids(), batches, trainer_in(tmp_path, **(change or {})), model)
    assert drawn == []
    assert not any((tmp_path / "images").iterdir())


def test_a_picture_that_cannot_be_written_stops_no_training(tmp_path, model, drawn, caplog):
    trainer = trainer_in(tmp_path)
    (tmp_path / "images").rmdir()
    with caplog.at_level(logging.WARNING, "olvae.training"):
        show(ImageGrids(1), batches_of(1), trainer, model)
    assert "step=00000007.png: not written" in caplog.text
    assert len(drawn) == 3  # the loggers get it


def test_a_picture_has_an_image_at_least():
    with pytest.raises(ValueError, match=r"count must .*0"):
        ImageGrids(0)
