import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export import onnx
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traced_graphs_take_any_batch_height_and_width(tmp_path, monkeypatch, dtype):
    """The encoder's sides are multiples of f, the decoder's are the latent's: from 2 positions."""
    model = small().to(dtype)
    exact = copy.deepcopy(model).float()
    traced = []

    class Program:
        def save(self, file, external_data):
            assert not external_data
            Path(file).touch()

    class Session:
        def __init__(self, file, providers):
            assert Path(file).is_file()
            self.decodes = Path(file).name == "decoder.onnx"

        def run(self, names, inputs):
            ends = (["latent"], ["image"]) if self.decodes else (["image"], ["moments"])
            assert ([*inputs], names) == ends
            (x,) = (torch.from_numpy(array) for array in inputs.values())
            assert x.dtype == dtype
            with torch.no_grad():
                whole = exact.decode if self.decodes else exact.moments
                return [whole(x.float()).to(dtype).numpy()]

    def trace(half, args, file, **how):
        warnings.warn("about tracing", stacklevel=1)
        traced.append((half, args, how))
        return Program()

    monkeypatch.setattr(torch.onnx, "export", trace)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        differences = export_onnx(model, tmp_path)
    assert "about tracing" not in [str(one.message) for one in shown]
    assert differences.keys() == {"encoder.onnx", "decoder.onnx"}
    assert max(differences.values()) <= (0.0 if dtype == torch.float32 else 1e-3)
    found = []
    for half, (x,), how in traced:
        dims = how["dynamic_shapes"]["x"]
        found.append([*how["input_names"], *how["output_names"], *x.shape])
        assert (how["dynamo"], how["verbose"], half.model.folded) == (True, False, True)
        sides = [getattr(dims[axis], "root", dims[axis]) for axis in (2, 3)]
        assert [dim.min for dim in (dims[0], *sides)] == [1, 2, 2]
        assert [dims[axis].__name__ for axis in dims] == [
            "batch",
            *(
                f"{half.factor}*latent_{side}" if half.factor > 1 else f"latent_{side}"
                for side in ("height", "width")
            ),
        ]
        assert list(dims) == [0, 2, 3]
        seeded = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x, (2 * seeded - 1).to(dtype))
        assert torch.equal(half(x), model.moments(x) if half.factor > 1 else model.decode(x))
    assert found == [["image", "moments", 2, 3, 12, 16], ["latent", "image", 2, 4, 3, 4]]


def spoilt(moments: np.ndarray, how: str) -> np.ndarray:
    if how == "scaled":
        return moments * np.float32(1.001)
    if how == "log-variances":
        moments[:, 4:] += 0.01 * np.abs(moments).max()
    elif how == "not finite":
        moments[0, 0, 0, 0] = np.nan
    elif how == "smaller":
        return moments[:, :, :1]
    return moments


@pytest.mark.parametrize(
    ("how", "by"),
    [
        ("scaled", r"1\.0e-03"),
        ("log-variances", r"1\.0e-02"),
        ("not finite", "inf"),
        ("smaller", "inf"),
    ],
)
def test_onnx_file_that_differs_is_refused(tmp_path, monkeypatch, how, by):
    class Session:
        def __init__(self, file, providers):
            pass

        def run(self, names, inputs):
            with torch.no_grad():
                moments = model.moments(torch.from_numpy(inputs["image"])).numpy()
            return [spoilt(moments, how)]

    model = small()
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: Program())

    class Program:
        def save(self, file, external_data):
            Path(file).touch()

    with pytest.raises(ValueError, match=rf"by {by} .*0\.0001: .*`onnx`"):
        export(model, tmp_path / "vae", settings=ExportSettings(onnx=True))
    assert not any(tmp_path.iterdir())


def test_bfloat16_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"float16, not torch\.bfloat16"):
        export_onnx(small().bfloat16(), tmp_path)


def test_an_onnx_file_in_half_precision_that_differs_has_another_remedy(tmp_path, monkeypatch):
    class Session:
        def __init__(self, file, providers):
            pass

        def run(self, names, inputs):
            return [np.zeros_like(inputs["image"])]

    class Program:
        def save(self, file, external_data):
            Path(file).touch()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: Program())
    model = small().half()
    with pytest.raises(ValueError, match=r"by inf .*0\.02: write it with `dtype` float32$"):
        export_onnx(model, tmp_path)

    # The largest difference that is allowed is not reached.
    monkeypatch.setattr(onnx, "ONNX_TOLERANCES", {torch.float32: 0.0})
    monkeypatch.setattr(onnx, "_difference", lambda *_: 0.0)
    with pytest.raises(ValueError, match="by 0"):
        export_onnx(model.float(), tmp_path)


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


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_onnx_without_onnxruntime_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(torch.nn.Linear(1, 1), tmp_path)
