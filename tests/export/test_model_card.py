"""What model cards say."""

import json
import re
from pathlib import Path

import pytest

from olvae import LiteVAE
from olvae.config import save
from olvae.export.exporting import export
from olvae.export.formats import LAYOUTS
from olvae.export.model_card import Provenance, model_card, own_card, read_card
from olvae.runs import Run
from tests.conftest import tiny_config
from tests.export.tiny import ours, tiny_litevae
from tests.models.autoencoder_kl import PER_CHANNEL, autoencoder_kl


@pytest.fixture
def metrics(tmp_path) -> Path:
    path = tmp_path / "metrics.json"
    result = {
        "target": "a_run",
        "n": 22,
        "metrics": {"psnr": 24.6312, "ssim": 0.7},
        "skipped": {"rfid": "why"},
    }
    other = {"target": "bicubic", "n": 22, "metrics": {"ssim": 0.612}, "skipped": {}}
    protocol = {"name": "open-litevae", "version": 1, "size": 64}
    path.write_text(
        json.dumps({"protocol": protocol, "protocol_hash": "ab12", "results": [result, other]})
    )
    return path


def card_of(model: LiteVAE, provenance: Provenance, layout: str = "litevae") -> str:
    return model_card(model, LAYOUTS[layout](), "vae", provenance, onnx=False)


def test_model_card_escapes_received_names(metrics):
    """Of the run, its data, its weights and rows: one line each, without HTML, links or cells of
    their own.
    """
    name = "<script>a</script>\n# [x](https://example.org) | \x1b[2J"
    changed = json.loads(metrics.read_text())
    changed["results"][0]["target"] = changed["protocol"]["name"] = name
    metrics.write_text(json.dumps(changed))
    data = {"target": name, "params": {"root": name.replace("/", "")}}
    card = card_of(
        tiny_litevae(), Provenance(name, {"data": data, "run": {"weights": name}}, metrics)
    )
    assert card.count("script") > 4
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[x|^# \[|\x1b", card, re.MULTILINE)


@pytest.mark.parametrize("layout", ["litevae", "diffusers"])
def test_model_card_is_tidy_text(metrics, layout):
    """One empty line at most, none with spaces alone, and a line's end at the end."""
    model = tiny_litevae() if layout == "litevae" else ours(autoencoder_kl((32, 32)))
    for provenance in (Provenance("a"), Provenance("a_run", tiny_config(), metrics, False, "mit")):
        card = card_of(model, provenance, layout)
        assert card.endswith("\n")
        assert not card.endswith("\n\n")
        assert "\n\n\n" not in card
        assert not re.search(r"^\s+$|^ +(?=[#|])", card, re.MULTILINE)


def test_model_card_says_data_numbers_and_licence(metrics, tmp_path):
    config = {
        **tiny_config(),
        "data": {
            "target": "olvae.data.picture_folder.FolderSource",
            "params": {"root": "/home/me/cats", "size": [64, 96]},
        },
        "run": {"weights": "/home/me/runs/2026_a_32/checkpoints/last.ckpt"},
    }
    export(
        tiny_litevae(),
        tmp_path / "vae",
        None,
        None,
        Provenance("a_run", config, metrics, False, "mit", "measured"),
    )
    card = (tmp_path / "vae" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "license: mit\n",
        "# vae\n",
        "(3, H, W) to (4, H/8, W/8)",
        "| scaling factor, shift factor | 0.9, -0.1 (measured)",
        "| | images | PSNR, dB | SSIM |",
        "| a_run | 22 | 24.631 | 0.700 |",
        "| bicubic | 22 | - | 0.612 |",
        "`open-litevae`, version 1, ab12",
        "Half precision: not measured: `olvae evaluate` compares fp16, bf16 and 32.",
        "`olvae.data.picture_folder.FolderSource`, cats, crops of 64x96, up to 4 steps, "
        "from the weights of 2026_a_32.",
        "Weights: mit.",
        "LiteVAE.from_pretrained(",
    ):
        assert text in card
    assert "/home/me" not in card
    stopped = Provenance("a_run", config, steps=1)
    assert "crops of 64x96, 1 step, " in card_of(tiny_litevae(), stopped)
    file = {**config, "run": {"weights": "/home/me/checkpoint/vae.safetensors"}}
    assert "from the weights of vae.safetensors." in card_of(tiny_litevae(), Provenance("a", file))
    assert (tmp_path / "vae" / "metrics.json").read_bytes() == metrics.read_bytes()

    export(tiny_litevae().fold(), tmp_path / "bare", None, None, Provenance("x", raw=True))
    card = (tmp_path / "bare" / "README.md").read_text()
    for text in (
        "license: unknown",
        "Not measured",
        "not measured: `olvae latents`",
        "Unknown.",
        "Not stated;",
        "float32, as trained, self-modulated convolutions folded",
    ):
        assert text in card
    assert not (tmp_path / "bare" / "metrics.json").exists()


def measured(target: str, dtype: str, largest: float, safe: bool) -> dict:
    where = {
        "largest": {},
        "largest_name": "decoder.conv_in",
        "largest_value": largest,
        "limit": 65504.0,
    }
    non_finite = {"images": 0, "values": 0, "first": None}
    precision = {
        "dtype": dtype,
        **where,
        "non_finite": non_finite,
        "psnr_lost": 0.0 if safe else 0.25,
        "safe": safe,
    }
    return {"target": target, "n": 22, "metrics": {"psnr": 20.0}, "precision": precision}


def test_the_card_says_which_precisions_are_safe(metrics):
    content = json.loads(metrics.read_text())
    rows = [measured("a_run", "32", 812.0, True), measured("a_run, fp16", "fp16", 812.0, False)]
    content["results"] = [*rows, measured("other", "32", 9.0, True)]
    metrics.write_text(json.dumps(content))
    card = card_of(tiny_litevae(), Provenance("a_run", metrics=metrics))
    lines = card.partition("Half precision:\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["- a_run", "- a_run, fp16"]
    assert lines[1].endswith("largest activation 812 at decoder.conv_in; PSNR -0.250 dB: not safe")


def test_the_card_of_stock_networks():
    card = card_of(
        ours(autoencoder_kl((32, 32), **PER_CHANNEL)),
        Provenance("sd", factors_from="from sd"),
        "diffusers",
    )
    for text in (
        "tags: [autoencoder, vae]\n",
        "An autoencoder with the networks of diffusers' AutoencoderKL, f2 with 4 channels, "
        "made with open-LiteVAE.",
        "| scaling factor | 1 (from sd); "
        "a diffusion model takes (z - latents_mean) * scaling / latents_std |",
        "| latents_mean | 0.1, -0.2, 0.3, 0 |",
        "| latents_std | 1.5, 0.5, 2, 1 |",
        "AutoencoderKL.from_pretrained(",
    ):
        assert text in card
    assert "padding" not in card
    assert "shift factor" not in card
    assert "2x2" not in card


def test_the_card_of_a_student_of_flux2():
    """A LiteVAE, whose factors only pipelines of AutoencoderKL take;
    one for each position of 2x2.
    """
    model = tiny_litevae().set_for_diffusion(
        {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    )
    card = card_of(model, Provenance("a_run"))
    for row in (
        "| latents_mean, for 2x2 positions of each channel, row by row: pack them first "
        "| 0.5, 0.5, ",
        "| note | latents_mean, latents_std: "
        "pipelines of FLUX.2, Qwen-Image and Wan take them from ",
    ):
        assert row in card
    assert "| note |" not in card_of(tiny_litevae(), Provenance("a_run"))


def test_the_card_names_the_teacher():
    for teacher, name in {
        "diffusers:stabilityai/sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
        "diffusers:/home/me/sd-vae": "sd-vae",
        "/home/me/vae.safetensors": "vae.safetensors",
    }.items():
        config = {"model": {"params": {"parts": {"teacher": {"params": {"autoencoder": teacher}}}}}}
        card = card_of(tiny_litevae(), Provenance("a_run", config))
        assert f"| latents | distilled from {name}: " in card
        assert "AutoencoderLiteVAE.from_pretrained(" in card


@pytest.mark.parametrize(
    ("weights", "teacher", "expected"),
    [
        ("diffusers:stabilityai/sdxl-vae", None, "[stabilityai/sdxl-vae]"),
        ("RGenDiff/olitevaeB_im_f8c12", "diffusers:a/b::vae", "[RGenDiff/olitevaeB_im_f8c12, a/b]"),
        ("olvae:photos-f8c12", "diffusers:/home/me/vae", ""),
        (None, None, ""),
        ("diffusers:a/b]\nlicense: mit #", "diffusers:<b>a</b>/c", ""),  # received, to harm
        ("exports/gone", "diffusers:models/gone::vae", ""),  # folders when the run started
    ],
)
def test_the_card_names_the_models_that_it_is_from(weights, teacher, expected, tmp_path):
    """For the hub, also across a run that started from another one."""
    part = {"teacher": {"params": {"autoencoder": teacher}}} if teacher else {}
    run = {
        "weights": weights,
        "paths": {"/a/exports/gone": "exports/gone", "/a/models/gone": "models/gone"},
    }
    config = {"model": {"params": {"parts": part}}, "run": run, "data": {}}
    first = Run(tmp_path / "2026_a_32")
    first.checkpoints.mkdir(parents=True)
    first.last_checkpoint.touch()
    save(config, first.config)
    for known in (
        config,
        *({"run": {"weights": str(start)}} for start in (first.path, first.last_checkpoint)),
    ):
        head = card_of(tiny_litevae(), Provenance("a", known)).partition("\n---\n")[0]
        assert head.partition("\nbase_model: ")[2] == (
            f"{expected}\nbase_model_relation: finetune" if expected else ""
        )
    first.config.write_text("model: {}")
    assert "base_model" not in card_of(tiny_litevae(), Provenance("b", known))


@pytest.mark.parametrize(
    ("protocol", "entry"),
    [
        ({}, {}),
        ({"protocol": {}}, {}),
        ({"protocol": {"name": "a", "version": 1}}, {"precision": {"dtype": "fp16"}}),
    ],
)
def test_model_card_refuses_metrics_json_of_something_else(tmp_path, protocol, entry):
    """A protocol without a name, or an entry that has nothing to show,
    is a metrics.json of something else.
    """
    row = {"target": "a", "n": 1, "metrics": {"psnr": 20.0}, "skipped": {}, **entry}
    (tmp_path / "metrics.json").write_text(
        json.dumps({"protocol_hash": "0", "results": [row], **protocol})
    )
    with pytest.raises(ValueError, match=r"metrics\.json: .*KeyError"):
        card_of(tiny_litevae(), Provenance("a", metrics=tmp_path / "metrics.json"))


@pytest.mark.parametrize(
    ("averaged", "raw", "weights"),
    [
        (None, False, "float32"),
        (None, True, "float32, as trained"),
        (True, False, "float32, averaged over training (EMA)"),
        (True, True, "float32, as trained"),
        (False, False, "float32, as trained"),
    ],
)
def test_weights_are_averaged_or_as_trained(averaged, raw, weights):
    config = {} if averaged is None else {"model": {"params": {"use_ema": averaged}}}
    card = card_of(tiny_litevae(), Provenance("a", config, raw=raw))
    assert f"\n| weights | {weights} |\n" in card


def test_a_card_is_read_again(tmp_path):
    """Its licence, its data and its terms, of ours alone."""
    model = tiny_litevae()
    known = card_of(model, Provenance("a", licence="mit", data="Cats.\n\nAnd dogs."))
    assert read_card(known) == ("mit", "Cats.\n\nAnd dogs.", "Weights: mit.")
    terms = card_of(model, Provenance("a", data="Cats.", terms="Weights, as those of b: free."))
    assert read_card(terms) == (None, "Cats.", "Weights, as those of b: free.")
    assert read_card(card_of(model, Provenance("a"))) == (None, "Unknown.", None)
    assert read_card("") == (None, None, None)
    assert own_card(tmp_path) == ""
    (tmp_path / "README.md").write_text(known)
    assert own_card(tmp_path) == known
    (tmp_path / "README.md").write_text("# Somebody's")
    assert own_card(tmp_path) == ""
