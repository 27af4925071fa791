"""Each private name of torch, Lightning and diffusers that we use is in the installed version."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from olvae import library_internals as internals

PACKAGE = Path(internals.__file__).parent
ROOM = Path(internals.__file__)

STANDARD = {"_asdict", "_replace", "_fields", "_exit", "_compat_pickle"}
"""Names of the standard library: public in spite of the underscore, or as old as pickle."""

WAN = "diffusers.models.autoencoders.autoencoder_kl_wan"

PLACES = {
    # private name: the object of the installed version that has to have it
    "_foreach_copy_": "torch",
    "_foreach_add_": "torch",
    "_foreach_sub": "torch",
    "_foreach_mul_": "torch",
    "_foreach_norm": "torch",
    "_foreach_clamp_min": "torch",
    "_C": "torch",
    "_is_tracing": "torch._C",
    "_are_functorch_transforms_active": "torch._C",
    "_functorch": "torch",
    "_conv_forward": "torch.nn:Conv2d",
    "_apply": "torch.nn:Module",
    "_compiled_call_impl": "torch.nn:Module",
    "_parameters": "torch.nn:Identity()",
    "_forward_hooks": "torch.nn:Identity()",
    "_forward_pre_hooks": "torch.nn:Identity()",
    "_found_inf_per_device": "torch.amp:GradScaler",
    "_get_scale_async": "torch.amp:GradScaler",
    "_get_default_store": "torch.distributed.distributed_c10d",
    "_shutdown_workers": "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter",
    "_record_memory_history": "torch.cuda.memory",
    "_dump_snapshot": "torch.cuda.memory",
    "_batches_that_stepped": "lightning.pytorch:Trainer(logger=False).fit_loop.epoch_loop",
    "_results": "lightning.pytorch:Trainer(logger=False).fit_loop.epoch_loop",
    "_broadcast_sigterm_tensor": "lightning.pytorch:Trainer(logger=False).fit_loop.epoch_loop",
    "_launch_process_observer": "lightning.pytorch.strategies.launchers.subprocess_script",
    "_setup_model": "lightning.pytorch.strategies:DDPStrategy",
    "_ddp_comm_hook": "lightning.pytorch.strategies:DDPStrategy()",
    "_ddp_comm_state": "lightning.pytorch.strategies:DDPStrategy()",
    "_supports_gradient_checkpointing": "diffusers:AutoencoderKL",
    "_padding": f"{WAN}:WanCausalConv3d(1, 1, 3, padding=1)",
}

MENTIONED = {
    # private name that we set: the library's module whose source has to read it
    "_gradient_checkpointing_func": "diffusers.models.autoencoders.vae",
    "_dynamo_marked_constant": "torch._dynamo.variables.functions",
    "_diffusers_hook": "diffusers.hooks.hooks",
}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every node of a file, parsed once."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def private_attributes(path: Path) -> Iterator[tuple[int, str]]:
    """Attributes with one leading underscore, but those that a method passes on to ``super()``."""
    for node in nodes_of(path):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            owner = ast.unparse(node.value)
            if owner != "super()" and node.attr not in STANDARD:
                yield node.lineno, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
        ):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and re.match(r"_[^_]", name) and name not in STANDARD:
                yield node.lineno, name


def resolve(place: str) -> Any:
    """The object at ``module:expression``."""
    module, _, expression = place.partition(":")
    found = importlib.import_module(module)
    return eval(f"module.{expression}", {"module": found}) if expression else found


@pytest.mark.parametrize("name", PLACES)
def test_the_installed_version_has(name):
    assert hasattr(resolve(PLACES[name]), name), f"{PLACES[name]} has no {name} any more"


@pytest.mark.parametrize("name", MENTIONED)
def test_the_installed_version_reads(name):
    source = Path(importlib.import_module(MENTIONED[name]).__file__).read_text(encoding="utf-8")
    assert name in source, f"{MENTIONED[name]} does not read {name} any more"


def test_each_private_name_is_listed_here():
    used = {name for _, name in private_attributes(ROOM)}
    assert used == PLACES.keys() | MENTIONED.keys()


@pytest.mark.parametrize("name", ["torch", "lightning", "diffusers"])
def test_the_versions_end_where_they_are_tried(name):
    """A later release may lack a private name: pip must not bring it to a user first."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["train"]
    declared = [Requirement(line) for line in lines]
    (specifier,) = (it.specifier for it in declared if it.name == name)
    installed = Version(version(name))
    assert specifier.contains(installed), "if the suite passes with it, raise the bound"
    assert not specifier.contains(f"{installed.major}.{installed.minor + 20}")
    if name == "lightning":  # GHSA-w37p-236h-pfx3
        assert specifier.contains("2.6.1")
        assert not specifier.contains("2.6.2")
        assert not specifier.contains("2.6.3")
        assert specifier.contains("2.6.4")


def test_no_other_file_uses_a_library_s_private_name():
    ours = set()
    for path in PACKAGE.rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if path != ROOM and ast.unparse(node.value) in ("self", "cls"):
                    ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == ROOM:
            continue
        name = path.relative_to(PACKAGE)
        found += [
            f"{name}:{line} {attr}" for line, attr in private_attributes(path) if attr not in ours
        ]
        for node in nodes_of(path):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and not node.module.startswith("olvae")
            ):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(re.match(r"_[^_]", part) and part not in STANDARD for part in parts):
                    found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_many_tensors_are_changed_as_one_by_one():
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])]
    others = [torch.tensor([1.0, 1.0]), torch.tensor([2.0])]
    assert [n.item() for n in internals.norms_of_each(tensors, 1.0)] == [5.0, 1.0]
    differences = internals.subtract_each(tensors, others)
    internals.scale_each(differences, 2.0)
    assert [d.tolist() for d in differences] == [[4.0, 6.0], [-4.0]]
    internals.add_each(tensors, others)
    assert [t.tolist() for t in tensors] == [[4.0, 5.0], [2.0]]
    internals.copy_each(tensors, others)
    assert [t.tolist() for t in tensors] == [[1.0, 1.0], [2.0]]


def test_a_spectral_norm_has_its_singular_vectors():
    norm = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 3)).parametrizations
    left, right = (getattr(norm.weight[0], name) for name in internals.SPECTRAL_VECTORS)
    assert left.shape == (3,)
    assert right.shape == (2,)


def test_clipping_asks_for_launches_over_many_tensors():
    module, _, name = internals.HAS_FOREACH.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
