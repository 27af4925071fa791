"""The README's training command: the same as `olvae train`."""

import sys

from olvae.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
