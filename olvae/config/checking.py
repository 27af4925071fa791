"""Find every mistake of a config at once, before anything is built: keys, types and targets, in nodes at any depth."""

import inspect
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from olvae.config.nodes import NODE, Arguments, arguments_of, holds_nodes, imported_arguments, map_nodes
from olvae.config.reading import TOP_LEVEL, ConfigError, nearest

LIGHTNING = ("trainer", "callbacks", "logger")
NODE_KEYS = ("target", "params")
MODEL_KEYS = ("base_learning_rate", "from", *NODE_KEYS)
FROM_START = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")
"""Arguments of the model that are taken from the autoencoder of ``model.from``."""
SET_BY_TRAINER = {
    "learning_rate": "model.base_learning_rate",
    "accumulate_grad_batches": "lightning.trainer.accumulate_grad_batches",
    "gradient_clip_val": "lightning.trainer.gradient_clip_val",
}
"""Arguments of the model, and the setting from which the trainer fills them in."""

TRAINER = "lightning.pytorch.Trainer"
SET_BY_TRAINING = {
    "callbacks": "lightning.callbacks",
    "logger": "lightning.logger",
    "default_root_dir": "the option logdir of olvae train",
    "use_distributed_sampler": "the data source",
    "enable_checkpointing": "lightning.callbacks (KeepCheckpoints)",
    "limit_train_batches": "lightning.trainer.max_steps",
    "fast_dev_run": "lightning.trainer.max_steps",
}
"""Arguments of Lightning's Trainer that this package sets, and the setting to use instead."""


def validate(config: Mapping[str, Any]) -> list[str]:
    """List every mistake of a config, one line each, without building anything.

    Finds unknown and missing keys, wrong types and targets that do not import, in nodes at any depth, and suggests the
    nearest right name; the Trainer's keys are checked against Lightning's signature.
    """
    mistakes = list(unknown_keys(config, TOP_LEVEL))
    if "model" not in config:
        mistakes.append("model: missing")
    else:
        mistakes += _check_model(config["model"])
    if "data" in config:
        mistakes += _check_node(config["data"], "data")
    if config.get("lightning") is not None:
        mistakes += _check_lightning(config["lightning"])
    return mistakes


def check(config: Mapping[str, Any]) -> None:
    """Check a config to train with.

    Raises:
        ConfigError: it has mistakes, or no data.
    """
    mistakes = validate(config)
    if "data" not in config:
        mistakes.append("data: missing: the source of the training images")
    if mistakes:
        raise ConfigError(*mistakes)


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yield a line for each key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            yield f"{prefix}{key}: unknown key" + (nearest(str(key), known) or f"; known: {', '.join(known)}")


def check_arguments(factory: Any, params: Any, where: str = "", filled_in: Container[str] = ()) -> Iterator[str]:
    """Yield a line for each mistake in the arguments of a class or function, and of the nodes among them.

    Args:
        where: the place of the arguments in the config, as in ``data.params``.
        filled_in: names of arguments that may be missing.
    """
    yield from _check_arguments(imported_arguments(factory), params, where, filled_in)


def _check_lightning(section: Any) -> Iterator[str]:
    if not isinstance(section, Mapping):
        yield f"lightning: expected a mapping of {', '.join(LIGHTNING)}, got {section!r}"
        return
    yield from unknown_keys(section, LIGHTNING, "lightning.")
    trainer = section.get("trainer")
    if trainer is not None:
        yield from _check_arguments(arguments_of(TRAINER), trainer, "lightning.trainer")
        for key in SET_BY_TRAINING.keys() & trainer if isinstance(trainer, Mapping) else ():
            yield f"lightning.trainer.{key}: is set by {SET_BY_TRAINING[key]}; leave it out"
    for key, filled_in in (("callbacks", ()), ("logger", ("save_dir",))):  # a logger gets the run's folder
        nodes = section.get(key)
        if isinstance(nodes, Mapping):
            for name, node in nodes.items():
                yield from _check_node(node, f"lightning.{key}.{name}", filled_in)
        elif nodes is not None:
            yield f"lightning.{key}: expected a mapping of names to nodes, got {nodes!r}"


def _check_model(node: Any) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"model: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, MODEL_KEYS, "model.")
    rate = node.get("base_learning_rate", 1e-4)
    if not isinstance(rate, float | int) or isinstance(rate, bool) or not 0 < rate < math.inf:
        yield f"model.base_learning_rate: expected a positive number, got {rate!r}"
    params = node.get("params") or {}
    filled_in: tuple[str, ...] = ("learning_rate",)  # by the trainer
    if isinstance(params, Mapping):
        for key in SET_BY_TRAINER.keys() & params:
            yield f"model.params.{key}: set {SET_BY_TRAINER[key]} instead"
        if node.get("from") is not None:
            filled_in += FROM_START
            params = {key: value for key, value in params.items() if key not in FROM_START}
            if not isinstance(node["from"], str):
                yield f"model.from: expected an autoencoder to start from, got {node['from']!r}"
    yield from _check_node(
        {**{key: node[key] for key in node if key == "target"}, "params": params}, "model", filled_in
    )


def _check_node(node: Any, where: str, filled_in: Container[str] = ()) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"{where}: expected {NODE}, got {node!r}"
        return
    yield from unknown_keys(node, NODE_KEYS, f"{where}.")
    if not isinstance(node.get("target"), str):
        yield (f"{where}.target: missing" if "target" not in node else f"{where}.target: expected a dotted path")
        return
    try:
        arguments = arguments_of(node["target"])
    except ConfigError as error:
        yield f"{where}.target: {error}"
        return
    yield from _check_arguments(arguments, node.get("params") or {}, f"{where}.params", filled_in)


def _check_arguments(
    arguments: Arguments | None, params: Any, where: str, filled_in: Container[str] = ()
) -> Iterator[str]:
    if not isinstance(params, Mapping):
        yield f"{where}: expected a mapping of arguments, got {params!r}"
        return
    if arguments is None:
        return
    prefix = f"{where}." if where else ""
    parameters = arguments.parameters
    open_ended = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in parameters.values())
    named = {n: a for n, a in parameters.items() if a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)}
    if not open_ended:
        yield from unknown_keys(params, tuple(named), prefix)
    for name, argument in named.items():
        if argument.default is argument.empty and name not in params and name not in filled_in:
            yield f"{prefix}{name}: missing"
    for name, value in params.items():
        yield from _check_value(value, arguments.hints.get(name), f"{prefix}{name}")


def _check_value(value: Any, hint: Any, where: str) -> Iterator[str]:
    if holds_nodes(hint):
        mistakes: list[str] = []
        map_nodes(value, hint, lambda node, place: mistakes.extend(_check_node(node, f"{where}{place}")))
        yield from mistakes
    elif hint is not None:
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            yield f"{where}: expected {_readable(hint)}, got {value!r}"


def _readable(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if inspect.isclass(hint) else None
    return text or str(hint).replace("typing.", "").replace("collections.abc.", "")
