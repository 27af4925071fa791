"""What tests share: one thread per worker, determinism, small models and configs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pretrained import weights_dir  # noqa: F401  (a fixture)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve smooth random pictures of 48x40 in nested folders."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for i in range(12):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


def tiny_config(root: Path | str | None = None, **model: Any) -> dict[str, Any]:
    """A config that trains in a second: a narrow encoder and decoder on 16-pixel crops."""
    encoder = {
        "extractor_channels": 8,
        "extractor_mult": [1, 2],
        "extractor_resblocks": 1,
        "aggregate_channels": 8,
        "aggregate_mult": [1, 2],
        "aggregate_resblocks": 1,
        "image_size": 16,
    }
    decoder = {"channels": 8, "z_channels": 4, "channel_mult": [1, 1, 1, 1], "num_res_blocks": 0, "output": "wavelet"}
    if root is None:
        data = {"target": "olvae.data.mapped.samples.SamplePhotographs", "params": {"size": 16, "batch_size": 4}}
    else:
        data = {
            "target": "olvae.data.mapped.folder.FolderSource",
            "params": {"root": str(root), "size": 16, "batch_size": 4, "val_fraction": 0.2},
        }
    return {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "olvae.models.liteautoencoder.LiteAutoencoderKL",
            "params": {
                "embed_dim": 4,
                "encoder_config": {
                    "target": "olvae.modules.litevae.encoder_model.LiteVAE_Encoder",
                    "params": encoder,
                },
                "decoder_config": {
                    "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
                    "params": decoder,
                },
                "lossconfig": {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0}},
                **model,
            },
        },
        "data": data,
        "lightning": {"trainer": {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}},
    }
