import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import group_offloading
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import dynamic_modules_utils

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.export import as_diffusers
from olvae.models.large.tiling import crop_to, pad_to_multiple, peak_bytes, tile_bytes
from tests.conftest import tiny
from tests.models.autoencoder_kl import autoencoder_kl, tiny_kl


@pytest.fixture
def vae(request) -> LiteVAE:
    """With a quantizer, and so with all that there is, unless the test says otherwise."""
    model = tiny(use_quant=getattr(request, "param", True))
    model.scaling_factor, model.shift_factor = 0.5, 0.125
    return model


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 3, 16, 24) * 2 - 1


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("vae", [False, True], ids=["plain", "quantizer"], indirect=True)
def test_autoencoder_litevae_there_and_back_is_bit_for_bit_the_same(vae, image, tmp_path):
    """An export, diffusers' class from it, that one's own saving, and ours again:
    bit for bit the same.
    """
    vae.save_pretrained(tmp_path / "a")
    model = AutoencoderLiteVAE.from_pretrained(tmp_path / "a")
    assert not model.training
    model.save_pretrained(tmp_path / "b")
    back = LiteVAE.from_pretrained(tmp_path / "b")
    back.save_pretrained(tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    assert (tmp_path / "a" / "config.json").read_text() == (
        tmp_path / "c" / "config.json"
    ).read_text()
    expected = vae(image)[0]
    assert torch.equal(model(image).sample, expected)
    assert torch.equal(back(image)[0], expected)
    assert (back.scaling_factor, back.shift_factor) == (0.5, 0.125)
    shared = AutoencoderLiteVAE.from_autoencoder(vae)
    assert torch.equal(shared(image).sample, expected)
    assert shared.encoder is vae.encoder
    assert torch.equal(shared.autoencoder(image)[0], expected)
    assert shared.autoencoder.for_diffusion == vae.for_diffusion
    entry = vae.decoder if vae.quantizer is None else vae.quantizer.post_quant_conv
    assert shared.post_quant_conv is entry
    shared.decoder.train()
    shared = AutoencoderLiteVAE.from_autoencoder(shared.autoencoder)
    shared.enable_tiling(2**30)
    # As a half in training mode asks for, with tiling too.
    assert shared(image).sample.requires_grad
    assert (shared.training, shared.encoder.training, shared.decoder.training) == (
        False,
        False,
        True,
    )


def test_an_export_replaces_weights_that_were_divided(vae, image, tmp_path):
    """Which diffusers would read, in place of the one file."""
    AutoencoderLiteVAE.from_autoencoder(vae).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for p in vae.parameters():
        p.data.mul_(1.5)
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderLiteVAE.from_pretrained(tmp_path)(image).sample, vae(image)[0])
    AutoencoderLiteVAE.from_autoencoder(vae).save_pretrained(tmp_path, max_shard_size="20KB")
    AutoencoderLiteVAE.from_autoencoder(vae).save_pretrained(tmp_path)
    assert torch.equal(AutoencoderLiteVAE.from_pretrained(tmp_path)(image).sample, vae(image)[0])
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_diffusers_auto_model(vae, image, tmp_path, monkeypatch, caplog):
    """It runs the five lines beside an export, which say so if this package is missing."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    vae.save_pretrained(tmp_path / "a")
    AutoencoderLiteVAE.from_autoencoder(vae).save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        model = AutoModel.from_pretrained(str(folder), trust_remote_code=True)
        assert type(model) is AutoencoderLiteVAE
        assert torch.equal(model(image).sample, vae(image)[0])
        with pytest.raises(ValueError, match="custom code"):
            AutoModel.from_pretrained(str(folder))
    assert "not expected" not in caplog.text
    monkeypatch.setitem(sys.modules, "olvae", None)
    with pytest.raises(ImportError, match=r"pip install git\+https://github"):
        AutoModel.from_pretrained(str(tmp_path / "a"), trust_remote_code=True)


def test_autoencoder_litevae_has_the_interface_of_autoencoder_kl(vae, image):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    theirs = autoencoder_kl((32,) * 4)
    read_by_pipelines = (
        "block_out_channels", "force_upcast", "in_channels", "latent_channels", "out_channels",
        "sample_size", "scaling_factor", "shift_factor", "use_post_quant_conv", "use_quant_conv",
    )  # fmt: skip
    assert set(read_by_pipelines) <= set(theirs.config) & set(model.config)
    assert 2 ** (len(model.config.block_out_channels) - 1) == vae.downscale == 8
    assert (
        model.config.latent_channels,
        model.config.scaling_factor,
        model.config.shift_factor,
    ) == (4, 0.5, 0.125)
    assert (model.config.sample_size, model.config.force_upcast) == (16, False)
    assert model.config.use_quant_conv == (vae.quantizer is not None)

    posterior, ours = model.encode(image).latent_dist, vae.encode(image)
    (other,) = model.encode(image, return_dict=False)
    assert (
        type(posterior) is type(other) is type(theirs.encode(torch.zeros(1, 3, 16, 16)).latent_dist)
    )
    assert torch.equal(posterior.mean, ours.mean)
    assert torch.equal(posterior.logvar, ours.logvar)
    z = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(z, ours.sample(torch.Generator().manual_seed(1)))
    assert torch.equal(model.decode(z).sample, vae.decode(z))
    assert torch.equal(model.decode(z, return_dict=False, generator=None)[0], vae.decode(z))
    sampled = model(image, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
    assert torch.equal(sampled, vae.decode(z))
    assert torch.equal(model(image, return_dict=False)[0], vae(image)[0])


def test_slicing_changes_nothing_but_the_batch(vae, image, monkeypatch):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    assert (model.use_slicing, model.use_tiling) == (False, False)
    whole = model(image).sample
    sizes: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.enable_slicing()
    torch.testing.assert_close(model(image).sample, whole, rtol=1e-5, atol=1e-6)
    assert sizes == [1] * 6
    model.disable_slicing()
    model(image)
    assert sizes[6:] == [3, 3]


@pytest.fixture
def large() -> torch.Tensor:
    # Statistics differ from row to row.
    return torch.randn(2, 3, 88, 40) * torch.linspace(0.1, 2.0, 88)[:, None]


def watch(model: AutoencoderLiteVAE) -> list[str]:
    """Which halves are run whole, from now on, and on how many images."""
    seen: list[str] = []
    for name in ("encoder", "decoder"):
        getattr(model, name).register_forward_pre_hook(
            lambda _, x, name=name: seen.append(f"{name} {len(x[0])}")
        )
    return seen


@pytest.mark.parametrize("slicing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tiling_gives_the_whole_result_within_the_memory(vae, large, tmp_path, slicing):
    vae.save_pretrained(tmp_path)
    model = AutoencoderLiteVAE.from_pretrained(tmp_path)
    seen = watch(model)
    with torch.no_grad():
        posterior = model.encode(large).latent_dist
        z = posterior.mode()
        expected, whole = model.decode(z).sample, model(large).sample
        if slicing:
            model.enable_slicing()
        batch = 1 if slicing else 2
        memory = tile_bytes(model.decoder, 3, (batch, 4, 11, 5))
        assert memory < min(
            peak_bytes(model.encoder, lambda m, x: m(x), (batch, 3, 88, 40)),
            peak_bytes(model.decoder, lambda m, x: m(x), (batch, 4, 11, 5)),
        )
        model.enable_tiling(memory)
        seen.clear()
        tiled = model.encode(large).latent_dist
        torch.testing.assert_close(tiled.mean, posterior.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(tiled.logvar, posterior.logvar, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.decode(z).sample, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(large).sample, whole, rtol=0, atol=1e-4)
        with torch.enable_grad():  # without anything to learn
            model.decode(z)
        assert seen == []  # neither half has seen a whole image
        model.disable_tiling()
        model.decode(z)
        assert seen == [f"decoder {batch}"] * (2 // batch)


def test_gradients_are_not_lost_to_tiling(vae):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    model.enable_tiling(1)
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    model.decode(z).sample.sum().backward()
    assert z.grad.abs().sum() > 0
    model.train()
    model(torch.randn(1, 3, 16, 16)).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tiling_in_no_memory_is_refused(vae):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AutoencoderLiteVAE.from_autoencoder(vae).enable_tiling(0)


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (16, 9)])
def test_autoencoder_litevae_takes_any_size(vae, size):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    x = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        mean = model.encode(x).latent_dist.mode()
        torch.testing.assert_close(
            mean, vae.encode(pad_to_multiple(x, vae.downscale)).mode(), rtol=0, atol=0
        )
        assert model.decode(mean).sample.shape == (2, 3, *(8 * -(-side // 8) for side in size))
        expected = crop_to(vae.decode(mean), size)
        torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=0)
        model.enable_tiling(tile_bytes(model.decoder, 1, (2, 4, *mean.shape[2:])))
        torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=1e-4)


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(2)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    return DiTTransformer2DModel(
        in_channels=4, out_channels=4, num_embeds_ada_norm=1000, **sizes
    ).eval()


def test_diffusers_pipeline_makes_an_image(vae, tmp_path):
    pipeline = DiTPipeline(dit(), AutoencoderLiteVAE.from_autoencoder(vae), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def run(pipeline: DiTPipeline) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(0)
        # (2, 32, 32, 3) in every version; "pt" has had two orders of axes.
        found = pipeline([3, 7], num_inference_steps=3, generator=seeded, output_type="np")
        return torch.from_numpy(found.images).movedim(-1, 1)

    latents: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    images = run(pipeline)
    handle.remove()
    assert images.shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(images, (vae.decoder(latents[0]) / 2 + 0.5).clamp(0, 1))
    assert images.std() > 0

    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"][1] == "AutoencoderLiteVAE"
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.vae, AutoencoderLiteVAE)
    assert torch.equal(run(again), images)
    assert torch.equal(
        LiteVAE.from_pretrained(tmp_path / "vae").decode(torch.ones(1, 4, 2, 2)),
        vae.decode(torch.ones(1, 4, 2, 2)),
    )


def test_autoencoder_litevae_refuses_a_config_that_contradicts_itself(vae, tmp_path):
    """One that names other code is, too: see test_spec.py."""
    vae.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "latent_channels": 5}))
    with pytest.raises(ValueError, match=r"latent_channels is 5, .* 4"):
        AutoencoderLiteVAE.from_pretrained(tmp_path)


def test_the_export_of_another_class(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"diffusers\.AutoencoderKL",
    ):
        AutoencoderLiteVAE.from_pretrained(tmp_path)


def test_networks_of_others_are_not_built_and_ranges_have_to_fit(vae):
    config = vae.export_config()
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    harm = {"target": "os.system", "params": {"command": "true"}}
    with pytest.raises(ValueError, match=r"os\.system"):
        AutoencoderLiteVAE(**{**given, "decoder_config": harm})
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    model.register_to_config(pixel_range={"pairs": [[0, 1], [0, 2]]})
    with pytest.raises(ValueError, match="pixel_range"):
        assert model.autoencoder


def test_runs_and_checkpoints_are_not_exports(tmp_path, monkeypatch):
    run = tmp_path / "2026_photos_32"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.touch()
    monkeypatch.setattr(as_diffusers, "find_run", lambda given: run if given == "photos" else given)
    for given in (checkpoint, run, "photos"):
        with pytest.raises(ValueError, match=rf"^{given}: diffusers loads exports: "):
            AutoencoderLiteVAE.from_pretrained(given)


def test_damaged_weights_of_a_subfolder_are_found(vae, image, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    whole = AutoencoderLiteVAE.from_pretrained(tmp_path, subfolder="vae")
    assert torch.equal(whole(image).sample, vae(image)[0])
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        AutoencoderLiteVAE.from_pretrained(tmp_path, subfolder="vae")


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_diffusers_casts_every_convolution_layer_by_layer(vae, image, storage):
    """Self-modulated ones too, whose weight only their own convolution uses."""
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    expected = model(image).sample
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = [name for name, p in model.named_parameters() if p.dtype == storage]
    assert any("conv1.conv.weight" in name for name in stored)
    # Rounded weights: bfloat16 keeps 8 bits, float8 4 bits.
    error = (model(image).sample - expected).abs().max()
    assert 0.0 < error < (0.2 if storage == torch.float8_e4m3fn else 0.02)


@pytest.mark.parametrize("how", ["sequential", "group"])
def test_diffusers_offloads_every_weight(vae, image, how):
    """Sequential offloading of pipelines leaves all weights on the meta device between calls."""
    from accelerate import cpu_offload
    from diffusers.hooks import apply_group_offloading

    model = AutoencoderLiteVAE.from_autoencoder(vae)
    expected = model(image).sample
    cpu = torch.device("cpu")
    if how == "sequential":
        cpu_offload(model, execution_device=cpu, offload_buffers=True)
        assert all(p.device.type == "meta" for p in model.parameters())
    else:
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
        )
    assert torch.equal(model(image).sample, expected)


def lose_offloaded(model: AutoencoderLiteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on weights that diffusers offloads are NaN until they are loaded."""
    weights = {id(p): p.detach().clone() for p in model.parameters()}

    def tensors(group) -> list[torch.Tensor]:
        return [p for module in group.modules for p in module.parameters()] + group.parameters

    def load(group) -> None:
        for tensor in tensors(group):
            tensor.data.copy_(weights[id(tensor)])

    def offload(group) -> None:
        for tensor in tensors(group):
            tensor.data.fill_(torch.nan)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", load)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("how", ["sequential", "leaf_level", "block_level"])
def test_both_halves_have_their_weights_when_a_pipeline_calls_them(
    vae, image, how, tiled, monkeypatch
):
    """Pipelines call `encode` and `decode`; hooks around `forward` have to see that, and tiles."""
    from accelerate import cpu_offload

    model = AutoencoderLiteVAE.from_autoencoder(vae)
    cpu = torch.device("cpu")
    with torch.no_grad():
        z = model.encode(image).latent_dist.mode()
        expected = model.decode(z).sample
        memory = tile_bytes(model.decoder, 1, (3, 4, 2, 3))
        if how == "sequential":
            cpu_offload(model, execution_device=cpu, offload_buffers=True)
        else:
            lose_offloaded(model, monkeypatch)
            model.enable_group_offload(
                onload_device=cpu, offload_device=cpu, offload_type=how, num_blocks_per_group=1
            )
            assert all(p.isnan().all() for p in model.parameters())
        if tiled:
            model.enable_tiling(memory)
        torch.testing.assert_close(model.encode(image).latent_dist.mode(), z, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.decode(z).sample, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(image).sample, expected, rtol=0, atol=1e-4)


def test_weights_that_are_cast_layer_by_layer_are_counted_as_they_compute(vae, large):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    shape = (1, 4, 11, 5)
    memory = peak_bytes(model.decoder, lambda m, x: m(x), shape)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert peak_bytes(model.decoder, lambda m, x: m(x), shape) == memory
    with torch.no_grad():
        expected = model(large).sample
        model.enable_tiling(memory // 2)
        torch.testing.assert_close(model(large).sample, expected, rtol=0, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(vae, image):
    model = AutoencoderLiteVAE.from_autoencoder(vae)
    model.train()
    gradients = []
    for switch in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        switch()
        assert model.is_gradient_checkpointing == (not gradients)
        model.zero_grad()
        model(image).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
    with pytest.raises(ValueError, match="torch's own"):
        model.enable_gradient_checkpointing(lambda run, *inputs: run(*inputs))


def test_a_device_map_is_taken(vae, image, tmp_path):
    vae.save_pretrained(tmp_path)
    model = AutoencoderLiteVAE.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(model(image).sample, vae(image)[0])


def test_moving_silences_diffusers_logger_only_meanwhile(vae, tmp_path, monkeypatch):
    """Also where torch refuses."""
    logger = logging.getLogger(ModelMixin.__module__)
    monkeypatch.setattr(logger, "filters", [])
    vae.save_pretrained(tmp_path)
    model = AutoencoderLiteVAE.from_pretrained(tmp_path)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert logger.filters == []
    with pytest.raises(TypeError):
        model.to(torch.int64)
    assert logger.filters == []
