"""Folders of diffusers that ask for more than they hold, or are damaged or harmful."""

import json
import zipfile

import pytest

from olvae.checkpoint import add_sums
from olvae.config import ConfigError
from olvae.models.loading.targets import find_target
from tests.models.autoencoder_kl import autoencoder_kl


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_out_channels": [9024] * 4},
            "another model: its config has [0-9,]+ parameters",
        ),
        (
            {"layers_per_block": 10**9},
            "layers_per_block: more than 24",
        ),
    ],
)
def test_a_config_of_diffusers_builds_no_more_than_its_weights_have(change, message, tmp_path):
    autoencoder_kl().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        find_target(f"diffusers:{tmp_path}").load()
    with pytest.raises((ConfigError, ValueError), match=message):
        find_target(f"diffusers:{tmp_path}").untrained()


def test_a_flipped_bit_and_a_harmful_pickle_of_a_folder_of_diffusers(tmp_path):
    autoencoder_kl().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    add_sums(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"readable AutoencoderKL: .* damaged"):
        find_target(f"diffusers:{tmp_path}").load()
    weights.unlink()
    pickled = (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (8 * 10**9).to_bytes(5, "little") + b"\x85R."
    )
    with zipfile.ZipFile(tmp_path / "diffusion_pytorch_model.bin", "w") as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/data/0", bytes(6 * 10**6))
    with pytest.raises(ValueError, match="than tensors"):
        find_target(f"diffusers:{tmp_path}").load()
