"""``olvae data pack`` and ``check`` under torchrun: as one process, in files and in messages."""

import json
import os
import resource
import shutil
import signal
import time

import pytest

from olvae.cli.main import main
from olvae.data.packing import _Packer
from tests.data.images import noise, write_photos
from tests.forks import fork_ranks


@pytest.fixture
def photos(tmp_path):
    """Thirty PNG files of 24 x 20 pixels."""
    return write_photos(tmp_path / "photos", [f"class{i % 3}/{i:02d}.png" for i in range(30)])


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_ranks_pack_what_one_process_packs(done, olvae_on_two, photos, tmp_path):
    (photos / "bad.jpg").touch()
    (photos / "worse.jpg").write_text("no picture")
    pack = ("data", "pack", photos, "--shard-size", 4, "--max-unreadable", 0.1)
    one = done(*pack, "--out", tmp_path / "one")
    two = olvae_on_two(*pack, "--out", tmp_path / "two", "--workers", 2)
    assert two == one.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert "2 unreadable images" in two
    assert everything(tmp_path / "two") == everything(tmp_path / "one")
    assert len(everything(tmp_path / "two")) == 8 + 2
    again = olvae_on_two(*pack, "--out", tmp_path / "two")
    assert again.count("in 8 shards, 8 of them from an earlier run\n") == 1


def test_unreadable_images_of_all_ranks_count_together(olvae_on_two, photos, tmp_path):
    """Each rank alone is below the limit."""
    for name in ("bad.png", "class0/bad.png", "class1/bad.png"):
        (photos / name).touch()
    out = tmp_path / "out"
    pack = ("data", "pack", photos, "--shard-size", 2, "--out", out, "--max-unreadable", 0.08)
    err = olvae_on_two(*pack, "--no-shuffle", exits=(1, 1))
    assert err.startswith("error: 3 of 33 images can't be read, more than --max-unreadable 0.08: ")
    assert err.count("\n") == 1
    assert not (out / "index.json").exists()


def slow_first_rank(monkeypatch, fail):
    """Let the first rank take its time, and the second one do something after its first shard."""
    files = _Packer._files

    def watched(self, index):
        if os.environ["RANK"] == "0":
            time.sleep(0.2)
        elif any(self.shards.folder.glob("*1.tar")):
            fail()
        return files(self, index)

    monkeypatch.setattr(_Packer, "_files", watched)


def test_a_full_disk_of_one_rank_ends_all_with_one_line(
    done, olvae_on_two, photos, tmp_path, monkeypatch
):
    """Soon, and the same command continues."""

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    out = tmp_path / "out"
    pack = ("data", "pack", photos, "--shard-size", 1, "--workers", 1)
    with monkeypatch.context() as patch:
        slow_first_rank(patch, fill)
        err = olvae_on_two(*pack, "--out", out, exits=(1, 1))
    assert err == (
        f"error: {out}: File too large; finished shards stay, and the same command continues from "
        "there\n"
    )
    assert 1 <= len(list(out.glob("*.tar"))) < 15  # 15 are the first rank's share
    olvae_on_two(*pack, "--out", out)
    done(*pack, "--out", tmp_path / "whole")
    assert everything(out) == everything(tmp_path / "whole")


def test_a_rank_that_was_killed_ends_the_others_and_any_number_of_ranks_continues(
    done, olvae_on_two, photos, tmp_path, monkeypatch
):

    def kill():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    out = tmp_path / "out"
    pack = ("data", "pack", photos, "--shard-size", 3, "--workers", 1)
    with monkeypatch.context() as patch:
        slow_first_rank(patch, kill)
        err = olvae_on_two(*pack, "--out", out, exits=(1, -signal.SIGKILL))
    assert err == (
        "error: another process of this command died: see its own output, or the system's log of "
        "killed processes\n"
    )
    assert len(list(out.glob("*.tar"))) == 5 + 1
    shutil.copytree(out, tmp_path / "copy")
    olvae_on_two(*pack, "--out", out)
    done(*pack, "--out", tmp_path / "copy")
    done(*pack, "--out", tmp_path / "whole")
    for folder in (out, tmp_path / "copy"):
        assert everything(folder) == everything(tmp_path / "whole")


def test_ranks_that_see_other_images_pack_nothing(olvae_on_two, photos, tmp_path, monkeypatch):
    state = "olvae.data.picture_folder.Files.state"
    monkeypatch.setattr(state, lambda self, position: os.environ["RANK"])
    err = olvae_on_two("data", "pack", photos, "--out", tmp_path / "out", exits=(2, 2))
    assert err == f"error: {photos}: processes see different names, sizes or times of files there\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_check_what_one_process_checks(olvae, done, capfd, photos, tmp_path, packed):
    """Copies are found by content, whichever ranks have read them."""
    for i in range(70):  # two tasks
        noise(i, (40, 30)).save(photos / f"class0/more{i}.jpg")
    for name in ("bad.jpg", "class1/bad.png"):
        (photos / name).touch()
    (photos / "val").mkdir()
    (photos / "train").mkdir()
    for name in ("class0", "class1", "class2", "bad.jpg"):
        (photos / name).rename(photos / "train" / name)
    shutil.copy(photos / "train/class0/00.png", photos / "val/copy.png")
    noise(200).save(photos / "val/other.png")
    src = photos
    if packed:
        src = tmp_path / "shards"
        for i in range(30):
            noise(i).save(photos / f"train/class2/again{i}.png")
        done("data", "pack", photos, "--out", src, "--shard-size", 10, "--max-unreadable", 1)
        (src / "000003.tar").write_bytes((src / "000003.tar").read_bytes()[:9000])
    check = ("data", "check", src, "--size", 16, "--json", "--workers", 2)
    code, out, err = olvae(*check)
    assert (code, err) == (1, "")
    fork_ranks(main, [str(a) for a in check], exits=(1, 0))
    two, err = capfd.readouterr()
    assert err == ""
    # Before them, torch 2.8's Gloo says that it is connected.
    one, both = json.loads(out), json.loads(two[two.index("{") :])
    assert one.pop("images_per_s") > 0
    assert both.pop("images_per_s") > 0
    assert json.dumps(both) == json.dumps(one)  # in order, too
    assert any("validation images" in p for p in one["problems"])
