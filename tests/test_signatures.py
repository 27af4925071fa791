import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olvae import signatures
from olvae.config import ConfigError, load
from olvae.models.spec import AutoencoderSpec
from olvae.signatures import arguments_in_source

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def nothing_imported(monkeypatch):
    """The modules of followed packages look as if they had not been imported."""
    monkeypatch.setattr(signatures, "_imported", lambda module: module.partition(".")[0] not in signatures.FOLLOWED)


def targets(node):
    if isinstance(node, dict):
        if isinstance(node.get("target"), str):
            yield node["target"]
        for part in node.values():
            yield from targets(part)


def words(hint):
    """Sorted, as typing has one order for all equal unions: that of the first."""
    return sorted(re.findall(r"[\w.']+", str(hint)))


@pytest.mark.usefixtures("nothing_imported")
def test_the_source_says_what_an_import_says():
    """Names, kinds and defaults of arguments, and types but for the modules that classes of torch are said to be in."""
    named = {target for path in CONFIGS for target in targets(load([path]))} | {
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.Callback",
        "olvae.data.mapped.picture_folder.FolderSource",
        "olvae.data.mapped.hub.HuggingFaceSource",
        "olvae.data.mapped.hub.TorchvisionSource",
        "olvae.data.shards.latent_source.LatentSource",
        "olvae.models.optimization.lr_factor",
        "olvae.models.parts.teacher.Teacher",
        "olvae.training.saving.KeepCheckpoints",
    }
    for target in sorted(target for target in named if target.startswith(signatures.FOLLOWED)):
        module, _, name = target.rpartition(".")
        found = arguments_in_source(module, name)
        assert found is not None, target
        factory = getattr(importlib.import_module(module), name)
        expected = inspect.signature(factory).parameters
        assert list(found.parameters) == list(expected), target
        for argument, theirs in expected.items():
            ours = found.parameters[argument]
            assert (ours.kind, ours.default is ours.empty) == (theirs.kind, theirs.default is theirs.empty), argument
        function = inspect.unwrap(factory.__init__ if inspect.isclass(factory) else factory)
        hints = inspect.get_annotations(function, eval_str=True)
        for argument, hint in found.hints.items():
            assert words(hint) == words(hints[argument]), (target, argument)


@pytest.mark.usefixtures("nothing_imported")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("olvae.no_such_module", "Name"),
        ("olvae.modules.wavelet", "no_such_name"),
        ("olvae.config.files", "TOP_LEVEL"),
        ("olvae.evaluation.runner", "Request"),
        ("torch.nn", "Identity"),
    ],
)
def test_what_only_an_import_can_tell(module, name):
    assert arguments_in_source(module, name) is None


def test_validating_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from olvae.cli.main import main\n"
        "try: main(['validate', 'configs/phase_a.yaml', 'configs/imagenet/B5.yaml'])\n"
        "finally: print(sorted({'torch', 'lightning', 'torchvision', 'torchmetrics', 'diffusers', 'scipy', "
        "'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr.count("no mistakes") == 2


def test_a_path_is_no_target(tmp_path):
    """A received config must not have a file beside it read, whose annotations would be evaluated."""
    (tmp_path / "evil.py").write_text("def Name(x: open('evaluated', 'w')): ...")
    target = f"olvae.{tmp_path}/evil"
    assert arguments_in_source(target, "Name") is None
    spec = {"target": f"{target}.Name", "params": {}}
    content = {"model": {"params": {"encoder_config": spec, "decoder_config": spec, "embed_dim": 4}}}
    with pytest.raises(ConfigError, match="not a dotted path"):
        AutoencoderSpec.from_content(content, "received", only_ours=True)
    assert not Path("evaluated").exists()
