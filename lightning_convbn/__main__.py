"""Runs the command ``lightning-convbn`` for ``python -m lightning_convbn``."""

import sys

from lightning_convbn.command.main import main

if __name__ == "__main__":
    sys.exit(main())
