"""Providers of the user's own, from a file of Python."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mlp_ext.bench.providers import Provider
from mlp_ext_cli.arguments import meant


def own_provider(file: Path, function: str) -> Provider:
    """The provider whose `make` is this function of the file, which is run as a module.

    In layers, make(setting) returns function(input [M, K], weight [N, K], bias [N]) -> [M, N]; in
    train, make(model, criterion, optimizer) returns step(input, target) -> loss, which updates the
    model's Parameters. Raises ValueError if the file does not run or has no such function.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    name = f"mlp_ext_own_{file.stem}"
    spec = spec_from_file_location(name, file)
    assert spec and spec.loader, "the file ends in .py"
    module = module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickle
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{file} fails: {type(error).__name__}: {lines[0]}") from error
    functions = {name: value for name, value in vars(module).items() if callable(value)}
    if function not in functions:
        raise ValueError(f"{file} has no function {function}{meant(function, functions)}")
    return Provider(functions[function], f"{function} of {file}")
