"""What an export takes from its target: format, factors, numbers, licence, steps; and settings."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export import exporting as module
from olvae.export.exporting import ExportSettings, check_place, export, export_target
from olvae.export.formats import LAYOUTS
from olvae.export.model_card import Provenance
from olvae.models.loading.loader import Target
from tests.export.test_formats_enlarged import made
from tests.export.tiny import ours, tiny_litevae
from tests.models.autoencoder_kl import autoencoder_kl

CARD = """---
license: mit
---

An autoencoder, made with open-LiteVAE.

## Training data

Cats.

## Licence

Weights: mit. open-LiteVAE, the code, is under Apache-2.0.
"""


def target_of(model: LiteVAE, given: str = "vae", **more: Any) -> Target:
    return Target(lambda: model, name="a model", given=given, **more)


@pytest.fixture
def exported(monkeypatch) -> list[SimpleNamespace]:
    """What is handed to the export proper, which writes nothing here."""
    calls = []

    def note(model, place, layout, settings, provenance):
        given = {"model": model, "place": place, "layout": layout, "settings": settings}
        calls.append(SimpleNamespace(**given, provenance=provenance))
        return {"loaded back": 0.25}

    monkeypatch.setattr(module, "export", note)
    return calls


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (tiny_litevae, None, "litevae"),
        (tiny_litevae, "comfyui", "comfyui"),
        (lambda: ours(autoencoder_kl((32, 32))), None, "diffusers"),
        (lambda: made("AutoencoderKL"), None, "litevae"),
    ],
    ids=["ours", "asked for", "diffusers", "at 2x"],
)
def test_the_format_is_the_networks_or_the_users(make, name, expected, exported, tmp_path):
    settings = ExportSettings(format=name)
    place = tmp_path / f"vae{LAYOUTS[expected].suffix}"
    model = make()
    differences, _ = export_target(target_of(model), place, settings)
    (given,) = exported
    assert differences == {"loaded back": 0.25}
    assert type(given.layout) is LAYOUTS[expected]
    assert (given.place, given.settings) == (place, settings)
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in given.model.state_dict().items())


def test_a_target_that_a_format_does_not_hold_is_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"^vae: no class of diffusers has"):
        export_target(target_of(tiny_litevae()), tmp_path / "vae", ExportSettings("diffusers"))
    untrained = target_of(tiny_litevae(), config={"run": {"untrained": "decoder"}})
    with pytest.raises(ConfigError, match=r"^vae: its decoder has never been trained: .*/decoder$"):
        export_target(untrained, tmp_path / "vae", ExportSettings())
    assert exported == []


def test_the_place_is_looked_at_before_the_model_is_loaded(exported, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    found = []
    monkeypatch.setattr(module, "put_back", found.append)
    never = Target(lambda: pytest.fail("was loaded"), name="a", given="a")
    with pytest.raises(FileExistsError, match="not an export"):
        export_target(never, tmp_path / "photos", ExportSettings())
    assert found == [tmp_path / "photos"]
    with pytest.raises(ValueError, match="this format is one file"):
        ExportSettings("ldm").check(tmp_path / "photos")


@pytest.mark.parametrize(("outdated", "scaling"), [(False, 0.9), (True, 1.0)])
def test_factors_of_earlier_weights_are_left_out(
    outdated, scaling, exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(Target, "factors_outdated", outdated)
    _, notes = export_target(target_of(tiny_litevae()), tmp_path / "vae", ExportSettings())
    (given,) = exported
    assert given.model.scaling_factor == scaling
    assert given.provenance.factors_from == (None if outdated else "from a model")
    assert len(notes) == outdated


def test_factors_are_set_on_the_model_that_is_exported(exported, tmp_path, monkeypatch):
    """Which of some targets is another object than what was loaded."""
    seen = []

    def note(*given):
        seen.append(given)
        return "there"

    monkeypatch.setattr(module, "set_factors", note)
    model = tiny_litevae()
    loaded = SimpleNamespace(as_litevae=lambda given: model)
    target = target_of(loaded)
    export_target(target, tmp_path / "vae", ExportSettings(scaling_factor=0.5))
    ((one, other, found, factors, *_),) = seen
    assert (one, other, found, factors) == (model, loaded, target, {"scaling_factor": 0.5})
    assert exported[0].provenance.factors_from == "there"


def test_a_cards_licence_data_and_numbers_are_taken_over(exported, tmp_path):
    """Of a folder with our card; a file has no card."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "metrics.json").write_text("{}")
    target = target_of(tiny_litevae(), str(folder), config={"a": 1})
    for settings in (ExportSettings(), ExportSettings(license="apache-2.0")):
        export_target(target, tmp_path / "vae", settings)
    export_target(target, tmp_path / "vae.safetensors", ExportSettings("comfyui"))
    first, licensed, file = (one.provenance for one in exported)
    common = {"name": "a model", "config": {"a": 1}, "factors_from": "from a model"}
    assert first == Provenance(
        **common,
        metrics=folder / "metrics.json",
        licence="mit",
        data="Cats.",
        terms="Weights: mit.",
    )
    assert (licensed.licence, licensed.terms, licensed.data) == ("apache-2.0", None, "Cats.")
    assert file == Provenance("a model", {"a": 1})


@pytest.mark.parametrize(("noted", "steps"), [(7, 7), (torch.tensor(7), None), (None, None)])
def test_the_steps_of_a_run_are_those_of_its_weights(noted, steps, exported, tmp_path, monkeypatch):
    located = []

    def locate(given):
        located.append(given)
        return Path("last.ckpt")

    def read(path, check):
        assert (path, check) == (Path("last.ckpt"), False)
        return {} if noted is None else {"global_step": noted}

    monkeypatch.setattr(module, "locate_weights", locate)
    monkeypatch.setattr(module, "read_checkpoint", read)
    run = SimpleNamespace(path=tmp_path / "run")
    target = target_of(tiny_litevae(), "a run, raw weights", run=run, raw=True)
    export_target(target, tmp_path / "vae", ExportSettings())
    (given,) = exported
    assert (located, given.provenance.steps, given.provenance.raw) == (["a run"], steps, True)


@pytest.mark.parametrize(
    ("rows", "raw", "about"),
    [
        ([], False, None),
        ([("run", None)], False, None),
        ([("run", "own"), ("other, raw weights", "12ab")], False, None),
        ([("run, raw weights", "own")], True, None),
        ([("run", "own")], True, "run, not a model"),
        ([("run, raw weights", "own")], False, "run, raw weights, not a model"),
        ([("run", "12ab")], False, "earlier weights: evaluate again"),
    ],
)
def test_numbers_of_other_weights_are_left_out(rows, raw, about, tmp_path, monkeypatch):
    results = SimpleNamespace(rows=[SimpleNamespace(target=t, weights=w) for t, w in rows])
    monkeypatch.setattr(module, "tensors_sum", lambda _: "own")
    monkeypatch.setattr(module, "Results", SimpleNamespace(read=lambda path: results))
    model = nn.Linear(1, 1)
    run = SimpleNamespace(path=tmp_path)
    target = target_of(model, run=run, raw=raw)
    notes: list[str] = []
    assert module._find_metrics(target, model, notes) is None
    file = tmp_path / "metrics.json"
    file.touch()
    assert module._find_metrics(target, model, notes) == (file if about is None else None)
    assert notes == ([] if about is None else [f"{file} is left out: it is about {about}"])

    # Beside a target that is no run, nothing changes.
    folder = target_of(model, str(tmp_path), raw=raw)
    assert module._find_metrics(folder, model, notes) == file


def test_the_folder_of_a_target():
    run = SimpleNamespace(path=Path("runs/a"))
    for given, folder in (
        ("vae", Path("vae")),
        ("vae, raw weights", Path("vae")),
        ("diffusers:vae", Path("vae")),
        ("olvae:photos-f8c12", module.shipped_folder("olvae:photos-f8c12")),
    ):
        assert module._folder_of(target_of(None, given)) == folder
        assert module._folder_of(target_of(None, given, run=run)) == run.path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, None),
        ({"latents": Path("a"), "per_channel": True}, None),
        ({"onnx": True, "dtype": "float16"}, None),
        ({"dtype": "bfloat16"}, None),
        ({"latents": Path("a"), "scaling_factor": 0.5}, "`latents` has both factors"),
        ({"latents": Path("a"), "shift_factor": 0.5}, "`latents` has both factors"),
        ({"per_channel": True}, "`per_channel` takes its numbers from `latents`"),
        ({"per_channel": True, "scaling_factor": 0.5}, "`per_channel` takes"),
        ({"scaling_factor": -1.0}, "scaling_factor: expected a number above 0"),
        ({"onnx": True, "dtype": "bfloat16"}, "`onnx` writes float32, or float16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    if message is None:
        found = ExportSettings(**settings)
        given = {name: settings[name] for name in settings if name in module.FACTORS}
        assert found.given_factors() == given
        return
    with pytest.raises(ConfigError, match=message):
        ExportSettings(**settings)


def test_settings_that_a_format_has_no_place_for_are_refused():
    settings = ExportSettings(license="mit")
    assert type(settings.layout("litevae")) is LAYOUTS["litevae"]
    with pytest.raises(ConfigError, match=r"^`license` .*`format` ldm: one file has no model card"):
        settings.layout("ldm")
    with pytest.raises(ConfigError, match=r"^`fold` does not go with `format` diffusers: "):
        ExportSettings(fold=True).layout("diffusers")
    assert ExportSettings(onnx=True).layout("ldm").suffix == ".safetensors"


def test_metrics_are_copied_and_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "model_card", lambda *_: "a card")
    (tmp_path / "numbers.json").write_bytes(b"numbers")
    export(
        tiny_litevae(), tmp_path / "vae", None, None, Provenance("a", {}, tmp_path / "numbers.json")
    )
    assert (tmp_path / "vae" / "metrics.json").read_bytes() == b"numbers"
    assert (tmp_path / "vae" / "README.md").read_text() == "a card"
    with pytest.raises(ValueError, match=r"^no class of diffusers has"):
        export(tiny_litevae(), tmp_path / "other", LAYOUTS["diffusers"]())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_but_the_buffers_of_a_norm_are_rounded(dtype):
    """These are FLUX.2's factors."""
    model = tiny_litevae()
    model.encoder.norm = nn.BatchNorm2d(2)
    model.encoder.norm.running_mean.fill_(0.1)
    before = copy.deepcopy(model.state_dict())
    rounded, differences = module._as_exported(model, dtype, False)
    assert differences == {}
    state = rounded.state_dict()
    for name, tensor in state.items():
        kept = "running_" in name or not tensor.is_floating_point()
        assert torch.equal(tensor, before[name] if kept else before[name].to(dtype)), name
    assert state["encoder.norm.running_mean"].dtype == torch.float32


def test_graphs_of_an_earlier_export_are_warned_of(tmp_path):
    (tmp_path / "a_encoder.onnx").touch()
    place = tmp_path / "a.safetensors"
    with pytest.warns(UserWarning, match=r"a_encoder\.onnx: of an earlier export"):
        assert module._graphs_beside(place, "a_", ExportSettings()) == []
    with pytest.raises(FileExistsError, match=r"a_encoder\.onnx: exists: `force`"):
        module._graphs_beside(place, "a_", ExportSettings(onnx=True))
    graphs = module._graphs_beside(place, "a_", ExportSettings(onnx=True, force=True))
    assert [path.name for path in graphs] == ["a_encoder.onnx", "a_decoder.onnx"]


def test_graphs_of_a_tiny_autoencoder_have_its_own_latents():
    given = []

    class Half:
        def use_latents(self, mean, std):
            given.append((mean.tolist(), std.tolist()))

    model = SimpleNamespace(latent_channels=2, encoder=Half(), decoder=Half())
    traced = module.in_diffusion_units(model)
    assert given == [([0.0, 0.0], [1.0, 1.0])] * 2
    assert traced.encoder is not model.encoder


class Scaled(nn.Module):
    """Means of two channels of 4x4 positions, and log-variances; images are the means, twice."""

    in_channels, downscale = 3, 1

    def __init__(self, deterministic: bool, logvar: float, size: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(size))
        self.deterministic = deterministic
        self.logvar = logvar

    def moments(self, x):
        mean = self.factor * x[:, :2]
        return torch.cat([mean, torch.full_like(mean, self.logvar)], dim=1)

    def decode(self, z):
        return 2.0 * z


def compared(model: Scaled, other: Scaled) -> float:
    return module._difference("loaded", model, other.moments, other.decode)


def test_outputs_differ_relative_to_their_largest_value(monkeypatch):
    """Means alone where the network is deterministic, whose log-variances are far larger."""
    wide = Scaled(False, -1.0, 1000.0)
    assert 0.0 < compared(wide, Scaled(False, -1.0, 1000.0 * (1 + 5e-6))) < 1e-5
    with pytest.raises(ValueError, match=r"loaded, the result differs by 1\.0e-02 of the largest"):
        compared(Scaled(False, -1.0), Scaled(False, -1.01))
    assert compared(Scaled(True, -30.0), Scaled(True, -30.1)) == 0.0
    with pytest.raises(ValueError, match=r"differs by [12]\.\de-04"):
        compared(Scaled(True, -30.0), Scaled(True, -30.0, 1 + 2e-4))
    with pytest.raises(ValueError, match="differs by nan"):
        compared(Scaled(False, -1.0), Scaled(False, torch.nan))
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    assert compared(wide, wide) == 0.0


def test_a_file_may_be_written_where_nothing_is(tmp_path):
    check_place(tmp_path / "new.safetensors", ".safetensors")
    check_place(tmp_path / "new" / "deep")
