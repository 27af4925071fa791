"""No patient on both sides: ``hold_out_by`` through the commands, as a user types them."""

import csv
import json
import tarfile
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from olvae.config import save
from olvae.data.shards.latent_source import PairSource
from tests.conftest import tiny_config

PATTERN = r"(?P<group>patient\d+)"


@pytest.fixture
def patients(tmp_path):
    """Forty slices of each of three patients, named as exports of scanners name them."""
    rng = np.random.default_rng(0)
    for patient in range(1, 4):
        folder = tmp_path / "ct" / f"patient{patient}"
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 80 * patient, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return tmp_path / "ct"


def patients_in(shard) -> set[str]:
    """By the names in the files of an image's details."""
    found = set()
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith("json"):
                details = json.load(tar.extractfile(member))
                found.add((details.get("name") or details["key"]).split("/")[0])
    return found


def test_no_patient_is_trained_on_and_held_out(done, patients, tmp_path, caplog):
    save(tiny_config(), tmp_path / "tiny.yaml")
    train = ["train", "--base", tmp_path / "tiny.yaml", "--gpus", "0", "--data", patients]
    split = ["lightning.trainer.max_steps=1", "data.params.hold_out_by=folder"]
    err = done(*train, "--logdir", tmp_path / "runs", *split)
    assert "80 training, 40 validation" in err
    assert not [line for line in caplog.messages if "like slices" in line]


def test_an_evaluation_and_pairs_keep_patients_together(done, trained, patients, tmp_path):
    """An evaluation draws patients, not slices: 1 of 27 draws of three is the worst one alone, more
    than the interval leaves out, so it ends at that patient's mean; likewise at the best one's."""
    config = tiny_config(patients)
    config["data"]["params"] |= {"hold_out_by": "folder", "val_root": str(patients)}
    save(config, tmp_path / "ct.yaml")
    evaluate = ("evaluate", trained, "--metrics", "psnr", "--out", tmp_path / "out", "--data")
    done(*evaluate, tmp_path / "ct.yaml")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (content["images"]["n"], content["images"]["groups"]) == (120, 3)
    values = defaultdict(list)
    with (tmp_path / "out" / "per_image.csv").open() as file:
        for line in csv.DictReader(file):
            values[line["key"].split("/")[0]].append(float(line["psnr"]))
    means = [np.mean(found) for found in values.values()]
    interval = content["results"][0]["intervals"]["psnr"]
    assert interval == pytest.approx([min(means), max(means)], rel=1e-9)

    # Pairs of a teacher's latents and their images.
    pairs = ("--images", "--out", tmp_path / "pairs", "--size", 16, "--hold-out-by", PATTERN)
    done("encode", trained, "--data", patients, *pairs)
    shards = sorted((tmp_path / "pairs").glob("*.tar"))
    assert [len(patients_in(shard)) for shard in shards] == [1, 1, 1]
    source = PairSource(tmp_path / "pairs", 8)
    assert (source.samples_per_epoch, source.val_images) == (80, 40)
    assert {group for batch in source.val_loader() for group in batch["group"]} == {"patient3"}


def test_shards_keep_patients_whole_and_a_check_finds_those_that_do_not(
    olvae, done, refused, patients, tmp_path, caplog
):
    together, apart = tmp_path / "together", tmp_path / "apart"
    done("data", "pack", patients, "--out", together, "--hold-out-by", PATTERN)
    assert [len(patients_in(shard)) for shard in sorted(together.glob("*.tar"))] == [1, 1, 1]
    code, _, err = olvae("data", "check", together, "--size", 16, "--json")
    assert (code, err) == (0, "")

    # Packed as before, with a warning: slices of a patient are in the shards of both sides.
    done("data", "pack", patients, "--out", apart)
    (line,) = caplog.messages
    assert line.startswith("120 files look like slices of 3 things, such as patient1/*")
    assert line.endswith("here for example to 'folder'")
    check = ("data", "check", apart, "--size", 16, "--hold-out-by", "folder", "--json")
    code, out, _ = olvae(*check)
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert problem.startswith(
        "3 groups by `hold_out_by` with images of training and of validation: patient1, "
    )

    # Training by groups takes the first ones alone.
    save(tiny_config(), tmp_path / "tiny.yaml")
    train = ("train", "--base", tmp_path / "tiny.yaml", "--logdir", tmp_path / "runs", "--gpus", 0)
    err = refused(1, *train, "--data", apart, f"data.params.hold_out_by={PATTERN}")
    assert "`hold_out_by` (?P<group>patient" in err


def test_a_check_finds_a_patient_in_both_folders_of_a_data_set(olvae, patients):
    for part, names in (("train", ["patient1", "patient2"]), ("val", ["patient3"])):
        (patients / part).mkdir()
        for name in names:
            (patients / name).rename(patients / part / name)
    check = ("data", "check", patients, "--size", 16, "--hold-out-by", PATTERN, "--json")
    assert olvae(*check)[0] == 0
    slices = sorted((patients / "train" / "patient2").iterdir())
    (patients / "val" / "more").mkdir()
    slices[0].rename(patients / "val" / "more" / f"patient2_{slices[0].name}")
    code, out, _ = olvae(*check)
    assert code == 1
    assert json.loads(out)["problems"] == [
        "1 group by `hold_out_by` with images of training and of validation: patient2: keep each "
        "on one side"
    ]
