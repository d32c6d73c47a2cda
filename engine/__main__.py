"""``python -m engine`` is ``dpo``, for launchers that start a module."""

from engine.cli import command

command()
