"""Cut random crops out of images, as training does: several of each where there are few,
for example to encode.

python examples/random_crops.py photos --size 64 --count 2000 --out crops
"""

import argparse
import sys
from pathlib import Path

from olvae.cli.main import print_error
from olvae.data.opening import open_source, open_test_source
from olvae.data.places import load
from olvae.figures import save_image
from olvae.files import check_folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "src", metavar="SRC", help="a folder, shards, a list, a data set or a config, as of --data"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for 00000000.png, …"
    )
    parser.add_argument("--size", required=True, type=int, help="side of the crops, in pixels")
    parser.add_argument(
        "--count", required=True, type=int, help="crops; every image gives as many, or one more"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another one gives other crops; by default 0"
    )
    args = parser.parse_args(arguments)

    check_folder(args.out).mkdir(parents=True, exist_ok=True)
    names = [f"{number:08d}.png" for number in range(args.count)]
    if others := {path.name for path in args.out.glob("*.png")}.difference(names):
        raise ValueError(
            f"{args.out}: has {min(others)}, not one of {args.count} crops: choose another folder"
        )
    is_config = Path(args.src).suffix in (".yaml", ".yml")  # of which the size is replaced
    source = (
        open_test_source(load([args.src]), size=args.size)
        if is_config
        else open_source(args.src, args.size, 1)
    )
    crops = (image for batch in source.train_loader(args.seed) for image in batch["image"])
    for name, crop in zip(names, crops, strict=False):
        save_image(crop, args.out / name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
