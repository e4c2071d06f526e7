"""What Lightning calls whenever a Trainer is made: gives it a callback if LIGHTNING_CONVBN names a mode.

Importing this imports nothing else of the package, so that without the variable it costs a Trainer next to nothing.
"""

from __future__ import annotations

import os
from typing import Any

OFF = ("", "off", "0", "false")


def callbacks() -> list[Any]:
    """Return a callback, or none where the variable is unset or off."""
    mode = os.environ.get("LIGHTNING_CONVBN", "").strip().lower()
    if mode in OFF:
        return []
    from lightning_convbn.environment import ConvBNFromEnvironment

    return [ConvBNFromEnvironment(mode)]
