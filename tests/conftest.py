"""What tests share: one thread per worker, determinism, small models and configs."""

import copy
import gc
import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from olvae.files import SIGNALS
from olvae.pool import SharedProgress, run_in_processes
from tests.browser import browser  # noqa: F401  (a fixture)
from tests.models.parts.vision import vit  # noqa: F401  (a fixture)
from tests.pretrained import nowhere, vgg19, weights_dir  # noqa: F401  (fixtures)

if TYPE_CHECKING:
    from olvae import LiteVAE

torch.set_num_threads(1)
# Collections of torch's and Lightning's objects were a tenth of the time.
gc.set_threshold(700, 10, 100)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out, where there is no fork, what needs it, or else POSIX."""
    if not hasattr(os, "fork"):
        for item in items:
            if item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason="needs POSIX"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        # torch would keep a stack for each kind of device, in case it is used later.
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Handlers that a command leaves do not stay."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def _lasting() -> Iterator[None]:
    """Caches that a module's tests leave are looked at by no later collection, nor copied by forks
    for its sake.
    """
    yield
    if len(gc.get_objects()) > 200_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def usual_probe() -> Iterator[int]:
    """Measure reading speeds for a moment, diffusers' autoencoders on images smaller than a
    user's, of this side; trainers look for no other package's callbacks.
    """
    from lightning.pytorch.trainer.connectors import callback_connector

    from olvae.data import audit
    from olvae.models.loading import from_diffusers

    usual = from_diffusers.PROBE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "MEASURE_S", 0.01)
        patch.setattr(from_diffusers, "PROBE", 32)
        patch.setattr(callback_connector, "_load_external_callbacks", lambda _: [])
        yield usual


@pytest.fixture(scope="session", autouse=True)
def _nothing_drawn_on_meta() -> Iterator[None]:
    """Weights of the meta device get no first values: for nothing they took longer than real ones
    do, before each autoencoder that is loaded.
    """

    def unless_meta(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(draw)
        def drawn(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(nn.init, name, unless_meta(getattr(nn.init, name)))
        yield


def skip_power_iterations(patch: pytest.MonkeyPatch) -> None:
    """Those of spectral norm at its start take long on the meta device, and change no count."""
    patch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)


@pytest.fixture(scope="session")
def network_rows() -> list[Any]:
    """What ``network_table`` counts, once."""
    from olvae.bench.cases import network_table

    with pytest.MonkeyPatch.context() as patch:
        skip_power_iterations(patch)
        return network_table()


@pytest.fixture(scope="session")
def quick_training() -> Iterator[None]:
    """Trainings here plot no curves, count no MACs, fork no loaders, fit to few crops, measure
    teachers on few, and draw two small images; encodings fork no readers, and latents have no
    picture.

    Else that is most of the time of a tiny one. A session's, for the fixtures that train;
    :func:`whole_training` has curves and MACs.
    """
    from olvae.cli import encode
    from olvae.evaluation import latent_report
    from olvae.models import linear_code
    from olvae.models.parts import teacher
    from olvae.training import callbacks, processes, summary

    def unplotted(curves: Mapping[str, Any], path: Path) -> None:
        assert all(len(steps) == len(values) > 0 for steps, values in curves.values())
        path.touch()

    whole_grid = callbacks.labelled_grid

    def small_grid_of_two(rows: Mapping[str, Tensor]) -> Image.Image:
        return whole_grid({name: row[:2] for name, row in rows.items()}).reduce(8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "plot_curves", unplotted)
        patch.setattr(summary, "count_macs", lambda *_: 0)
        patch.setattr(processes, "MOST_WORKERS", 0)
        patch.setattr(linear_code, "CROPS", (256, 512))
        patch.setattr(teacher, "STD_IMAGES", 16)
        patch.setattr(encode, "MOST_READERS", 0)
        patch.setattr(callbacks, "labelled_grid", small_grid_of_two)
        patch.setattr(latent_report, "draw_distribution", lambda _, path: path.touch())
        yield


@pytest.fixture
def whole_training(quick_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of this test are whole: with curves and MACs."""
    from olvae.figures import plot_curves
    from olvae.modules.counting import count_macs
    from olvae.training import summary

    monkeypatch.setattr(summary, "plot_curves", plot_curves)
    monkeypatch.setattr(summary, "count_macs", count_macs)


def run_here(
    function: Callable[[Any, Any], Any],
    tasks: Sequence[Any],
    workers: int,
    on_progress: Callable[[int], None],
) -> list[Any]:
    """Stand in for ``run_in_processes``, whose forks take longer than what small tasks do."""
    progress = SharedProgress(multiprocessing)
    results = []
    for task in tasks:
        results.append(function(task, progress))
        on_progress(progress.count.get_obj().value)
    return results


def read_by(patch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Let checks, packs and indexes of shards run their tasks by this function."""
    from olvae.data import audit, packing
    from olvae.data.shards import indexing

    for module in (audit, packing, indexing):
        patch.setattr(module, "run_in_processes", run)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks, packs and indexes of shards read here: processes of a pool have their own tests."""
    read_by(monkeypatch, run_here)


@pytest.fixture
def processes(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read in processes, in a file whose other tests have one."""
    read_by(monkeypatch, run_in_processes)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Let no file of this process grow beyond a number of bytes, inside of a ``with`` block."""

    import resource

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def smooth_pictures() -> list[Image.Image]:
    """Twelve random ones of 48x40."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC) for small in colours]


@cache
def smooth_files() -> list[bytes]:
    """The same as PNG."""
    files = []
    for picture in smooth_pictures():
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve smooth random pictures of 48x40 in nested folders."""
    root = tmp_path / "photos"
    for i, file in enumerate(smooth_files()):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(file)
    return root


TINY_ENCODER = {
    "extractor_channels": 8,
    "extractor_mult": [1],
    "extractor_resblocks": 1,
    "aggregate_channels": 8,
    "aggregate_mult": [1, 2],
    "aggregate_resblocks": 1,
    "image_size": 16,
}
"""The arguments of a LiteVAE_Encoder as narrow as can be."""


def one_width() -> dict[str, Any]:
    """The tiny encoder's node with UNets of one width, of fewer tensors to be built, written and
    read.
    """
    node: dict[str, Any] = tiny_config()["model"]["params"]["encoder_config"]
    node["params"]["aggregate_mult"] = [1]
    return node


def part_module(name: str) -> str:
    """The module of a part of the package, in whichever folder below ``parts`` it is."""
    root = Path(__file__).parents[1]
    (path,) = (root / "olvae" / "models" / "parts").rglob(f"{name}.py")
    return ".".join(path.relative_to(root).with_suffix("").parts)


def parts(**params: dict[str, Any] | None) -> dict[str, Any]:
    """Nodes of the package's parts with these arguments, by the names of their modules;
    None removes one.
    """
    return {
        name: None
        if arguments is None
        else {
            "target": f"{part_module(name)}.{name.title().replace('_', '')}",
            "params": arguments,
        }
        for name, arguments in params.items()
    }


def tiny_config(root: Path | str | None = None, **model: Any) -> dict[str, Any]:
    """A config that trains in a second: a narrow encoder and decoder on 16-pixel crops."""
    encoder = "olvae.modules.litevae.encoder_model.LiteVAE_Encoder"
    decoder = {
        "channels": 8,
        "z_channels": 4,
        "channel_mult": [1, 1, 1, 1],
        "num_res_blocks": 0,
        "output": "wavelet",
    }
    data: dict[str, Any] = {
        "target": "olvae.data.dataset.SamplePhotographs",
        "params": {"size": 16, "batch_size": 4},
    }
    if root is not None:
        data["target"] = "olvae.data.picture_folder.FolderSource"
        data["params"] |= {"root": str(root), "val_fraction": 0.2}
    return {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "olvae.models.liteautoencoder.LiteAutoencoderKL",
            "params": {
                "embed_dim": 4,
                "encoder_config": {"target": encoder, "params": copy.deepcopy(TINY_ENCODER)},
                "decoder_config": {
                    "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
                    "params": decoder,
                },
                "lossconfig": {
                    "target": "olvae.losses.objective.Objective",
                    "params": {"lpips_weight": 0},
                },
                **model,
            },
        },
        "data": data,
        "lightning": {"trainer": {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}},
    }


def plain_networks() -> dict[str, Any]:
    """A few convolutions, for what does not depend on the networks, as signals and checkpoints."""
    encoder = one_width()
    encoder["params"] |= {"packets": True, "extractor_resblocks": 0, "aggregate_resblocks": 0}
    return {
        "encoder_config": encoder,
        "decoder_config": {
            "target": "olvae.modules.others.tiny.TinyDecoder",
            "params": {"channels": 8, "z_channels": 4, "blocks": [0, 0, 0, 0]},
        },
    }


def plain_config(root: Path | str | None = None, **model: Any) -> dict[str, Any]:
    """As :func:`tiny_config`'s, on plain networks: it trains in half of the time."""
    return tiny_config(root, **{**plain_networks(), **model})


def tiny(**model: Any) -> "LiteVAE":
    """The autoencoder of :func:`tiny_config`, with fresh weights, in evaluation mode."""
    from olvae import LiteVAE

    params = tiny_config(**model)["model"]["params"]
    return LiteVAE.from_config(
        **{key: value for key, value in params.items() if key != "lossconfig"}
    ).eval()


@contextmanager
def trained_in(folder: Path, make_config: Callable[[Path], dict[str, Any]]) -> Iterator[Path]:
    """A run folder after two steps, on a folder of twelve pictures, both in this folder."""
    from olvae.cli.main import main
    from olvae.config import save
    from olvae.training import run as training

    (folder / "photos").mkdir()
    for i, picture in enumerate(smooth_pictures()):
        picture.save(folder / "photos" / f"{i}.png")
    save(make_config(folder / "photos"), folder / "tiny.yaml")
    arguments = ["--base", folder / "tiny.yaml", "--logdir", folder / "runs", "--gpus", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(training.RUN_ENV, "")  # so that what training sets is taken back
        with pytest.raises(SystemExit) as leaving:
            main(["train", *map(str, arguments), "lightning.trainer.max_steps=2"])
        assert leaving.value.code == 0
        yield next((folder / "runs").iterdir())


def narrow_config(root: Path) -> dict[str, Any]:
    """As :func:`tiny_config`'s, with UNets of one width."""
    return tiny_config(root, encoder_config=one_width())


@pytest.fixture(scope="session")
def trained(tmp_path_factory, quick_training) -> Iterator[Path]:
    """A run folder after two steps, on a folder of twelve pictures beside it; not to be changed.

    Most tests of commands read its last checkpoint, which for their sake has few tensors: UNets of
    one width, and no optimizer's state, which is in its best one.
    """
    with trained_in(tmp_path_factory.mktemp("trained"), narrow_config) as run:
        last = run / "checkpoints" / "last.ckpt"
        content = torch.load(last, weights_only=True)
        for optimizer in content["optimizer_states"]:
            optimizer["state"].clear()
        torch.save(content, last)
        yield run
