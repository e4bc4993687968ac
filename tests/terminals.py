"""stderr as a terminal."""

import io
import sys

import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is written to stderr from now on. A fixture cannot do this: pytest sets stderr after."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream
