"""``olvae evaluate --zoo``, with tiny random models in a local folder in place of the published ones."""

import json
from pathlib import Path

import diffusers
import pytest

from olvae.evaluation import zoo
from olvae.evaluation.zoo import read_zoo
from olvae.models.loading import from_diffusers
from olvae.models.spec import CLASS_NAME
from olvae.models.target_names import SHIPPED, SHIPPED_FOLDER
from tests.cli.test_evaluate import content
from tests.conftest import smooth_pictures
from tests.models.loading.classes import CLASSES, make

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
FLAGS = ("--size", 64, "--metrics", "psnr", "--no-report", "--observe", "colour")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No hub, and models measured on small images."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(from_diffusers, "PROBE", 64)


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(smooth_pictures()[:2]):
        picture.save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def test_several_processes_are_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("olvae.evaluation.zoo.this_process", lambda: (0, 2))
    line = refused(
        2, "evaluate", "--zoo", "taesd", "--data", "samples", *FLAGS, "--out", tmp_path / "out"
    )
    assert "--zoo runs in one process" in line


def test_copies_in_a_folder_two_missing_and_continued(olvae, done, pictures, tmp_path, monkeypatch):
    for name, kind in {
        "taesd": "AutoencoderTiny",
        "wan-2.1": "AutoencoderKLWan",
        "taef1": "AutoencoderTiny",
    }.items():
        make(kind).save_pretrained(tmp_path / "copies" / name)
    whole, run = ["wan-2.1", "taesd"], zoo.evaluate
    monkeypatch.setattr(
        zoo, "evaluate", lambda one, _: run(one) if one.targets[0].name in whole else {}["bn"]
    )
    command = (
        "evaluate",
        "--data",
        pictures,
        "--weights-dir",
        tmp_path / "copies",
        *FLAGS,
        "--out",
        tmp_path / "out",
    )
    command = (*command, "--metrics", "psnr,lpips")
    monkeypatch.setattr("sys.argv", ["olvae", "evaluate", "--data", "a b"])
    err = done(*command, "--zoo", "wan-2.1,taesd,sdxl,taef1")
    assert "no such file or folder here" in err
    rows = {row["target"]: row for row in content(tmp_path / "out")["results"]}
    assert list(rows) == ["wan-2.1", "taesd"]
    entry = {"class": "AutoencoderKLWan", "latent": "f4, 4", "licence": "apache-2.0"}
    assert rows["wan-2.1"]["zoo"] == entry
    assert rows["wan-2.1"].keys() >= {"colour", "bands"}
    page = (tmp_path / "out" / "zoo.md").read_text()
    assert "Made by `olvae evaluate --data 'a b'`, which" in page
    assert (
        len([line for line in page.splitlines() if line.startswith("- not here: ")]) == 2
    )  # reasons
    line = next(line for line in page.splitlines() if line.startswith("| wan-2.1 |"))
    for text in (*entry.values(), f"{rows['wan-2.1']['metrics']['psnr']:.3f}"):
        assert f"| {text} " in line
    assert (
        "- not here: sdxl (diffusers:stabilityai/sdxl-vae, AutoencoderKL, f8, 4 channels, mit): no such file"
        in page
    )
    assert (
        "- not here: taef1 (diffusers:madebyollin/taef1, AutoencoderTiny, f8, 16 channels, mit): 'bn'"
        in page
    )

    whole.append("taef1")
    done(*command, "--zoo", "taef1,taesd")
    again = content(tmp_path / "out")["results"]
    assert [row["target"] for row in again] == ["wan-2.1", "taesd", "taef1"]
    assert again[:2] == list(rows.values())
    code, _, err = olvae(
        *command, "--zoo", "taesd", "--images", "1", "--size", "48", "--precision", "bf16"
    )
    assert code == 2
    assert (
        f"--out {tmp_path / 'out'}: has results of other --size, --images, --precision: name another folder"
        in err
    )
    code, _, err = olvae(*command, "--zoo", "taesd", "--observe", "text")
    assert (
        code,
        f"--out {tmp_path / 'out'}: has results of other --observe: name another folder" in err,
    ) == (2, True)
    monkeypatch.setattr(
        zoo, "find_weights", lambda *_: Path()
    )  # what lacks LPIPS is evaluated again
    (pictures / "1.png").write_bytes((pictures / "0.png").read_bytes())
    code, _, err = olvae(*command, "--zoo", "taesd")
    assert code == 2
    assert (
        f"--out {tmp_path / 'out'}: has results of other `files of data`: name another folder"
        in err
    )
    assert content(tmp_path / "out" / "taesd")["results"] == [rows["taesd"]]


@pytest.mark.slow
def test_every_class_that_people_use(done, pictures, tmp_path):
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
    assert "takes images of 4 channels, the others 3" in err
    assert found.items() >= {(name, kind) for name, kind in kinds.items() if name not in missing}


NEEDED = (
    "name TARGETs, as last, or --zoo with --data, --out and one --protocol, without --baselines"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--zoo", "flux3", "--data", ".", "--out", "x", *FLAGS),
            "--zoo flux3: not in the list, which has photos",
        ),
        (("--zoo", "--data", ".", "demo", "--out", "x"), NEEDED),
        (("--zoo", "--out", "x"), NEEDED),
        ((), NEEDED),
        (
            ("--zoo", "sdxl", "--data", ".", "--out", "x", *FLAGS),
            "stabilityai/sdxl-vae: no such file or folder here",
        ),
        (
            ("--zoo", "sdxl", "--data", ".", "--out", "x"),
            "pt_inception-2015-12-05-6726825d.pth is not in",
        ),
    ],
)
def test_mistakes(olvae, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    code, _, err = olvae("evaluate", *arguments)
    assert code in (1, 2)
    assert f"error: {message}" in err
    assert not (tmp_path / "x").exists()


def test_the_list_and_the_page():
    """Our own models come first, with the figures of their cards; every other entry is a row, or the page says why."""
    entries, page = read_zoo(), PAGE.read_text(encoding="utf-8")
    own = [entry.name for entry in entries if entry.target.startswith(SHIPPED)]
    assert sorted(own) == sorted(
        config.parent.name for config in SHIPPED_FOLDER.glob("*/config.json")
    )
    assert [entry.name for entry in entries[: len(own)]] == own
    for entry in entries:
        assert entry.kind in CLASSES or entry.kind == CLASS_NAME
        assert (
            f"| {entry.name} |" in page or f"{entry.name} ({entry.target}, {entry.kind}, " in page
        )
    for name in own:
        card = json.loads((SHIPPED_FOLDER / name / "metrics.json").read_text())
        assert f"| {name} | 39 | {card['results'][0]['metrics']['psnr']:.3f} " in page
