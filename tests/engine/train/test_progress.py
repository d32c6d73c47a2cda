"""What a terminal shows, and what a file gets instead."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from engine.train.loop import train


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_and_lines_that_fit(terminal, make_config, monkeypatch, caplog):
    streams = {name: Terminal() if terminal else io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("COLUMNS", "70")
    handler = logging.StreamHandler(streams["stdout"])
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    # A level that is set as an attribute is not seen by loggers that were asked before.
    caplog.set_level(logging.INFO, "engine")
    train(make_config(train={"max_steps": 3}))
    lines = [line for line in streams["stdout"].getvalue().splitlines() if "step " in line and "  loss " in line]
    assert len(lines) == 3
    assert all((len(line) <= 70) == terminal for line in lines)
    assert ("training" in streams["stderr"].getvalue()) == terminal
    assert root.handlers == [handler]
