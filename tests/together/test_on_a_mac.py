"""Commands on an emulated Mac: no float64 on its device, and the numbers of the CPU.

Kernels are the CPU's there, so results have to be equal bit for bit.
"""

import json

import pytest
import torch

from olvae.app import compare, load_choice
from olvae.checkpoint import read_checkpoint
from olvae.config import save
from olvae.metrics import metric
from olvae.models.loading.targets import find_target
from tests.conftest import parts, plain_config
from tests.export.latents import everything
from tests.mac import emulated_mac
from tests.models.steps import against

SOME = parts(activation_bound={"bound": 1.0}, anchor={}, latent_noise={"std": 0.1}, equivariance={})
OTHERS = parts(
    random_noise={}, channel_masking={"widths": [2, 4]}, scale_equivariance={"factors": [2]}
)


@pytest.fixture
def on_both(done, tmp_path, monkeypatch):
    """Run a command on the CPU, then on a Mac; the folders of the results."""

    def run(*command, cpu=("--device", "cpu"), mac=()):
        folders = []
        for name, device in (("cpu", cpu), ("mac", mac)):
            out = tmp_path / command[0] / name
            torch.manual_seed(0)
            with monkeypatch.context() as patch:
                if name == "mac":
                    with emulated_mac(patch) as emulated:
                        err = done(*command, out, *device)
                    assert emulated.made > 100, "nothing ran on the device"
                else:
                    err = done(*command, out, *device)
            assert "Apple GPU" in err or name == "cpu" or command[0] != "train"
            folders.append(out)
        return folders

    return run


def same_training(folders):
    cpu, mac = (read_checkpoint(*out.glob("*/checkpoints/last.ckpt")) for out in folders)
    assert cpu["state_dict"].keys() == mac["state_dict"].keys()
    for name, tensor in cpu["state_dict"].items():
        assert mac["state_dict"][name].device.type == "cpu", name
        assert torch.equal(tensor, mac["state_dict"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "nodes",
    [SOME, OTHERS],
    ids=[",".join(SOME), ",".join(OTHERS)],
)
def test_training_and_validation_with_parts_on_a_mac(on_both, config, nodes):
    folders = on_both(
        "train", "--base", config, f"model.params.parts={json.dumps(nodes)}",
        "model.params.use_ema=true", "--logdir", cpu=("--gpus", 0),
    )  # fmt: skip
    same_training(folders)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "alignment"])
def test_training_with_another_network_on_a_mac(on_both, config, target, vit, name):
    given = {
        "teacher": {"autoencoder": str(target)},
        "alignment": {"encoder": "test_vit", "weights": vit},
    }
    nodes = parts(**{name: given[name]})
    folders = on_both(
        "train", "--base", config, f"model.params.parts={json.dumps(nodes)}",
        f"model.params.lossconfig.params.kl_weight={0.0 if name == 'teacher' else 0.01}",
        "--logdir", cpu=("--gpus", 0), mac=("--gpus", 1),
    )  # fmt: skip
    same_training(folders)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("bf16", "muon"),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in (("32", "adam"), ("tf32", "muon"), ("fp16", "adam"))
        ),
    ],
)
def test_training_of_both_players_on_a_mac(on_both, tmp_path, image_folder, precision, optimizer):
    """fp16 is a GPU's alone."""
    config = tmp_path / "plain.yaml"
    save(plain_config(image_folder), config)
    adversary = json.dumps(against(lecam_weight=0.1, r1_weight=0.1))
    folders = on_both(
        "train", "--base", config, f"model.params.adversary_config={adversary}",
        f"model.params.optimizer={optimizer}", "lightning.trainer.max_steps=2", "--logdir",
        cpu=("--gpus", 0, "--precision", "32" if precision == "fp16" else precision),
        mac=("--precision", precision, "lightning.trainer.accelerator=mps"),
    )  # fmt: skip
    if precision != "fp16":
        same_training(folders)


@pytest.mark.slow
def test_evaluate_on_a_mac(on_both, target, image_folder, weights_dir):
    folders = on_both(
        "evaluate", target, "--data", image_folder, "--size", 32, "--metrics",
        "psnr,ssim,l1,lpips_alex", "--weights_dir", weights_dir, "--observe", "colour",
        "--precision", "fp16-autocast", "--posterior", "sample", "--out",
        cpu=("--device", "cpu"), mac=("--device", "mps"),
    )  # fmt: skip
    cpu, mac = (json.loads((out / "metrics.json").read_text())["results"] for out in folders)
    assert len(cpu) == len(mac) == 2
    for one, other in zip(cpu, mac, strict=True):
        assert other["cost"]["device"] == "Apple GPU"
        assert {**one, "cost": None} == {**other, "cost": None}


def test_encode_decode_and_latents_on_a_mac(on_both, done, target, four_images, tmp_path):
    """Whole, in strips, and what is measured of latents."""
    data = ("--data", four_images)
    whole = on_both("encode", target, *data, "--size", 16, "--out")
    assert everything(whole[0]) == everything(whole[1])
    assert everything(on_both("decode", target, whole[0], "--out")[1])
    report = on_both("latents", target, *data, "--out")
    assert len({(out / "latents.json").read_text() for out in report}) == 1


@pytest.mark.slow
def test_encode_in_strips_on_a_mac(on_both, target, image_folder):
    native = ("--data", image_folder, "--native", "--memory", 0.001)
    strips = on_both("encode", target, *native, "--out")
    assert everything(strips[0]) == everything(strips[1])


@pytest.mark.slow
def test_reconstruct_on_a_mac(on_both, target, image_folder):
    folders = on_both("reconstruct", target, image_folder, "--sample", "--out")
    cpu, mac = (everything(out) for out in folders)
    assert cpu == mac


def test_the_page_on_a_mac(target, monkeypatch):
    x = torch.arange(3 * 32 * 48).view(3, 32, 48).to(torch.uint8)
    results = []
    for device in ("cpu", "mps"):
        with monkeypatch.context() as patch, emulated_mac(patch):
            models = load_choice([find_target(str(target))], device)
            (result,) = compare(models, x, device).values()
        results.append((result.psnr, result.ssim, result.y.tolist()))
    assert results[0] == results[1]


def test_float64_on_the_device_is_found(olvae, target, image_folder, tmp_path, monkeypatch):
    """As the sums of metrics were."""
    monkeypatch.setattr(metric, "in_float64", torch.Tensor.double)
    command = ("--data", image_folder, "--size", 16, "--metrics", "psnr", "--out", tmp_path)
    with emulated_mac(monkeypatch):
        code, _, err = olvae("evaluate", target, *command)
    assert code == 1
    assert "support float64" in err
