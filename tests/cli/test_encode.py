"""``olvae encode`` and ``olvae decode`` as a user types them."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from olvae.cli.encode import _encoder
from olvae.cli.main import main
from olvae.config import ConfigError
from olvae.data.shards.write import ResumableShards
from olvae.export.encode_inputs import Reader
from tests.data.images import write_shards
from tests.export.latents import everything, tiny_vae
from tests.forks import fork_each
from tests.training.conftest import torchrun

ROOT = Path(__file__).parents[2]


def test_encode_and_decode_there_and_back(olvae, done, target, tmp_path, image_folder):
    latents, images = tmp_path / "latents", tmp_path / "images"
    encode = [
        "encode",
        target,
        "--data",
        image_folder,
        "--size",
        16,
        "--out",
        latents,
        "--dtype",
        "float32",
    ]
    code, out, err = olvae(*encode, "--json")
    assert code == 0
    stats = json.loads(out)
    assert stats == json.loads((latents / "stats.json").read_text())
    assert (stats["count"], stats["source"], stats["target"]) == (12, str(image_folder), "vae")
    assert f"latents: {latents}, 12 images of 16 px in 1 shard\n" in err
    assert f"scaling_factor {stats['scaling_factor']:.4f}" in err
    before = everything(latents)
    assert olvae(*encode)[:2] == (0, "")  # once more: nothing is left to do
    assert everything(latents) == before
    originals = {path: path.read_bytes() for path in image_folder.rglob("*.*")}
    os.utime(image_folder / "class0" / "0.png")  # newer than its latent
    code, out, err = olvae("decode", target, latents, "--out", image_folder)
    assert code == 2
    assert "not decoded" in err
    assert {path: path.read_bytes() for path in image_folder.rglob("*.*")} == originals
    code, out, err = olvae("decode", target, latents, "--out", images)
    assert (code, out, err) == (0, "", f"images: {images}, 12 of them\n")
    assert len([*images.rglob("*.png")]) == 12
    done("decode", target, latents, "--out", images)  # its own images may be replaced
    tiny_vae(1).save_pretrained(tmp_path / "other")
    for number, shards in enumerate((latents, latents / "000000.tar", latents / "00*.tar")):
        err = done("decode", tmp_path / "other", shards, "--out", tmp_path / f"more{number}")
        note = f"note: vae made these latents, with other weights than {tmp_path / 'other'}'s\n"
        assert err.count(note) == 1
    (latents / "stats.json").write_text("{}")  # without a description, nothing is known
    err = done("decode", target, latents / "000000.tar", "--out", images)
    assert err == f"images: {images}, 12 of them\n"


def test_two_processes_encode_what_one_encodes(olvae, olvae_on_two, target, tmp_path, image_folder):
    encode = [
        "encode",
        target,
        "--data",
        image_folder,
        "--size",
        16,
        "--shard-size",
        3,
        "--flip",
        "--images",
    ]
    encode += ["--device", "cpu"]
    assert olvae(*encode, "--out", tmp_path / "one")[0] == 0
    err = olvae_on_two(*encode, "--out", tmp_path / "two")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert len(everything(tmp_path / "two")) == 4 + 3
    assert err.count("12 images of 16 px in 4 shards") == 1  # the first says it, the other nothing
    assert "nothing to do" not in err
    encode[encode.index(3)] = 1000
    err = olvae_on_two(*encode, "--out", tmp_path / "few")
    assert "note: 1 shard of latents for 2 processes" in err
    assert (
        "12 images of 16 px in 12 shards"
        in olvae(*encode[:6], "--images", "--out", tmp_path / "split")[2]
    )


def test_an_array_of_commands_encodes_what_one_encodes(
    olvae, done, target, tmp_path, image_folder, monkeypatch, capfd
):
    """At the same time into one folder; one of them is killed within a shard, and repeated."""
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--shard-size", 2, "--flip"]
    one = tmp_path / "one"
    out = tmp_path / "array"
    done(*encode, "--out", one)
    encode += ["--out", out, "--shards"]
    parts = ("0-1", "2-4", "5-5")
    write = ResumableShards.write

    def killed_within_shard_3(self, number, samples, details):
        def cut():
            yield next(samples)
            os.kill(os.getpid(), signal.SIGKILL)

        return write(self, number, cut() if number == 3 else samples, details)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableShards, "write", killed_within_shard_3)
        fork_each(lambda i: main([str(a) for a in (*encode, parts[i])]), exits=(0, -9, 0))
    err = capfd.readouterr().err
    for part in ("0-1", "5-5"):
        assert f"latents: {out}, shards {part} of 0-5: " in err
    names = {f"00000{number}.tar" for number in (0, 1, 2, 5)}
    assert everything(out).keys() == names
    assert len([*out.rglob(".partial-*")]) == 1

    err = done(*encode, parts[1])
    assert f"latents: {out}, 12 images of 16 px in 6 shards\n" in err
    assert everything(out) == everything(one)
    state = everything(out / ".encode")
    locks = {"plan.lock", *(f"lock-{part}" for part in parts)}
    assert state.keys() - everything(one / ".encode").keys() == locks
    assert not [*out.rglob(".partial-*")]
    done(*encode[:-1])  # without --shards the whole is complete as well
    assert everything(out) == everything(one)


def test_parts_that_do_not_fit_are_refused(olvae, refused, target, tmp_path, image_folder):
    out = tmp_path / "out"
    encode = ["encode", target, "--data", image_folder, "--shard-size", 3, "--out", out]
    encode += ["--size", 16, "--shards"]
    for text in ("1", "3-1", "a-b", "-1-2", "1-2,4"):
        line = refused(2, *encode, text)
        assert line == (
            f"error: --shards {text}: give the first and the last number, such as 0-9\n"
        )
    line = "error: --shards 2-4: these images make 4 shards of latents, 0-3\n"
    assert refused(2, *encode, "2-4") == line
    assert not out.exists()
    assert olvae(*encode, "2-3")[0] == 0
    line = refused(2, *encode, "0-1", "--flip")
    assert "flip False (now True)" in line


def test_an_error_of_one_process_ends_the_others_with_one_line(
    done, olvae_on_two, target, tmp_path, image_folder, monkeypatch
):
    """Before the first has done its share; the same command continues."""
    encode = ("encode", target, "--data", image_folder, "--size", 16, "--shard-size", 1, "-B", 1)
    write = ResumableShards.write

    def fill_up(self, number, samples, details):
        if number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        if number % 2 == 0:
            time.sleep(0.3)
        return write(self, number, samples, details)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ResumableShards, "write", fill_up)
        err = olvae_on_two(*encode, "--out", out, exits=(1, 1))
    assert err == f"error: {out / '000003.tar'}: File too large\n"
    assert len(list(out.glob("*0.tar")) + list(out.glob("*[2468].tar"))) < 6
    done(*encode, "--out", out)
    done(*encode, "--out", tmp_path / "whole")
    assert everything(out) == everything(tmp_path / "whole")
    err = olvae_on_two(*encode, "--out", out, "--seed", 1, "--sample", exits=(2, 2))
    assert err.startswith(f"error: --out {out}: was begun with ")
    assert err.count("\n") == 1


def test_a_reader_that_was_killed_is_named_with_the_option_that_helps(
    olvae_on_two, target, tmp_path, image_folder, monkeypatch
):
    def die(self, items):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, items)

    read = Reader.__getitem__
    monkeypatch.setattr(Reader, "__getitem__", die)
    encode = ("encode", target, "--data", image_folder, "--size", 16, "--shard-size", 3)
    err = olvae_on_two(*encode, "--threads", 1, "--out", tmp_path / "out", exits=(1, 1))
    assert re.fullmatch(r"error: a loader process .* memory ran out: lower --threads\n", err)


TWO_GPUS = """
import sys
from olvae import launcher
from olvae.cli import encode, main

start = launcher.start_each
launcher.start_each = lambda _, devices: start("cpu", len(devices))
encode.own_device = lambda *_: ("cpu", [0, 1])
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_command_starts_a_process_for_each_gpu(olvae, target, tmp_path, image_folder):
    """On the CPU, which stands for two GPUs; where one process is killed, the other ends too."""
    (tmp_path / "olvae.py").write_text(TWO_GPUS)
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--shard-size", 3]

    def start(folder: str, **env: str) -> subprocess.Popen:
        words = [tmp_path / "olvae.py", *encode, "--gpus", 2, "--out", tmp_path / folder]
        command = [sys.executable, *map(str, words)]
        # The script's own folder would come first, and it is named like the package.
        env |= {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)

    assert olvae(*encode, "--device", "cpu", "--out", tmp_path / "one")[0] == 0
    two = start("two")
    _, err = two.communicate(timeout=200)
    assert two.returncode == 0
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert err.startswith(f"latents: {tmp_path / 'two'}, 12 images of 16 px in 4 shards\n"), err

    # Killed as soon as it is there.
    killed = start("killed")
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    until = time.monotonic() + 100
    while not children.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, err = killed.communicate(timeout=200)
    assert killed.returncode == 1
    assert err == (
        "error: process 1 of this command was killed by SIGKILL: see its own output, or the "
        "system's log of killed processes\n"
    )
    done = start("killed")
    _, err = done.communicate(timeout=200)
    assert (done.returncode, everything(tmp_path / "one")) == (0, everything(tmp_path / "killed"))


def test_gpus_are_refused_where_another_launcher_gives_them(
    refused, target, tmp_path, image_folder, monkeypatch
):
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--out", tmp_path / "out"]
    assert "--gpus and --device" in refused(2, *encode, "--gpus", 2, "--device", "cpu")
    assert "no GPU" in refused(2, *encode, "--gpus", 9)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("olvae.cli.encode.own_device", lambda *_: ("cpu", [0, 1]))
    assert "--gpus: torchrun" in refused(2, *encode, "--gpus", 2)
    assert not (tmp_path / "out").exists()


def test_encode_compiles_the_encoder_alone(olvae, target, tmp_path, image_folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "olvae.modules.mixed_precision.compile_networks",
        lambda modules, device: compiled.extend(modules) or False,
    )
    out = tmp_path / "latents"
    encode = [
        "encode",
        target,
        "--data",
        image_folder,
        "--size",
        16,
        "--compile",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    assert olvae(*encode)[0] == 0
    assert [type(module).__name__ for module in compiled] == ["LiteVAE_Encoder"]


def test_encode_and_decode_mistakes_are_one_line(done, refused, target, tmp_path, image_folder):
    def encode(*arguments: object, data: Path | str = image_folder) -> list[object]:
        return [
            "encode",
            target,
            "--data",
            data,
            "--size",
            16,
            "--out",
            tmp_path / "out",
            *arguments,
        ]

    shards = tmp_path / "shards"
    write_shards(shards, (2,))
    cases = [
        (encode("--native"), 2, "--native and --size: give one of the two"),
        (encode("--seed", 1), 2, "--seed applies to --sample"),
        (encode("--memory", 1), 2, "--memory applies to --native: give both, or neither"),
        (
            ["encode", *encode()[1:4], "--native", "--memory", "inf", "--out", tmp_path / "out"],
            2,
            "--memory inf: give",
        ),
        (
            encode("--shard-size", 3, data=shards),
            2,
            "--shard-size: each of these shards becomes one of latents",
        ),
        (encode("--size", 20), 1, "multiple of 8"),
        (
            [
                "encode",
                target,
                "--data",
                image_folder,
                "--native",
                "--images",
                "--out",
                tmp_path / "out",
            ],
            1,
            "one size",
        ),
        (encode(data=tmp_path / "nowhere"), 1, "no such folder"),
        (encode("--out", image_folder), 2, "has other files already"),
        (encode("--out", image_folder / "class0/0.png"), 1, "results need a folder"),
        (
            ["decode", target, image_folder, "--out", image_folder / "class0/0.png"],
            1,
            "results need a folder",
        ),
        (["encode", tmp_path / "gone", *encode()[2:]], 1, "not found; a target is"),
        (["decode", target, image_folder, "--out", tmp_path / "out"], 1, "no stats.json"),
        (["decode", target, tmp_path / "x.tar", "--out", tmp_path / "out"], 1, "no shards"),
        (
            ["decode", target, tmp_path, "--out", tmp_path / "out", "--memory", "nan"],
            2,
            "--memory nan: give",
        ),
    ]
    for arguments, code, text in cases:
        assert text in refused(code, *arguments)
        assert not (tmp_path / "out").exists()
    done(*encode())
    line = refused(1, *encode("--out", tmp_path / "again", data=tmp_path / "out"))
    assert f"{tmp_path / 'out' / '000000.tar'}: a shard" in line
    assert "flip False (now True)" in refused(2, *encode("--flip"))
    assert "other images" in refused(2, *encode(data="samples"))


def test_encode_refuses_a_folder_where_another_command_is_at_work(
    refused, target, tmp_path, image_folder, monkeypatch
):
    monkeypatch.setattr("olvae.data.shards.write.LOCK_S", 0.0)
    latents = tmp_path / "latents"
    with ResumableShards(latents, ".encode").locked("olvae encode"):
        (latents / ".encode" / ".partial-000000.tar").touch()
        line = refused(2, "encode", target, "--data", image_folder, "--size", 16, "--out", latents)
        assert line == f"error: --out {latents}: another `olvae encode` is at work there\n"
        before = everything(latents / ".encode")

        def work(rank: int) -> None:
            os.environ.update(torchrun(rank, per_node=2))
            sys.exit(
                main(
                    [
                        "encode",
                        str(target),
                        "--data",
                        str(image_folder),
                        "--size",
                        "24",
                        "--out",
                        str(latents),
                    ]
                )
            )

        fork_each(work, exits=(2, 2))
        assert everything(latents / ".encode") == before


@pytest.mark.parametrize("shards", [0, 2])
def test_ctrl_c_while_encoding_says_how_to_go_on(
    olvae, target, tmp_path, image_folder, monkeypatch, shards
):
    """Where a shard is finished; else it leaves nothing."""
    write = ResumableShards.write
    written = []

    def interrupt(self, number, samples, details):
        if number == shards:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, samples, details)

    monkeypatch.setattr(ResumableShards, "write", interrupt)
    latents = tmp_path / "new" / "latents"
    encode = (
        "encode",
        target,
        "--data",
        image_folder,
        "--size",
        16,
        "--out",
        latents,
        "--shard-size",
        3,
    )
    code, out, err = olvae(*encode)
    assert (code, out, written) == (130, "", [*range(shards)])
    kept = f"finished shards are in {latents}" if shards else "no shard is finished yet"
    assert err.endswith(f"stopped: {kept}; the same command continues\n")
    assert latents.parent.exists() == bool(shards)


def test_a_failed_encode_or_decode_leaves_no_folder(done, refused, target, tmp_path, image_folder):
    """Of encode where no image can be read, and of decode where no latent can."""
    bad, out = tmp_path / "bad", tmp_path / "new" / "out"
    bad.mkdir()
    (bad / "a.png").touch()
    encode = ("encode", target, "--data", bad, "--size", 16, "--out", out)
    assert (
        refused(1, *encode) == "error: none of the images could be read: a.png: the file is empty\n"
    )
    assert not out.parent.exists()
    out.mkdir(parents=True)
    refused(1, *encode)
    assert not list(out.iterdir())  # the user's own stays
    out.rmdir()
    latents = tmp_path / "latents"
    done("encode", target, "--data", image_folder, "--size", 16, "--out", latents)
    (latents / "000000.tar").write_bytes(b"no tar file")
    assert "no latents" in refused(1, "decode", target, latents, "--out", out)
    assert list((tmp_path / "new").iterdir()) == []


def test_encode_compile_without_an_encoder_is_one_line():
    with pytest.raises(ConfigError, match=r"--compile: .*`encoder`"):
        _encoder(torch.nn.Identity(), "mine")
