"""latent-diffusion's names of an AutoencoderKL's weights, and a folder of the hub's cache,
for tests.
"""

from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch


def latent_diffusion_names(model: diffusers.AutoencoderKL) -> dict[str, torch.Tensor]:
    """Written from the latent-diffusion code's names, independently of what converts them."""
    levels = len(model.config.block_out_channels)
    out = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        match parts:
            case [half, "down_blocks", i, "resnets", j, *rest]:
                new = [half, "down", i, "block", j, *rest]
            case [half, "down_blocks", i, "downsamplers", "0", *rest]:
                new = [half, "down", i, "downsample", *rest]
            case [half, "up_blocks", i, "resnets", j, *rest]:
                new = [half, "up", str(levels - 1 - int(i)), "block", j, *rest]
            case [half, "up_blocks", i, "upsamplers", "0", *rest]:
                new = [half, "up", str(levels - 1 - int(i)), "upsample", *rest]
            case [half, "mid_block", "resnets", i, *rest]:
                new = [half, "mid", f"block_{int(i) + 1}", *rest]
            case [half, "mid_block", "attentions", "0", *layer, kind]:
                layers = {
                    "group_norm": "norm",
                    "to_q": "q",
                    "to_k": "k",
                    "to_v": "v",
                    "to_out.0": "proj_out",
                }
                new = [half, "mid", "attn_1", layers[".".join(layer)], kind]
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]  # 1x1 convolutions there
            case _:
                new = ["norm_out" if part == "conv_norm_out" else part for part in parts]
        new = ["nin_shortcut" if part == "conv_shortcut" else part for part in new]
        out[".".join(new)] = tensor.contiguous()
    return out


def hub_folder(root: Path, monkeypatch: pytest.MonkeyPatch, repository: str) -> Path:
    """A folder of the hub's cache, which stands for a repository; nothing is asked of a server."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit, repo = "0" * 40, root / f"models--{repository.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    return repo / "snapshots" / commit
