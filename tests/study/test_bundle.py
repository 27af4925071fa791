"""What goes into the bundle of the GPU study, and its installation without a network."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from study import bundle


def write_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> None:
    """A wheel with one module."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


@pytest.mark.slow
def test_what_is_missing_is_installed_and_what_does_not_fit_is_named(tmp_path, capfd):
    write_wheel(tmp_path, "olvae_missing")
    write_wheel(tmp_path, "olvae_for_another", "cp39-cp39-win32")
    write_wheel(tmp_path, "numpy")  # which is there, in another version
    site = tmp_path / "site"
    bundle.install(tmp_path, site)
    assert [path.stem for path in site.glob("*.py")] == ["olvae_missing"]
    assert "left out" in capfd.readouterr().err
    # Nothing is missing: nothing is done.
    (tmp_path / "olvae_for_another-1.0-cp39-cp39-win32.whl").unlink()
    before = (site / "olvae_missing.py").stat().st_mtime_ns
    bundle.install(tmp_path, site)
    assert (site / "olvae_missing.py").stat().st_mtime_ns == before


def test_a_bundle_has_the_checkout_and_wheels_without_pytorch(tmp_path, monkeypatch):
    asked = []

    def pip(*arguments: str) -> None:
        asked.append(arguments)
        report = [word for word in arguments if word.startswith("--report=")]
        left_out = ("torch", "nvidia-cublas", "cuda_toolkit", "triton", "NumPy", "open-litevae")
        names = (*left_out, "torchmetrics")
        if report:
            packages = [{"metadata": {"name": name, "version": "1.0"}} for name in names]
            Path(report[0].partition("=")[2]).write_text(json.dumps({"install": packages}))
        (tmp_path / "wheels").mkdir(exist_ok=True)

    monkeypatch.setattr(bundle, "pip", pip)
    bundle.make(tmp_path, "3.12", ["numpy"])
    assert asked[-1][-2:] == ("--platform=manylinux_2_17_x86_64", "torchmetrics==1.0")
    assert "--python-version=3.12" in asked[-1]
    assert (tmp_path / "study" / "gpu.sh").is_file()
    assert (tmp_path / "configs").is_symlink()
    assert not (tmp_path / "runs").exists()


def test_the_command_line_of_the_bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bundle", str(tmp_path / "site"), "--install", str(tmp_path)])
    bundle.main()
    assert not (tmp_path / "site").exists()
    monkeypatch.setattr(sys, "argv", ["bundle"])
    with pytest.raises(SystemExit):
        bundle.main()
