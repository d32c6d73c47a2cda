"""From the configuration of another trainer to a run configuration."""

from .convert import convert_file

__all__ = ["convert_file"]
