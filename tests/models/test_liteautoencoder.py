"""The step of phase A; steps that the backward pass computes again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from olvae.config import instantiate
from olvae.models.updates.muon import Muon
from olvae.models.updates.optimizers import mix_seeds
from olvae.modules.base import last_convolution
from tests.models.steps import (
    against,
    assert_same,
    build,
    fit,
    metrics,
    snapshot,
    source,
)
from tests.recipes import recipe

ROOT = Path(__file__).parent.parent.parent


CONFIGS = sorted((ROOT / "olvae" / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_phase_a_step_is_the_objective_and_the_optimizer_by_hand(image_folder, name):
    """The first update, repeated without Lightning: same noise, same loss, same weights."""
    model = fit(build(optimizer=name), image_folder, 1)
    other = build()
    kind = {"adam": partial(torch.optim.Adam, fused=True), "muon": Muon}[name]
    optimizer = kind(other.autoencoder_parameters(), lr=1e-4, betas=(0.5, 0.9))
    batch = next(iter(source(image_folder).train_loader()))
    x = other.images(batch)
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = other(x, sample_posterior=True)
    total, _ = other.objective(x, reconstruction, posterior)
    total.backward()
    optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.fixture(scope="module")
def narrow_models() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The models of the configs without their discriminators, and these, narrow and shallow.

    By the first config of those that differ in nothing but their scale and number of blocks.
    """
    models: dict[str, tuple[str, dict[str, Any]]] = {}
    discriminators: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in CONFIGS:
        node = recipe(path)["model"]
        if "from" in node:
            continue
        name = path.relative_to(ROOT).as_posix()
        networks = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")
        params = {name: node["params"][name] for name in networks if name in node["params"]}
        params["lossconfig"] = {
            "target": "olvae.losses.objective.Objective",
            "params": {"lpips_weight": 0},
        }
        if "Tiny" in params["encoder_config"]["target"]:  # whose latents have no distribution
            params["lossconfig"]["params"]["kl_weight"] = 0
        parts = [params["decoder_config"]]
        if "SDEncoder" in params["encoder_config"]["target"]:
            parts.append(params["encoder_config"])
        elif "LiteVAE_Encoder" in params["encoder_config"]["target"]:
            given = params["encoder_config"]["params"]
            given |= {"extractor_resblocks": 1, "aggregate_resblocks": 1}
            if "scale" in given:
                given["scale"] = "S"
        for part in parts:
            part["params"]["channels"] = 8 if "LiteVAE" in part["target"] else 32
            if part["target"].endswith(("SDEncoder", "SDDecoder", "LiteVAE_Decoder")):
                blocks = part["params"].get("num_res_blocks", 2)
                part["params"]["num_res_blocks"] = min(1, blocks)
        models.setdefault(
            json.dumps(params, sort_keys=True), (name, {"target": node["target"], "params": params})
        )
        if "adversary_config" in node["params"]:
            found = node["params"]["adversary_config"]["params"]["discriminator_config"]
            if found["target"].endswith("DinoDiscriminator"):
                continue  # on a download; test_dino_discriminator.py has its gradients
            widths = {
                "UNetGAN": {"base_channels": 8},
                "GigaGAN": {"max_channels": 16, "heads": 2, "head_channels": 8},
            }
            narrow = widths.get(found["target"].rpartition(".")[2], {})
            found["params"] = {**found.get("params", {}), **narrow}
            discriminators.setdefault(json.dumps(found, sort_keys=True), (name, found))
    return dict(models.values()), dict(discriminators.values())


def assert_all_learn(config: str, module: torch.nn.Module) -> None:
    for name, p in module.named_parameters():
        assert p.grad is not None, (config, name)
        assert torch.isfinite(p.grad).all(), (config, name)
        assert p.grad.abs().max() > 0, (config, name)


def test_every_parameter_of_every_config_learns(narrow_models):
    """One step's gradient is finite and not zero everywhere, for every parameter.

    LPIPS and teachers are left out (downloads), nothing is frozen, and a config for inference gets
    the default objective.
    """
    models, _ = narrow_models
    assert len(models) >= 20
    for name, node in models.items():
        model = instantiate(node)
        for network in (model.encoder, model.decoder):
            # The network beside it starts with zeros, which no gradient passes.
            if network.linear is not None:
                torch.nn.init.normal_(last_convolution(network).weight, std=0.1)
        channels = model.encoder.in_channels
        x = torch.rand(1, channels, 32, 32) * 2 - 1
        total, _ = model.objective(x, *model(x, sample_posterior=True))
        total.backward()
        assert_all_learn(name, model)


def test_every_parameter_of_every_configs_discriminator_learns(narrow_models):
    """At the size that it is made for; squares, because hinge's slopes for real and fake cancel in
    the biases.
    """
    _, discriminators = narrow_models
    assert len(discriminators) >= 4
    for name, node in discriminators.items():
        discriminator = instantiate(node)
        params = node["params"]
        size = params.get("image_size", 64)
        logits = discriminator(torch.rand(2, params.get("in_channels", 3), size, size) * 2 - 1)
        torch.stack([(t + 0.1).square().mean() for t in logits]).sum().backward()
        assert_all_learn(name, discriminator)


def test_checkpointing_changes_nothing_but_memory(image_folder):
    """Weights after two steps with an adversary and averages, bit for bit;
    the average keeps its names.
    """
    plain, *others = (
        fit(
            build(against(weight=0.5, adaptive_weight=True), checkpoint=value, use_ema=True),
            image_folder,
            2,
        )
        for value in (False, True, "decoder")
    )
    for checkpoint, again in zip((True, "decoder"), others, strict=True):
        assert_same(snapshot(plain), snapshot(again))
        assert metrics(plain) == metrics(again)
        assert [again.encoder.checkpoint, again.decoder.checkpoint] == [
            checkpoint in (True, h) for h in ("encoder", "decoder")
        ]
        assert list(again.state_dict()) == list(plain.state_dict())
