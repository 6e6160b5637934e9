"""Lines that name the machine and the packages of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def cpu_cores() -> str:
    """Number of CPU cores with their architecture."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def versions(*packages: str) -> str:
    """Names and versions of packages, separated by commas."""
    return ", ".join(_version(package) for package in packages)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"
