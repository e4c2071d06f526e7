"""``python -m lightning_convbn``: the command ``lightning-convbn``."""

import sys

from lightning_convbn.command.main import main

if __name__ == "__main__":
    sys.exit(main())
