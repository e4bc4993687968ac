"""The user's own code, from a module or a file."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from mlp_ext.bench.providers import Provider
from mlp_ext.nn import type_name
from mlp_ext_cli.arguments import meant


def imported(source: str, name: str) -> Any:
    """The object `name`, dots for attributes, of a module or a file FILE.py.

    Raises ValueError if there is no such source or name, or if the source does not run.
    """
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    # As `python FILE.py` and `python -m` do, so that it can import its neighbors.
    folder = str(Path(source).resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = _load(source) if is_file else import_module(source)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not is_file and f"{source}.".startswith(f"{missing}."):
            what = f"there is no module {missing} in this folder or on Python's path"
            raise ValueError(what) from None
        raise ValueError(f"{source} fails: {first_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = meant(part, [known for known in dir(found) if not known.startswith("_")])
            raise ValueError(f"{source} has no attribute '{name}'{close}")
        found = getattr(found, part)
    return found


def own_provider(source: str, name: str) -> Provider:
    """The provider whose `make` is this function of a module or a file.

    In layers, make(setting) returns function(input [M, K], weight [N, K], bias [N]) -> [M, N]; in
    train, make(model, criterion, optimizer) returns step(input, target) -> loss, which updates the
    model's Parameters; in many, make(models, criterion, optimizers) returns step(input, target) ->
    losses. Raises ValueError as `imported`, and if it is not a function.
    """
    make = imported(source, name)
    if not callable(make):
        raise ValueError(f"{source}:{name} is a {type_name(make)}, not a function")
    return Provider(make, f"{name} of {source}")


def first_line(error: BaseException) -> str:
    """As "KeyError: 'no such key'"."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def _load(file: str) -> ModuleType:
    name = f"mlp_ext_own_{Path(file).stem}"
    spec = spec_from_file_location(name, file)
    assert spec and spec.loader, "the file ends in .py"
    module = module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickle
    spec.loader.exec_module(module)
    return module
