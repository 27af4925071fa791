"""``olvae evaluate`` as a user types it, on a run that was trained for two steps."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from olvae.cli.evaluate import results_folder
from olvae.cli.main import main
from olvae.config import ConfigError
from olvae.evaluation import round_trip
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import Results
from olvae.evaluation.runner import Request, evaluate
from olvae.models.loading.targets import find_target
from olvae.modules.counting import count_macs
from olvae.runs import Run
from tests.conftest import tiny
from tests.evaluation.peers import kl
from tests.forks import fork_ranks
from tests.models.loading.test_targets import taesd
from tests.soak.killed import killed_before

PIXELS = ("--metrics", "psnr,ssim,l1", "--no-report")


def content(folder: Path, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


def metrics(folder: Path) -> list[dict[str, float]]:
    return [row["metrics"] for row in content(folder)["results"]]


def test_evaluate_leaves_metrics_tables_and_pictures(olvae, trained, photos, tmp_path, caplog):
    code, out, err = olvae(
        "evaluate", trained, "--data", photos, "--out", tmp_path, "--baselines", "--json"
    )
    assert code == 0
    result = content(tmp_path)
    assert json.loads(out) == result
    assert result["protocol"]["n"] == result["images"]["n"] == 12
    assert [row["target"] for row in result["results"]] == [
        trained.name,
        "linear, 4 numbers for 8x8 pixels",
        "bicubic, 8x smaller and back",
        "untrained",
    ]
    for row in result["results"]:
        assert row["metrics"].keys() == {"psnr", "ssim", "l1"}
        assert row["skipped"].keys() == {"ms_ssim", "lpips", "lpips_alex", "rfid", "kid"}
        assert all(
            low < row["metrics"][name] < high for name, (low, high) in row["intervals"].items()
        )
    assert [row.get("baseline") for row in result["results"]] == [None, True, True, True]
    assert result["results"][0]["cost"]["parameters"] > 0
    assert f"{trained.name} trains on {photos}: " in caplog.text
    assert err.count("a network is not here: metrics.md says which file to put where") == 1
    assert "vgg16-397923af.pth" in (tmp_path / "metrics.md").read_text()
    table = (tmp_path / "metrics.md").read_text().splitlines()
    psnr = result["results"][0]["metrics"]["psnr"]
    assert any(line.startswith(f"| {trained.name} | 12 | {psnr:.3f} ±") for line in table), table
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert len(rows) == 48
    mean = sum(float(row["psnr"]) for row in rows if row["target"] == trained.name) / 12
    assert mean == pytest.approx(result["results"][0]["metrics"]["psnr"], rel=1e-9)
    assert Image.open(tmp_path / "reconstructions.png").width > 100
    assert not list(tmp_path.glob(".*"))
    shown = re.findall(
        r"<h3>.*</h3>", (tmp_path / "report.html").read_text().partition('id="gallery"')[2]
    )
    # the run, linear and bicubic: of what an untrained model makes there is nothing to see
    assert len(shown) == 3


def test_evaluate_from_python_gives_the_same_numbers(done, trained, photos, tmp_path):
    """And a caller can watch the batches."""
    seen = []

    def watched(description, batches, total):
        for batch in batches:
            yield batch
            seen.append((description, len(batch["image"]), total))

    request = Request(
        [find_target(trained)], metrics=("psnr", "ssim", "l1"), data=str(photos), batch_size=5
    )
    (evaluated,) = evaluate(request, watched)
    assert seen == [("evaluating", n, 12) for n in (5, 5, 2)]
    done("evaluate", trained, "--data", photos, "-B", 5, "--out", tmp_path, *PIXELS)
    assert metrics(tmp_path) == [evaluated.results.rows[0].metrics]
    sizes = [Protocol(size=16), Protocol("larger", size=[24, 32])]
    both = evaluate(Request([find_target("olvae:photos-f8c4")], sizes, ["psnr"], data=str(photos)))
    assert [evaluated.results.protocol["size"] for evaluated in both] == [16, [24, 32]]
    assert Results.read(tmp_path / "metrics.json").images == evaluated.results.images


def test_evaluate_in_two_processes_and_small_batches_changes_nothing(
    olvae, trained, photos, tmp_path
):
    """Of metrics and observers."""
    arguments = [
        "evaluate",
        str(trained),
        "--data",
        str(photos),
        *PIXELS,
        "--precision",
        "bf16",
        "--out",
    ]
    fork_ranks(main, [*arguments, str(tmp_path / "two"), "-B", "3"])
    assert olvae(*arguments, tmp_path / "one", "-B", 12)[0] == 0
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one["images"] == two["images"]
    assert one["protocol_hash"] == two["protocol_hash"]
    for first, second in zip(one["results"], two["results"], strict=True):
        assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-3)
        assert first["bands"]["LL3"] == pytest.approx(second["bands"]["LL3"], rel=1e-2)
        assert first["precision"]["largest"] == pytest.approx(
            second["precision"]["largest"], rel=2e-2
        )


def test_an_error_of_one_process_ends_the_others_with_one_line(
    olvae_on_two, trained, photos, tmp_path, monkeypatch
):
    """Where images are read, and where the first one merges."""

    def full(*_):
        raise OSError(28, "No space left on device", "there")

    arguments = ["evaluate", trained, "--data", photos, "--metrics", "psnr", "--out", tmp_path]
    line = "error: there: No space left on device\n"
    for place in ("update", "merge"):
        with monkeypatch.context() as patch:
            patch.setattr(f"olvae.metrics.metric.MetricSet.{place}", full)
            assert olvae_on_two(*arguments, exits=(1, 1)) == line


def test_evaluate_takes_several_kinds_of_target_in_one_table(
    done, trained, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(round_trip, "count_macs", count_macs)
    kl().model.save_pretrained(tmp_path / "kl")
    taesd().save_pretrained(tmp_path / "tiny")
    checkpoint = trained / "checkpoints" / "last.ckpt"
    targets = [trained, checkpoint, f"diffusers:{tmp_path}/kl", f"diffusers:{tmp_path}/tiny"]
    done("evaluate", *targets, "--data", photos, "--size", 32, "--out", tmp_path / "out", *PIXELS)
    rows = content(tmp_path / "out")["results"]
    assert len({row["target"] for row in rows}) == 4
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert len({row["metrics"]["psnr"] for row in rows}) == 3
    assert all(row["cost"]["decode_macs"] > 0 for row in rows)


def test_evaluate_takes_several_protocols_in_one_command(done, trained, photos, tmp_path):
    names = "open-litevae,latent-diffusion,llamagen"
    done("evaluate", trained, "--data", photos, "--protocol", names, "--out", tmp_path, *PIXELS)
    tables = [
        content(tmp_path, f"metrics{suffix}.json")
        for suffix in ("", "_latent-diffusion", "_llamagen")
    ]
    assert len({table["protocol_hash"] for table in tables}) == 3
    assert len({table["results"][0]["metrics"]["psnr"] for table in tables}) == 3
    assert (
        tables[0]["images"]["sha256"]
        == tables[1]["images"]["sha256"]
        != tables[2]["images"]["sha256"]
    )


def test_results_of_another_protocol_are_refused_unless_mixed(olvae, trained, photos, tmp_path):
    def evaluate(out: str, *more: object) -> tuple[int, str, str]:
        return olvae(
            "evaluate",
            trained,
            "--data",
            photos,
            "--out",
            tmp_path / out,
            "--metrics",
            "psnr",
            "--no-report",
            *more,
        )

    assert evaluate("first")[0] == 0
    earlier = ("--beside", tmp_path / "first" / "metrics.json")
    code, _, err = evaluate("sampled", *earlier, "--posterior", "sample")
    assert code == 1
    assert "another protocol (posterior)" in err
    assert len(metrics(tmp_path / "sampled")) == 1  # its own are not lost
    code, _, err = evaluate("mixed", *earlier, "--posterior", "sample", "--mix-protocols")
    assert code == 0
    assert (
        content(tmp_path / "mixed")["results"][1]["target"]
        == f"{trained.name} [another protocol (posterior)]"
    )
    (tmp_path / "bad.json").write_text("[]")
    assert "not a metrics.json" in evaluate("bad", "--beside", tmp_path / "bad.json")[2]
    half = content(tmp_path / "first")
    half["results"][0]["precision"] = {"dtype": "fp16"}
    (tmp_path / "half.json").write_text(json.dumps(half))
    assert (
        "half.json: not a metrics.json: KeyError"
        in evaluate("bad", "--beside", tmp_path / "half.json")[2]
    )
    assert not (tmp_path / "bad").exists()
    assert "set --out" in evaluate("first", *earlier)[2]


def test_evaluate_finds_a_config_by_the_runs_name(done, trained, photos, tmp_path):
    base = tmp_path / "configs"
    base.mkdir()
    shutil.copy(trained.parent.parent / "tiny.yaml", base / "tiny.yaml")
    run = tmp_path / trained.name
    shutil.copytree(trained, run)
    (run / "config.yaml").unlink()
    done("evaluate", "--config_base", base, "-B", 4, run, *PIXELS)
    assert content(run)["images"]["n"] >= 1


def test_evaluate_takes_a_checkpoint_and_its_config(done, trained, tmp_path):
    """As the original README has it; the results lie beside the file."""
    shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path)
    done("evaluate", "--config", trained / "config.yaml", "-B", 4, tmp_path / "last.ckpt", *PIXELS)
    assert content(tmp_path / "last_results")["results"][0]["metrics"]["psnr"] > 0


def test_a_run_with_a_baselines_name_keeps_its_own_numbers(done, trained, photos, tmp_path):
    run = tmp_path / "untrained"
    shutil.copytree(trained, run)
    arguments = ("--data", photos, "--images", 1, "--baselines", "--out", tmp_path / "out", *PIXELS)
    done("evaluate", run, *arguments)
    rows = content(tmp_path / "out")["results"]
    assert [row["target"] for row in rows][::3] == [str(run), "untrained"]
    assert rows[0]["metrics"]["psnr"] != rows[3]["metrics"]["psnr"]
    assert [row["intervals"] for row in rows] == [{}] * 4  # of one image


def test_evaluate_names_the_images_of_a_run_that_are_gone(olvae, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(trained.parent.parent), "/gone"))
    code, _, err = olvae("evaluate", run, *PIXELS)
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: /gone/photos: no such folder; the config takes its images there: --data names "
        "others"
    )
    assert not (run / "metrics.json").exists()


def test_evaluate_counts_corrupt_and_small_images(done, trained, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "0.png").write_bytes(b"")
    Image.new("RGB", (9, 9), "teal").save(folder / "1.png")
    err = done("evaluate", trained, "--data", folder, "--out", tmp_path / "out", *PIXELS)
    images = content(tmp_path / "out")["images"]
    assert (images["n"], images["unreadable"], images["enlarged"]) == (11, 1, 1)
    assert "numbers: 1" in err
    assert "were enlarged: 1" in err


def test_lines_of_a_list_that_repeat(done, trained, photos, tmp_path, caplog):
    files = sorted(photos.rglob("*.png"))[:4]
    lines = [str(path) for path in (files[0], files[1], files[0], files[1], *files[2:])]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    options = ("--data", tmp_path / "list.txt", "--out", tmp_path / "out", *PIXELS)
    for asked, read, measured in ((["--images", 5], 5, 3), ([], 6, 4)):
        done("evaluate", trained, *options, *asked)
        assert content(tmp_path / "out")["images"]["n"] == measured
        assert f"{read} images were read, {measured} are measured" in caplog.text
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    caplog.clear()
    done("evaluate", trained, *options)
    assert "images were read" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--data", "EMPTY"], 1, "no images in this folder"),
        (["--data", "BROKEN"], 1, "no images that can be read"),
        (["--images", "99"], 1, "fewer than the 99 asked for"),
        (["--seed", "1"], 2, "--seed applies to samples"),
        (["--fit", "samples"], 2, "--fit applies to --baselines: give both, or neither"),
        (["--mix-protocols"], 2, "--mix-protocols applies to --beside: give both, or neither"),
        (["--config", "a", "--config_base", "b"], 2, "give one of them"),
        (["--size", "20"], 2, "20 is not a multiple of 8: set --size to 16"),
        (["--weights-dir", "nowhere", "--metrics", "lpips"], 1, "nowhere"),
        (["--beside", "nowhere.json"], 1, "no such metrics.json"),
    ],
)
def test_evaluate_mistakes_are_one_line_and_leave_nothing(
    olvae, trained, tmp_path, arguments, code, text
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "a.png").write_bytes(b"")
    given = [str(tmp_path / a) if a in ("EMPTY", "BROKEN") else a for a in arguments]
    got, out, err = olvae("evaluate", trained, "--out", tmp_path / "out", *given)
    assert (got, out) == (code, ""), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert text in errors[0]
    assert not (tmp_path / "out").exists()


def test_numbers_never_lie_beside_the_files_of_another_evaluation(olvae, trained, photos, tmp_path):
    """Killed while the results replace earlier ones.

    The same command then leaves whole ones and nothing else.
    """
    arguments = [
        "evaluate",
        trained,
        "--data",
        photos,
        "--images",
        4,
        "--metrics",
        "psnr",
        "--out",
        tmp_path,
    ]
    assert "earlier results" not in olvae(*arguments)[2]
    replaced = (
        f"note: {tmp_path / 'metrics.json'}: earlier results, which these replace; --out keeps both"
    )
    assert replaced in olvae(*arguments)[2]
    before = {path.name for path in tmp_path.iterdir()}
    assert before == {
        "metrics.json",
        "metrics.md",
        "per_image.csv",
        "reconstructions.png",
        "report.html",
    }
    killed_before(tmp_path, "reconstructions.png", lambda: main([str(a) for a in arguments]))
    (partial,) = tmp_path.glob(".partial-*")
    assert {path.name for path in tmp_path.iterdir()} == (before | {partial.name}) - {
        "metrics.json"
    }
    os.utime(partial, (0, 0))
    assert olvae(*arguments)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["evaluate", "latents"])
def test_results_are_not_among_the_images(command, olvae, trained, photos):
    """The next use of the folder would take the results' pictures for images."""
    before = sorted(photos.rglob("*"))
    for out in (photos, photos / "new"):
        code, _, err = olvae(command, trained, "--data", photos, "--out", out)
        wanted = (
            f"--out {out}: is inside the images' folder {photos}, whose next use would take the "
            "results' pictures for images: choose one beside it"
        )
        assert (code, err.splitlines()[-1]) == (2, f"error: {wanted}")
    assert sorted(photos.rglob("*")) == before


def test_results_may_be_beside_the_part_that_is_read(tmp_path):
    """Of a data set with both parts only the pictures for validation are read."""
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    report = tmp_path / "report"
    assert results_folder(report, "", None, str(tmp_path)) == report
    with pytest.raises(ConfigError, match=rf"is inside .* {tmp_path / 'val'}"):
        results_folder(tmp_path / "val" / "report", "", None, str(tmp_path))


def test_results_beside_weights_among_the_images_are_refused(tmp_path):
    weights = tmp_path / "vae.safetensors"
    weights.touch()
    with pytest.raises(ConfigError, match=r"vae_results: .*inside"):
        results_folder(None, str(weights), None, str(tmp_path))


def test_results_folder_is_in_the_run_or_beside_the_weights(tmp_path):
    weights = tmp_path / "step=5.ckpt"
    weights.touch()
    assert results_folder(Path("here"), str(weights), None) == Path("here")
    assert results_folder(None, str(tmp_path), Run(tmp_path)) == tmp_path
    assert results_folder(None, str(weights), None) == tmp_path / "step=5_results"
    with pytest.raises(ConfigError, match="--out DIR"):
        results_folder(None, str(tmp_path), None)  # an export


def test_passes_of_a_model_are_shown(olvae, tmp_path, image_folder):
    """Asked for by name: in the line below the tables, on the page, and in metrics.json."""
    tiny().save_pretrained(tmp_path / "vae")
    flags = ["--size", 16, "--metrics", "psnr", "--images", 4, "--observe", "round_trips"]
    code, out, err = olvae(
        "evaluate", tmp_path / "vae", "--data", image_folder, *flags, "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert "after 1, 2, 5, 10 passes PSNR" in " ".join((out + err).split())
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert row["round_trips"]["1"]["psnr"] == pytest.approx(row["metrics"]["psnr"])
    assert "several passes" in (tmp_path / "out" / "report.html").read_text()
