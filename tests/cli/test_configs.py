"""``olvae validate`` as a user types it."""

from types import SimpleNamespace

from olvae.models.footprint import Footprint
from tests.conftest import skip_power_iterations


def test_validate_lists_the_mistakes_of_each_config(olvae, config, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: {}\n")
    code, out, err = olvae("validate", bad, config, tmp_path / "missing.yaml")
    assert (code, out) == (1, "")
    assert f"{bad}: modle: " in err
    assert f"{bad}: model: missing" in err
    assert "missing.yaml: " in err
    assert f"{config}: no mistakes" in err


def test_validate_takes_settings(olvae, config):
    code, _, err = olvae("validate", config, "data.params.size=sixteen", "data.params.rot=photos")
    assert code == 1
    assert err.count(f"{config}: data.params.") == 2
    assert "a=1: " in olvae("validate", "a=1")[2]


def test_validate_names_an_autoencoder_that_is_not_there(olvae, tmp_path, monkeypatch):
    """As of an installed package: the teacher of this recipe is in the repository alone."""
    assert olvae("validate", "distil/demo")[0] == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = olvae("validate", "distil/demo", "demo", "distil/encoder")
    assert code == 1
    place = "model.params.parts.teacher.params.autoencoder"
    folder = "diffusers:olvae/recipes/distil/teacher: no such folder"
    assert f"distil/demo: {place}: {folder}" in err
    assert "a clone" in err
    assert err.count(": no mistakes") == 2
    code, _, err = olvae("validate", "demo", "model.from=elsewhere.safetensors")
    assert code == 1
    assert "demo: model.from: elsewhere.safetensors: " in err


def test_validate_memory_has_a_row_for_each_precision_and_checkpointing(
    olvae, config, tmp_path, monkeypatch
):
    """A line for each precision, without and with checkpointing.

    tests/models/test_footprint.py has the numbers.
    """
    asked = []
    need = Footprint(fixed=2**30, per_image=2**28, flop=3 * 10**12)
    monkeypatch.setattr(
        "olvae.models.footprint.footprint", lambda model, *case: asked.append(case) or need
    )
    code, out, err = olvae("validate", "--memory", config)
    assert code == 0
    assert "no mistakes" in err
    assert "at 16x16 pixels" in " ".join(out.split())
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("32", "bf16"))]
    cases = [
        [f"{p},", f"model.params.checkpoint={c}"] for p in ("32", "bf16") for c in ("false", "true")
    ]
    assert rows == [[*case, "1.00", "0.250", "2.3", "3"] for case in cases]
    assert "total: " in out
    assert asked == [((16, 16), p, c) for p in ("32", "bf16") for c in (False, True)]
    (tmp_path / "bad.yaml").write_text(
        "model: {target: olvae.models.liteautoencoder.LiteAutoencoderKL}\n"
    )
    assert olvae("validate", "--memory", tmp_path / "bad.yaml")[:2] == (1, "")


def test_validate_memory_without_the_autoencoder_has_one_outcome(olvae, config, monkeypatch):
    """The config alone has no mistake; its numbers need the hub."""
    skip_power_iterations(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    need = Footprint(fixed=2**30, per_image=2**28, flop=10**12)
    monkeypatch.setattr("olvae.models.footprint.footprint", lambda *_: need)
    recipe = "distil/tiny_flux2"
    code, out, err = olvae("validate", "--memory", recipe, config)
    assert code == 1
    needed = "its numbers need an autoencoder: black-forest-labs/FLUX.2-klein-4B: no such file"
    assert f"{recipe}: {needed}" in err
    assert "--memory and --ranks" in err
    assert f"{recipe}: no mistakes" not in err
    # The next config is looked at all the same.
    assert f"{config}: no mistakes" in err
    assert "GiB of" in out


def test_validate_ranks_has_messages_and_bytes_in_80_columns(olvae, config, monkeypatch):
    """In 80 columns; tests/training/test_dry_run.py has the numbers."""
    found = (
        {"both, logged": SimpleNamespace(messages=["a", "b"], nbytes=4_405_128, launches=2889)},
        ["word " * 30],
    )
    monkeypatch.setattr(
        "olvae.training.dry_run.dry_run", lambda _, *asked: found if asked == (64, "bf16") else None
    )
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = olvae("validate", "--ranks", 64, "--precision", "bf16", config)
    assert (code, err) == (0, f"{config}: no mistakes\n")
    assert "both, logged 2 4.41 2889" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
