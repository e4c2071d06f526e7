"""The versions of the packages that the command runs with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:  # the command runs from a source tree
        return "(not installed)"


def used_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that were imported."""
    libraries = [package for package in ("torch", "torchvision", "timm") if package in sys.modules]
    return {
        "lightning-convbn": installed_version("lightning-convbn"),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in libraries},
    }
