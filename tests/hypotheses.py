"""hypothesis without its limits of time; where it is not installed, its tests are skipped."""

from typing import Any
from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    st = MagicMock()

    def given(*strategies: Any, **named: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**options: Any) -> Any:
        return lambda test: test

else:
    settings.register_profile("no limits of time", deadline=None)
    settings.load_profile("no limits of time")

__all__ = ["given", "settings", "st"]
