"""``olvae evaluate --zoo``, with tiny random models in a local folder in place of the published
ones."""

import shutil
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest

from olvae.evaluation import zoo
from olvae.evaluation.zoo import read_zoo
from olvae.models.loading import from_diffusers
from olvae.models.target_names import SHIPPED
from tests.cli.conftest import Ended, run_once
from tests.cli.test_evaluate import content
from tests.conftest import smooth_pictures
from tests.models.loading.classes import CLASSES, make

FLAGS = ("--size", 64, "--metrics", "psnr", "--no-report", "--observe", "colour")


@pytest.fixture(scope="module", autouse=True)
def _offline():
    """No hub, and models measured on small images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(from_diffusers, "PROBE", 64)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(smooth_pictures()[:2]):
        picture.save(folder / f"{i}.png")
    return folder


COPIES = {"taesd": "AutoencoderTiny", "wan-2.1": "AutoencoderKLWan", "taef1": "AutoencoderTiny"}


class Zoo(NamedTuple):
    """An evaluation of the zoo, not to be changed: the command without what goes out, and that."""

    command: tuple[object, ...]
    out: Path
    ended: Ended


@pytest.fixture(scope="module")
def zoo_of_two(pictures, tmp_path_factory) -> Zoo:
    """Of four models, whose copies are in a folder, one is not there and one fails."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, kind in COPIES.items():
        make(kind).save_pretrained(folder / "copies" / name)
    whole, run = ("wan-2.1", "taesd"), zoo.evaluate
    command = ("evaluate", "--data", pictures, "--weights-dir", folder / "copies", *FLAGS)
    command = (*command, "--metrics", "psnr,lpips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            zoo, "evaluate", lambda one, _: run(one) if one.targets[0].name in whole else {}["bn"]
        )
        patch.setattr("sys.argv", ["olvae", "evaluate", "--data", "a b"])
        ended = run_once(*command, "--out", folder / "out", "--zoo", "wan-2.1,taesd,sdxl,taef1")
    return Zoo(command, folder / "out", ended)


def results(out: Path) -> dict[str, dict]:
    return {row["target"]: row for row in content(out)["results"]}


def test_zoo_refuses_several_processes(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("olvae.evaluation.zoo.this_process", lambda: (0, 2))
    line = refused(
        2, "evaluate", "--zoo", "taesd", "--data", "samples", *FLAGS, "--out", tmp_path / "out"
    )
    assert "one process" in line


def test_zoo_has_a_row_for_each_copy_and_a_reason_for_each_that_is_missing(zoo_of_two):
    code, _, err = zoo_of_two.ended
    assert code == 0, err
    assert "no such file" in err
    rows = results(zoo_of_two.out)
    assert list(rows) == ["wan-2.1", "taesd"]
    entry = {"class": "AutoencoderKLWan", "latent": "f4, 4", "licence": "apache-2.0"}
    assert rows["wan-2.1"]["zoo"] == entry
    assert rows["wan-2.1"].keys() >= {"colour", "bands"}
    page = (zoo_of_two.out / "zoo.md").read_text()
    assert "`olvae evaluate --data 'a b'`" in page
    line = next(line for line in page.splitlines() if line.startswith("| wan-2.1 |"))
    for text in (*entry.values(), f"{rows['wan-2.1']['metrics']['psnr']:.3f}"):
        assert f"| {text} " in line
    reasons = [line for line in page.splitlines() if line.startswith("- not here: ")]
    assert len(reasons) == 2
    assert (
        "- not here: sdxl (diffusers:stabilityai/sdxl-vae, AutoencoderKL, f8, 4 channels, mit): "
        in page
    )
    assert (
        "- not here: taef1 (diffusers:madebyollin/taef1, AutoencoderTiny, f8, 16 channels, mit): "
        in page
    )


def test_zoo_continues_with_the_models_that_are_missing(done, zoo_of_two, tmp_path):
    out = shutil.copytree(zoo_of_two.out, tmp_path / "out")
    before = content(out)["results"]
    done(*zoo_of_two.command, "--out", out, "--zoo", "taef1,taesd")
    again = content(out)["results"]
    assert [row["target"] for row in again] == ["wan-2.1", "taesd", "taef1"]
    assert again[:2] == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--images", "1", "--size", "48", "--precision", "bf16"), "--size, --images, --precision"),
        (("--observe", "text"), "--observe"),
    ],
)
def test_zoo_refuses_a_folder_with_results_of_other_settings(olvae, zoo_of_two, more, named):
    out = zoo_of_two.out
    code, _, err = olvae(*zoo_of_two.command, "--out", out, "--zoo", "taesd", *more)
    assert code == 2
    assert f"--out {out}: has results of other {named}: " in err


def test_zoo_refuses_a_folder_with_results_of_other_images(
    olvae, zoo_of_two, pictures, tmp_path, monkeypatch
):
    """What lacks LPIPS is evaluated again, once its network is here."""
    out = shutil.copytree(zoo_of_two.out, tmp_path / "out")
    before = results(out)["taesd"]
    monkeypatch.setattr(zoo, "find_weights", lambda *_: Path())
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes((pictures / "0.png").read_bytes())
    try:
        code, _, err = olvae(*zoo_of_two.command, "--out", out, "--zoo", "taesd")
    finally:
        (pictures / "1.png").write_bytes(whole)
    assert code == 2
    assert f"--out {out}: has results of other `files of data`: " in err
    assert content(out / "taesd")["results"] == [before]


@pytest.mark.slow
def test_zoo_evaluates_every_class_of_its_list(done, pictures, tmp_path):
    """By the command that fills the table; the RAE needs transformers."""
    kinds = {entry.name: entry.kind for entry in read_zoo() if not entry.target.startswith(SHIPPED)}
    for name, kind in kinds.items():
        if kind in CLASSES and hasattr(diffusers, kind):
            make(kind).save_pretrained(tmp_path / "copies" / name)
    command = (
        "evaluate",
        "--zoo",
        "--data",
        pictures,
        "--weights-dir",
        tmp_path / "copies",
        *FLAGS,
    )
    err = done(*command, "--out", tmp_path / "out")
    found = {row["target"]: row["zoo"]["class"] for row in content(tmp_path / "out")["results"]}
    missing = {entry.name for entry in read_zoo()} - found.keys()
    assert missing == {"rae", "qwen-image-2.1", "open-litevae"}
    assert "4 channels, the others 3" in err
    assert found.items() >= {(name, kind) for name, kind in kinds.items() if name not in missing}


NEEDED = (
    "name TARGETs, as last, or --zoo with --data, --out and one --protocol, without --baselines"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--zoo", "flux3", "--data", "photos", "--out", "x", *FLAGS),
            "--zoo flux3: not in the list, which has photos",
        ),
        (("--zoo", "--data", "photos", "demo", "--out", "x"), NEEDED),
        (("--zoo", "--out", "x"), NEEDED),
        ((), NEEDED),
        (
            ("--zoo", "sdxl", "--data", "photos", "--out", "x", *FLAGS),
            "stabilityai/sdxl-vae: no such file or folder here",
        ),
        (
            ("--zoo", "sdxl", "--data", "photos", "--out", "x"),
            "pt_inception-2015-12-05-6726825d.pth is not in",
        ),
    ],
)
def test_zoo_refuses_wrong_arguments(olvae, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    code, _, err = olvae("evaluate", *arguments)
    assert code in (1, 2)
    assert f"error: {message}" in err
    assert not (tmp_path / "x").exists()
