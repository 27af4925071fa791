"""Run the pipelines of diffusers that need transformers, on written-back autoencoders: a script."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from olvae.export.formats import DiffusersLayout
from olvae.models.loading import from_diffusers
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from tests.models.loading.classes import make

SMALL: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "num_layers": 1,
}


def flux2(vae: Any) -> Any:
    rest = {"num_single_layers": 1, "timestep_guidance_channels": 16, "axes_dims_rope": (4,) * 4}
    transformer = diffusers.Flux2Transformer2DModel(in_channels=16, **SMALL, **rest)
    return diffusers.Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def qwen_image(vae: Any) -> Any:
    shape = {"in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 6, 6)}
    transformer = diffusers.QwenImageTransformer2DModel(patch_size=2, **shape, **SMALL)
    return diffusers.QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer
    )


def tiny(vae: Any) -> Any:
    shape = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
    }
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    unet = diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=4, **shape, **blocks)
    parts = (vae, None, None, unet, DDIMScheduler(), None, None)
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)


PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AutoencoderKLFlux2": (flux2, {}),
    "AutoencoderKLQwenImage": (
        qwen_image,
        {"prompt_embeds_mask": torch.ones(1, 3, dtype=torch.long)},
    ),
    "AutoencoderTiny": (tiny, {"guidance_scale": 1.0}),
}


@torch.no_grad()
def main(folder: Path) -> None:
    """The image is what our trained decoder makes of the latents that the pipeline hands to
    diffusers' class.
    """
    from_diffusers.PROBE = 32
    for name, (build, arguments) in PIPELINES.items():
        ours = DiffusersAutoencoder(make(name)).as_litevae(name).eval()
        for parameter in ours.decoder.parameters():  # as training would
            parameter += 0.05 * torch.randn_like(parameter)
        DiffusersLayout().write(ours, folder / name)
        back = getattr(diffusers, name).from_pretrained(folder / name, low_cpu_mem_usage=False)
        seen, decode = [], back.decode
        back.decode = lambda z, *a, seen=seen, decode=decode, **k: (
            seen.append(z),
            decode(z, *a, **k),
        )[1]
        pipeline = build(back)
        pipeline.set_progress_bar_config(disable=True)
        given = {"prompt_embeds": torch.randn(1, 3, 8), "height": 32, "width": 32, **arguments}
        image = pipeline(num_inference_steps=2, output_type="pt", **given).images
        z = seen[0][:, :, 0] if seen[0].ndim == 5 else seen[0]
        torch.testing.assert_close(
            image, (ours.decode(z) / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5
        )
        sys.stdout.write(f"{name} {type(pipeline).__name__}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
