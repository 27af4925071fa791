"""What diffusers tests of every autoencoder, of ours: files in variants and parts, dtypes, casting,
training, slicing, tiling. Layerwise casting, offloading and checkpointing: test_as_diffusers.py.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor

from olvae import AutoencoderLiteVAE, LiteVAE
from tests.conftest import tiny


@pytest.fixture
def vae() -> LiteVAE:
    return tiny(use_quant=True)


@pytest.fixture
def model(vae) -> AutoencoderLiteVAE:
    return AutoencoderLiteVAE.from_autoencoder(vae)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 3, 16, 24) * 2 - 1


def output(model: AutoencoderLiteVAE, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image).sample


@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["one file", "parts"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_files_of_a_variant_in_one_or_several_parts(model, image, variant, size, tmp_path):
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    assert all((".fp16" in file.name) == (variant is not None) for file in files)
    for file in files:
        with safe_open(file, "pt") as opened:
            assert "olvae.sha256" in opened.metadata()
    back = AutoencoderLiteVAE.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(output(back, image), output(model, image))
    if variant is not None:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            AutoencoderLiteVAE.from_pretrained(tmp_path)


def test_a_broken_variant_is_found(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        AutoencoderLiteVAE.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_weight_has_the_dtype_that_was_asked_for(model, image, dtype, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    cast = AutoencoderLiteVAE.from_pretrained(tmp_path / "whole", torch_dtype=dtype)
    assert cast.dtype == dtype
    assert {p.dtype for p in cast.parameters()} == {dtype}
    assert output(cast, image.to(dtype)).dtype == dtype

    # Saved in it, and loaded with or without conversion.
    cast.save_pretrained(tmp_path / "cast")
    kept = AutoencoderLiteVAE.from_pretrained(tmp_path / "cast", torch_dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(cast.parameters(), kept.parameters(), strict=True))
    whole = AutoencoderLiteVAE.from_pretrained(tmp_path / "cast", torch_dtype=torch.float32)
    expected = output(AutoencoderLiteVAE.from_pretrained(tmp_path / "whole"), image)
    tolerance = {torch.float32: 0.0, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    assert (output(whole, image) - expected).abs().max() <= tolerance


def test_casting_says_nothing_of_an_empty_list(model, caplog):
    """diffusers 0.42 does: "There are modules ... that should be kept in float32: []"."""
    for cast in (lambda: model.to(torch.float16), lambda: model.to("cpu", torch.float32)):
        cast()
    model.half().float()
    assert model.dtype == torch.float32
    assert "float32" not in caplog.text


def test_training_moves_the_weights_and_their_average(model, image):
    model.train()
    average = EMAModel(model.parameters(), decay=0.5, model_cls=AutoencoderLiteVAE)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(image, sample_posterior=True).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    average.step(model.parameters())
    moved = 0
    for old, new, shadow in zip(before, model.parameters(), average.shadow_params, strict=True):
        moved += not torch.equal(old, new)
        assert torch.equal(old, new) or not torch.equal(old, shadow)
    assert moved > 0.8 * len(before)


def test_results_are_the_same_every_time_and_as_tuples(model, image):
    assert torch.equal(output(model, image), output(model, image))
    whole, parts = model(image), model(image, return_dict=False)
    assert torch.equal(whole.to_tuple()[0], parts[0])


def test_slicing_and_tiling_are_turned_on_and_off_again(model, image):
    expected = output(model, image)
    for on, off in (
        (model.enable_slicing, model.disable_slicing),
        (model.enable_tiling, model.disable_tiling),
    ):
        on()
        torch.testing.assert_close(output(model, image), expected, rtol=0, atol=1e-4)
        off()
        assert torch.equal(output(model, image), expected)


def test_a_config_builds_the_same_networks(model, image):
    built = AutoencoderLiteVAE.from_config(dict(model.config))
    built.load_state_dict(model.state_dict())
    assert torch.equal(output(built.eval(), image), output(model, image))
    assert json.loads(model.to_json_string())["_class_name"] == "AutoencoderLiteVAE"
    assert built.num_parameters() == sum(p.numel() for p in model.parameters())


def test_a_folder_with_a_variant_alone_is_a_target_as_well(model, image, tmp_path: Path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(LiteVAE.from_pretrained(tmp_path)(image)[0], output(model, image))
