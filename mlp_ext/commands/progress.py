"""The progress bar of commands that train for long."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

BAR_AFTER = 2.0  # seconds of training after which the bar is shown


class Bar:
    """A bar of epochs in long runs on a terminal, if tqdm is installed; closed after a with."""

    def __init__(self, total: int, shown: bool = True) -> None:
        self._total, self._done = total, 0
        self._may_show = shown and sys.stderr.isatty() and bool(find_spec("tqdm"))
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.close()

    def advance(self, epochs: int) -> None:
        self._done += epochs
        if self._bar:
            self._bar.update(epochs)
        elif self._may_show and time.monotonic() - self._started > BAR_AFTER:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._done, unit="epoch", leave=False)

    def aside(self) -> AbstractContextManager[Any]:
        """A with in which lines may be printed."""
        return self._bar.external_write_mode() if self._bar else nullcontext()
