"""Folders made once in a test session, also where pytest-xdist's workers share the session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it too

# TensorArgs a name and what fills a new folder; returns the folder of that name.
Once = Callable[[str, Callable[[Path], object]], Path]


def once_in(factory: pytest.TempPathFactory, shared: Path) -> Once:
    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                unfinished = factory.mktemp(name)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return once
