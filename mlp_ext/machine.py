"""The user's own limits between paths, a file that `mlp-ext tune` writes, read at import."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from textwrap import shorten

from mlp_ext import _C

VARIABLE = "MLP_EXT_MACHINE"


def read(path: str) -> None:
    """Plans with the limits of a JSON file, {"name": ..., "fma": {"dot_rows": 16, ...}, ...}.

    Limits that it does not name are those of this processor. Raises OSError, and ValueError with
    nothing changed.
    """
    try:
        limits = json.loads(Path(path).read_text())
        json.dumps(limits, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError):
        raise ValueError("the file is not JSON") from None
    if not isinstance(limits, dict):
        raise ValueError("the file must hold an object")
    for name, value in limits.items():
        is_text = name in ("name", "bfloat16")
        if not isinstance(value, str if is_text else dict):
            raise ValueError(f"{name} must be {'a string' if is_text else 'an object'}")
    _C.use_machine(limits)


def use_file(path: str) -> None:
    """The same; a broken file is one warning, and the limits stay as they are."""
    try:
        read(path)
    except OSError as error:
        warnings.warn(f"{VARIABLE}: cannot read '{path}': {error.strerror}", stacklevel=2)
    except ValueError as error:
        what = shorten(str(error), 200)
        warnings.warn(f"{VARIABLE}: '{path}' is not used: {what}", stacklevel=2)


if path := os.environ.get(VARIABLE):
    use_file(path)
