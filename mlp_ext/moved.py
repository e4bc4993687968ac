"""Names of version 0.1 that have moved: importing one, as a pickle may, raises an error that says
what to use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import NoReturn

MODULES = {
    **{
        f"mlp_ext.{name}": f"mlp_ext.commands.{name}"
        for name in ("arguments", "data", "loop", "plots")
    },
    "mlp_ext.cli": "mlp_ext_cli",
    "mlp_ext.bench.command": "mlp_ext.commands.bench",
}
_GONE = "is gone: unfuse the model where it was fused, save it, and fuse it again"
NAMES = {
    "mlp_ext._C": {
        "Run": "is now mlp_ext._C.MlpCall",
        "Stepper": "is now mlp_ext._C.Trainer",
        "Watch": "is now mlp_ext._C.Guards",
    },
    "mlp_ext.nn": {"FusedActivation": _GONE},
    "mlp_ext.sequential": {"FusedSequential": _GONE},
}


class MovedModules:
    """The last import finder, called for modules that no other finder has found."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name in MODULES:
            raise ImportError(f"{name} has moved: use {MODULES[name]}", name=name)


def install() -> None:
    """Installs the errors, once the modules in NAMES are imported."""
    sys.meta_path.append(MovedModules)
    for module in NAMES:
        vars(sys.modules[module])["__getattr__"] = partial(_missing, module)


def _missing(module: str, name: str) -> NoReturn:
    if name in NAMES[module]:  # not an AttributeError, whose message pickle would replace
        raise ImportError(f"{module}.{name} {NAMES[module][name]}", name=module)
    raise AttributeError(f"{module}.{name} does not exist")
