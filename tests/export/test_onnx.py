import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export
from olvae.export.formats import LAYOUTS
from olvae.export.onnx import export_onnx
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from tests.conftest import tiny_config
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.classes import make

SIZES = ((1, 40, 24), (2, 4, 72), (5, 16, 16))


def small(
    encoder: dict | None = None, decoder: dict | None = None, use_quant: bool = False
) -> LiteVAE:
    params = tiny_config()["model"]["params"]
    # f4: a graph that is made in seconds.
    params["encoder_config"]["params"] |= {"dct_levels": 2} | (encoder or {})
    params["decoder_config"]["params"] |= {"channel_mult": [1, 1, 1]} | (decoder or {})
    return LiteVAE.from_config(
        params["encoder_config"], params["decoder_config"], 4, use_quant
    ).eval()


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4 * float(ours.abs().max()))


def check_files(model: LiteVAE, folder: Path) -> None:
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    assert [i.shape[1] for s in (encoder, decoder) for i in s.get_inputs()] == [3, 4]
    for batch, height, width in SIZES:
        x = torch.rand(batch, 3, height, width) * 2 - 1
        with torch.no_grad():
            posterior, reconstruction = model.encode(x), model(x)[0]
        (moments,) = encoder.run(["moments"], {"image": x.numpy()})
        assert_close(torch.cat((posterior.mean, posterior.logvar), dim=1), moments)
        (image,) = decoder.run(["image"], {"latent": moments[:, :4]})
        assert_close(reconstruction, image)


@pytest.mark.slow
def test_onnx_files_are_right_at_sizes_not_seen(tmp_path):
    model = small(use_quant=True)
    differences = export(model, tmp_path / "vae", settings=ExportSettings(onnx=True))
    assert max(differences.values()) < 1e-4
    check_files(model, tmp_path / "vae")
    assert "`encoder.onnx` takes `image`" in (tmp_path / "vae" / "README.md").read_text()
    # The files besides do not disturb it.
    assert LiteVAE.from_pretrained(tmp_path / "vae").latent_channels == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ({"wavelet": "db2"}, {"output": "image"}),
        ({"variant": "paper", "pool": "conv"}, {"variant": "paper_smc"}),
        ({"linear": True}, {"linear": True}),
        ({}, {"enlarge": 2}),
    ],
)
def test_onnx_files_of_other_networks(encoder, decoder, tmp_path):
    model = small(encoder, decoder)
    export_onnx(model, tmp_path)
    check_files(model, tmp_path)


def test_traced_graphs_take_any_batch_height_and_width(tmp_path, monkeypatch):
    """The encoder's sides are multiples of f, the decoder's are the latent's: from 2 positions."""
    model = small()
    traced = []

    class Program:
        def save(self, file, external_data):
            Path(file).touch()

    class Session:
        def __init__(self, file, providers):
            self.decodes = Path(file).name == "decoder.onnx"

        def run(self, names, inputs):
            (x,) = (torch.from_numpy(array) for array in inputs.values())
            with torch.no_grad():
                return [(model.decode(x) if self.decodes else model.moments(x)).numpy()]

    def trace(half, args, file, **how):
        traced.append((half, args, how))
        return Program()

    monkeypatch.setattr(torch.onnx, "export", trace)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert export_onnx(model, tmp_path) == {"encoder.onnx": 0.0, "decoder.onnx": 0.0}
    found = []
    for half, (x,), how in traced:
        dims = how["dynamic_shapes"]["x"]
        found.append([how["input_names"][0], how["output_names"][0], *x.shape])
        assert [dims[axis].__name__ for axis in dims] == [
            "batch",
            *(
                f"{half.factor}*latent_{side}" if half.factor > 1 else f"latent_{side}"
                for side in ("height", "width")
            ),
        ]
        assert list(dims) == [0, 2, 3]
        seeded = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x, 2 * seeded - 1)
        assert torch.equal(half(x), model.moments(x) if half.factor > 1 else model.decode(x))
    assert found == [["image", "moments", 2, 3, 12, 16], ["latent", "image", 2, 4, 3, 4]]


def test_onnx_file_that_differs_is_refused(tmp_path, monkeypatch):
    class Session:
        def __init__(self, file, providers):
            pass

        def run(self, names, inputs):
            with torch.no_grad():
                return [model.moments(torch.from_numpy(inputs["image"])).numpy() * 1.001]

    model = small()
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: Program())

    class Program:
        def save(self, file, external_data):
            Path(file).touch()

    with pytest.raises(ValueError, match=r"1\.0e-03 .*0\.0001: .*`onnx`"):
        export(model, tmp_path / "vae", settings=ExportSettings(onnx=True))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"float16, not torch\.bfloat16"):
        export_onnx(model.bfloat16(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("AutoencoderTiny", "float32"),
        ("AutoencoderKL", "float16"),
        ("AutoencoderKLWan", "float32"),
    ],
)
def test_onnx_files_beside_diffusers_classes_are_diffusers_networks(kind, dtype, tmp_path):
    """A tiny student's latents are in a diffusion model's units, as its weights' beside them."""
    theirs = make(kind)
    model = DiffusersAutoencoder(theirs).as_litevae("it").eval()
    for half in (model.encoder, model.decoder):
        half.use_latents(torch.full((4,), 3.0), torch.full((4,), 2.0))
    export(model, tmp_path / "vae", LAYOUTS["diffusers"](), ExportSettings(onnx=True, dtype=dtype))
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "vae" / f"{half}.onnx")
        for half in ("encoder", "decoder")
    )
    f = model.downscale
    x = torch.rand(2, 3, 4 * f, 6 * f) * 2 - 1
    kept = x.numpy().astype(dtype)
    (moments,) = encoder.run(["moments"], {"image": kept})
    n_z = model.latent_channels
    (image,) = decoder.run(["image"], {"latent": moments[:, :n_z]})
    whole = DiffusersAutoencoder(theirs)
    expected = whole.encode(torch.from_numpy(kept).float()).mean.detach()
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for found, wanted in ((moments[:, :n_z], expected), (image, whole.decode(expected).detach())):
        assert found.dtype == dtype
        error = np.abs(found.astype("float32") - wanted.numpy()).max()
        assert error < tolerance * float(wanted.abs().max())


@pytest.mark.slow
def test_onnx_files_beside_a_format_that_is_one_file(tmp_path):
    model = DiffusersAutoencoder(autoencoder_kl((32,))).as_litevae("it").eval()
    settings = ExportSettings(onnx=True)
    layout = LAYOUTS["ldm"]()
    export(model, tmp_path / "kl.safetensors", layout, settings)
    names = ["kl.safetensors", "kl_decoder.onnx", "kl_encoder.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / "kl.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"kl_encoder\.onnx: exists: `force`"):
        export(model, tmp_path / "kl.safetensors", layout, settings)


def test_onnx_files_of_an_earlier_export_do_not_stay_in_silence(tmp_path):
    model = DiffusersAutoencoder(autoencoder_kl((32,))).as_litevae("it").eval()
    (tmp_path / "kl_decoder.onnx").touch()
    with pytest.warns(UserWarning, match=r"kl_decoder\.onnx: "):
        export(model, tmp_path / "kl.safetensors", LAYOUTS["ldm"]())


def test_a_network_that_torch_does_not_trace_is_one_line(tmp_path, monkeypatch):
    def trace(*args, **kwargs):
        raise torch.onnx.errors.OnnxExporterError("step 3/3") from NotImplementedError("no cast\nx")

    monkeypatch.setattr(torch.onnx, "export", trace)
    with pytest.raises(ValueError, match=r"trace this .*cast$"):
        export(small(), tmp_path / "vae", settings=ExportSettings(onnx=True))
    assert not any(tmp_path.iterdir())


def test_onnx_without_onnxruntime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(torch.nn.Linear(1, 1), tmp_path)
