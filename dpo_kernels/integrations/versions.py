"""Which releases of a peer an integration was tested with."""

from __future__ import annotations

import importlib.metadata


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_series(distribution: str, series: str, integration: str, *, optional: bool = False) -> None:
    """Raise ImportError unless a release of ``series`` is installed: "1.16" takes 1.16.0 and 1.16.3, not 1.17.0.

    Args:
        distribution: name of the package on the index.
        series: major and minor version.
        integration: module that asks, for the message.
        optional: let the distribution be absent; another series is refused all the same.
    """
    found = installed_version(distribution)
    if found is None and optional:
        return
    if found is None or found.split(".")[:2] != series.split("."):
        major, minor = series.split(".")
        wanted = f"{distribution}>={series},<{major}.{int(minor) + 1}"
        state = "which is not installed" if found is None else f"got {found}"
        raise ImportError(
            f"{integration} was tested with {distribution} {series} only, {state}: pip install '{wanted}'"
        )
