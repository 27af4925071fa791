"""A tiny random model of every autoencoder class of diffusers."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_rae
from torch import nn

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
}
WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.5, 2.0, 0.5, 1.0],
}
FOUR: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1}
HUNYUAN: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (32,) * 5,
    "layers_per_block": 1,
}
COSMOS = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decode")}
LTX2 = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (16, 32, 64)}


def halves(**each: Any) -> dict[str, Any]:
    return {
        f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in each.items()
    }


CLASSES: dict[str, dict[str, Any]] = {
    "AsymmetricAutoencoderKL": {
        **{key: KL[key] for key in ("down_block_types", "up_block_types", "norm_num_groups")},
        **{f"{half}_block_out_channels": (8, width) for half, width in (("down", 8), ("up", 16))},
    },
    "AutoencoderDC": {
        "latent_channels": 8,
        "attention_head_dim": 8,
        **halves(block_types="ResBlock", block_out_channels=(8, 8, 16)),
        **halves(layers_per_block=(1, 1, 1), qkv_multiscales=((), (), ())),
    },
    "AutoencoderKL": KL,
    "AutoencoderKLCogVideoX": {**FOUR, "norm_num_groups": 2},
    "AutoencoderKLCosmos": {
        **COSMOS,
        "latent_channels": 4,
        "attention_resolutions": (8,),
        "resolution": 32,
        "num_layers": 1,
        "latents_mean": [n / 10 for n in range(8)],
        "latents_std": [1 + n / 10 for n in range(8)],  # of 2 frames
    },
    "AutoencoderKLFlux2": {**KL, "decoder_block_out_channels": (4, 8)},
    "AutoencoderKLHunyuanImage": {
        "scaling_factor": 0.5,
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": 32,
        "spatial_compression_ratio": 2,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanImageRefiner": HUNYUAN,
    "AutoencoderKLHunyuanVideo": {**FOUR, "norm_num_groups": 4},
    "AutoencoderKLHunyuanVideo15": HUNYUAN,
    "AutoencoderKLKVAE": {
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 4,
        "ch_mult": (1, 1, 1),
    },
    "AutoencoderKLKVAEVideo": {
        "ch": 32,
        "ch_mult": (1, 1, 1, 1),
        "num_res_blocks": 1,
        "z_channels": 4,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 8,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4,
        **LTX2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLMagvit": {**FOUR, "norm_num_groups": 4},
    "AutoencoderKLMochi": {
        "latent_channels": 12,
        "layers_per_block": (1,) * 5,
        **halves(block_out_channels=(32,) * 4),
    },
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLQwenImage21": {**WAN, "decoder_base_dim": 8},
    "AutoencoderKLWan": WAN,
    "AutoencoderRAE": {
        "encoder_type": "mae",
        "encoder_hidden_size": 32,
        "encoder_patch_size": 8,
        "encoder_input_size": 32,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 4,
        "latents_mean": [0.5],
        "latents_std": [2.0],
    },
    "AutoencoderTiny": {
        **halves(block_out_channels=(8,) * 4),
        "num_encoder_blocks": (1,) * 4,
        "num_decoder_blocks": (1,) * 4,
    },
    "Kandinsky6SRVAE": {
        "latent_channels": 4,
        "layers_per_block": 1,
        **halves(block_out_channels=(8, 16, 16, 16, 16)),
    },
    "VQModel": KL,
}
"""The arguments of those that take images."""

NOT_OF_IMAGES: dict[str, dict[str, Any] | None] = {
    "AutoencoderKLAllegro": {**FOUR, "norm_num_groups": 2},
    "AutoencoderKLKVAEAudio": None,
    "AutoencoderKLLTX2Audio": {"base_channels": 8},
    "AutoencoderKLMiniMaxH3": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "spatial_downsample_factors": (2, 2, 1),
        "temporal_downsample_factors": (1, 2, 2),
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_attention_head_dim": 16,
        "latents_mean": (0.0,) * 4,
        "latents_std": (1.0,) * 4,
    },
    "AutoencoderKLMiniMaxH3Audio": None,
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": KL["down_block_types"],
        "block_out_channels": (32, 32),
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": 8,
        "decoder_channels": 8,
        "downsampling_ratios": [2, 2],
        "channel_multiples": [1, 2],
    },
    "AutoencoderSAME": None,
    "AutoencoderVidTok": {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (32, 32),
        "encoder_down_block_types": KL["down_block_types"],
        "encoder_layers_per_block": 1,
        "decoder_block_out_channels": (32, 32),
        "decoder_layers_per_block": 1,
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "Cosmos3AVAEAudioTokenizer": None,
    "LongCatAudioDiTVae": None,
    "LTX2VideoDiffusionDecoderModel": None,
    "MMAudioVAE": None,
    "MMAudioVocoder": None,
    "MiniMaxMusic3Vocoder": None,
    "RFD4ProteinaAutoencoder": None,
}
"""Those that are refused, with their arguments where it is not plain by the name."""


class Patches(nn.Module):
    """In place of transformers' network in an AutoencoderRAE: a linear map of patches."""

    def __init__(self, hidden_size: int, patch_size: int, **_: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, hidden_size, patch_size, patch_size)


def see_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an AutoencoderRAE have :class:`Patches` as its network."""
    monkeypatch.setattr(autoencoder_rae, "_build_encoder", lambda **given: Patches(**given))
    monkeypatch.setitem(
        autoencoder_rae._ENCODER_FORWARD_FNS,
        "mae",
        lambda model, x, _: model.conv(x).flatten(2).transpose(1, 2),
    )


def make(name: str, **changes: Any) -> Any:
    """With random weights and statistics, in evaluation mode."""
    torch.manual_seed(1)
    arguments = CLASSES[name] if name in CLASSES else NOT_OF_IMAGES[name]
    assert arguments is not None
    with pytest.MonkeyPatch.context() as patch:
        see_patches(patch)
        model = getattr(diffusers, name)(**{**arguments, **changes}).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var", ".latents_mean", ".latents_std")):
            buffer.uniform_(0.5, 2)
    return model
