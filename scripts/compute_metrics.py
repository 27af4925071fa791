"""The README's evaluation command: the same as `olvae evaluate`."""

import sys

from olvae.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
