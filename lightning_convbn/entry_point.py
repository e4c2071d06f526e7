"""What Lightning calls whenever a Trainer is made. It adds a callback if ``LIGHTNING_CONVBN`` names a mode.

It imports the rest of the package only then. Without the variable a Trainer is made as fast as ever.
"""

from __future__ import annotations

import os
from typing import Any

OFF = ("", "off", "0", "false")


def callbacks() -> list[Any]:
    """Return one callback, or none if the variable is unset or off."""
    value = os.environ.get("LIGHTNING_CONVBN", "").strip()
    if value.lower() in OFF:
        return []
    from lightning_convbn.environment import ConvBNFromEnvironment

    return [ConvBNFromEnvironment(value)]
