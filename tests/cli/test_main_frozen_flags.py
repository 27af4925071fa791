"""Every flag of every command, written out: a new capability comes by config, not by a flag."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from olvae.cli.main import app

# By command, all spellings of its flags; --help is a flag of each, and --debug of the program.
# --hold-out-by is data.params.hold_out_by for commands that read images without a config's keys:
# a patient on both sides of packed or encoded data can't be mended later.
FLAGS = {
    "olvae": "--version",
    "olvae train": "--base -b --data --logdir --precision --gpus --seed --name --resume "
    "--allow-changes --actual_resume --actual-resume --from --teacher --time-limit --wandb "
    "--profile",
    "olvae bench": "--size --batch-size -B --config --workers --rounds --compile --device --json",
    "olvae evaluate": "--zoo --config --config_base --config-base --batch-size -B --metrics "
    "--protocol --data --size --images --posterior --seed --raw --allow-mismatch --weights-dir "
    "--weights_dir --baselines --fit --cross --precision --observe --beside --mix-protocols "
    "--device --out --report --no-report --json",
    "olvae reconstruct": "--out --config --raw --allow-mismatch --device --precision --memory "
    "--sample --seed",
    "olvae app": "--device --host --port",
    "olvae latents": "--config --raw --allow-mismatch --data --batch-size -B --images --device "
    "--ifid --weights-dir --weights_dir --out --json",
    "olvae encode": "--data --out --config --size --native --moments --sample --seed --dtype "
    "--flip --images --classes --shard-size --hold-out-by --batch-size -B --threads --memory "
    "--precision --compile --device --gpus --shards --raw --allow-mismatch --json",
    "olvae decode": "--out --config --format --batch-size -B --memory --device --raw "
    "--allow-mismatch",
    "olvae export": "--out --format --config --config_base --config-base --raw --allow-mismatch "
    "--dtype --fold --scaling-factor --shift-factor --latents --per-channel --onnx --license "
    "--force",
    "olvae validate": "--memory --ranks --precision",
    "olvae tables": "--json",
    "olvae data": "",
    "olvae data pack": "--out --shard-size --seed --shuffle --no-shuffle --resize --format "
    "--quality --channels --hold-out-by --max-unreadable --workers",
    "olvae data index": "--out --image-key --workers",
    "olvae data check": "--size --channels --range --hold-out-by --max-unreadable --workers --json",
    "olvae data range": "--images",
    "olvae recipes": "",
    "olvae recipes copy": "",
}


def every_command(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a command and the commands in it, with their full names."""
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{name} {part}")


def flags_of(command: Any) -> set[str]:
    """Collect all spellings of a command's flags."""
    options = [one for one in command.params if one.param_type_name == "option"]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


COMMANDS = dict(every_command(get_command(app), "olvae"))


def test_commands_are_frozen():
    assert list(COMMANDS) == list(FLAGS), "the commands are frozen: extend what a config can say"


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_frozen(name):
    frozen = set(FLAGS[name].split())
    found = flags_of(COMMANDS[name])
    added = ", ".join(sorted(found - frozen))
    lost = ", ".join(sorted(frozen - found))
    assert not added, (
        f"{name}: new flags: {added}. The command line is frozen: a new capability is a key of the "
        "config (KEY=VALUE), with a default, not a flag."
    )
    assert not lost, f"{name}: flags are gone: {lost}. Users' scripts need them: put them back."
