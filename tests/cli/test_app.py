"""``olvae app`` as a user types it; tests/app has the page in a browser."""

import importlib.util


def test_without_gradio(olvae, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, _, err = olvae("app", "olvae:photos-f8c4")
    assert code == 2
    assert "olvae app needs Gradio: pip install 'open-litevae[app]'" in err
