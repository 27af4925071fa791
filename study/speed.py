"""How long a training step of each network takes, in turns, one thread.

The study's rows of equal time follow it.

python -m study.speed --out speed.json
"""

import argparse
from functools import partial
from pathlib import Path

from olvae.bench.cases import time_steps
from olvae.bench.measure import measure_case
from olvae.data.places import load
from olvae.files import write_json
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.run import quieten
from study.rows import NETWORKS, RECIPE

STEPS, ROUNDS = 5, 7


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(arguments)
    quieten()
    work = {}
    for name in ("litevae", "sd"):
        config = load([RECIPE], list(NETWORKS[name]))
        data = config["data"]["params"]
        model = LiteAutoencoderKL(**config["model"]["params"])
        work[name] = partial(time_steps, model, data["size"], data["batch_size"], STEPS, "cpu")
    times = measure_case(work, "cpu", ROUNDS, warm_up=False)
    write_json({name: measured.median for name, measured in times.items()}, options.out)


if __name__ == "__main__":
    main()
