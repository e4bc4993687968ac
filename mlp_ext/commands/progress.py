"""The progress bar of commands that run for long."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

BAR_AFTER = 2.0  # seconds after which the bar is shown


class Bar:
    """A bar in long runs on a terminal, if tqdm is installed; closed after a with."""

    def __init__(self, total: int, shown: bool = True, unit: str = "epoch") -> None:
        self._total, self._done, self._unit = total, 0, unit
        self._text = ""
        self._may_show = shown and sys.stderr.isatty() and bool(find_spec("tqdm"))
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar:
            self._bar.update(count)
        elif self._may_show and time.monotonic() - self._started > BAR_AFTER:
            from tqdm import tqdm

            options: Any = {"initial": self._done, "unit": self._unit, "leave": False}
            self._bar = tqdm(total=self._total, desc=self._text or None, **options)

    def describe(self, text: str) -> None:
        """Says before the bar what runs."""
        self._text = text
        if self._bar:
            self._bar.set_description(text)

    def aside(self) -> AbstractContextManager[Any]:
        """A with in which lines may be printed."""
        return self._bar.external_write_mode() if self._bar else nullcontext()
