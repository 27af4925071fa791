"""An autoencoder whose decoder generates: formats that hold it, and formats that refuse it."""

import pytest
import torch

from olvae import LiteVAE
from olvae.export.as_diffusers import AutoencoderLiteVAE
from olvae.export.exporting import ExportSettings, export_target
from olvae.models.loading.targets import find_target
from tests.conftest import tiny
from tests.models.parts.flow.generating import one_step_config


def one_step_vae(folder) -> tuple[str, LiteVAE]:
    torch.manual_seed(0)
    model = tiny(decoder_config=one_step_config(noise_std=0.3, noise_seed=5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "model")
    return str(folder / "model"), model


@pytest.mark.parametrize("fold", [False, True])
def test_export_decodes_the_same_in_diffusers_and_here(tmp_path, fold):
    """To the bit here: the noise is in the file. Latents of any size."""
    target, model = one_step_vae(tmp_path)
    settings = ExportSettings(format="litevae", fold=fold, scaling_factor=0.5)
    export_target(find_target(target), tmp_path / "out", settings)
    z = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        wanted = model.decode(z)
        back = LiteVAE.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(back.decode(z), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(back.decode(z), back.decode(z))
        theirs = AutoencoderLiteVAE.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(theirs.decode(z).sample, wanted, rtol=1e-5, atol=1e-5)
    assert back.decoder.noise_std == 0.3
    if not fold:
        assert torch.equal(back.decoder.noise, model.decoder.noise)
        assert torch.equal(back.decode(z), wanted)


def test_export_in_float16_holds_its_noise(tmp_path):
    target, model = one_step_vae(tmp_path)
    settings = ExportSettings(format="litevae", dtype="float16", scaling_factor=0.5)
    export_target(find_target(target), tmp_path / "out", settings)
    z = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        half = LiteVAE.from_pretrained(tmp_path / "out").decode(z)
        torch.testing.assert_close(half, model.decode(z), rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_onnx_holds_the_noise_of_every_place(tmp_path, caplog):
    """At another batch and size than the traced ones, beyond where the noise repeats."""
    onnxruntime = pytest.importorskip("onnxruntime")
    target, model = one_step_vae(tmp_path)
    settings = ExportSettings(format="litevae", onnx=True, scaling_factor=0.5)
    export_target(find_target(target), tmp_path / "out", settings)
    # onnxscript says nothing of what it leaves as it is.
    assert not [record for record in caplog.records if "onnxscript" in record.name]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "decoder.onnx"))
    z = torch.randn(1, 4, 5, 40)
    (image,) = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(image), model.decode(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("diffusers", "out", "`format` litevae"),
        ("ldm", "out.safetensors", "`format` litevae"),
        ("monai", "out.safetensors", "`format` litevae"),
        ("taesd", "out", "only TinyEncoder and TinyDecoder"),
        ("qwen2d", "out.safetensors", "only Qwen-Image's and Wan's"),
    ],
)
def test_formats_of_other_networks_refuse_it(tmp_path, name, file, message):
    target, _ = one_step_vae(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_target(find_target(target), tmp_path / file, ExportSettings(format=name))
    assert not (tmp_path / file).exists()
