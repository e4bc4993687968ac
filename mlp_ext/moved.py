"""Names of version 0.1 that have moved: importing one, as a pickle may, raises an error that says
what to use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

MODULES = {
    **{
        f"mlp_ext.{name}": f"mlp_ext.commands.{name}"
        for name in ("arguments", "cli", "data", "loop", "plots")
    },
    "mlp_ext.bench.command": "mlp_ext.commands.bench",
}
COMPILED = {"Run": "MlpCall", "Stepper": "Trainer", "Watch": "Guards"}


class MovedModules:
    """The last import finder, called for modules that no other finder has found."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name in MODULES:
            raise ImportError(f"{name} has moved: use {MODULES[name]}", name=name)


def _compiled(name: str) -> NoReturn:
    what = f"is now mlp_ext._C.{COMPILED[name]}" if name in COMPILED else "does not exist"
    raise AttributeError(f"mlp_ext._C.{name} {what}")


def explain(compiled: ModuleType) -> None:
    """Installs the errors for old modules and for old names in the compiled module."""
    sys.meta_path.append(MovedModules)
    vars(compiled)["__getattr__"] = _compiled
