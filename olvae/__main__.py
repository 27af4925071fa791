"""``python -m olvae``: the same as ``olvae``."""

from olvae.cli.main import main

if __name__ == "__main__":
    main()
