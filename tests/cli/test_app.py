"""``olvae app`` as a user types it; tests/app has the page in a browser."""

import importlib.metadata
import importlib.util


def test_a_space(olvae, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "6.1")
    code, _, err = olvae("app", "olvae:photos-f8c4", "--space", tmp_path / "space")
    assert (code, (tmp_path / "space" / "app.py").is_file()) == (0, True), err
    for arguments, said in (
        (["olvae:nope"], "no model of this name in the package"),
        (["/no/such"], "/no/such: not found"),
        (["olvae:photos-f8c4", "--port", 0], "--space serves nothing: leave out --device, --host and --port"),
    ):
        code, _, err = olvae("app", *arguments, "--space", tmp_path / "other")
        assert code in (1, 2)
        assert said in err
    assert not (tmp_path / "other").exists()


def test_without_gradio(olvae, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, _, err = olvae("app", "olvae:photos-f8c4")
    assert code == 2
    assert "olvae app needs Gradio: pip install 'open-litevae[app]'" in err
