"""What `mlp-ext profile` does."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mlp_ext.bench.rows import replacing
from mlp_ext.commands import arguments
from mlp_ext.commands.summary import fastest
from mlp_ext.nn import type_name
from mlp_ext.profile import Profile, profile
from mlp_ext_cli.arguments import meant


def run(args: argparse.Namespace) -> None:
    arguments.check_device(args.device, args.fail)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, factory = args.factory
        model = _make(module, factory, args.fail)
        try:
            inputs = [torch.randn(sizes).to(args.device) for sizes in args.input]
            found = profile(model.to(args.device), *inputs, train=args.train, rounds=args.rounds)
        except (TypeError, ValueError, RuntimeError) as error:
            args.fail(str(error).strip().splitlines()[0].removeprefix("profile: "))
    for line in str(found).splitlines():  # only reasons are long
        print(textwrap.fill(line, 79, subsequent_indent="    "))
    print("", textwrap.fill(_sentence(found), 79), sep="\n")
    if args.json:
        # JSON has no NaN and no infinity: writes null.
        record = json.loads(json.dumps(found.to_dict()), parse_constant=lambda _: None)
        try:
            with replacing(args.json) as path:
                path.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            args.fail(str(error))


def _sentence(found: Profile) -> str:
    """What happened."""
    measured = [timing for timing in found.timings if timing.ratio_to_native is not None]
    others = {t.name: t.ratio_to_native for t in measured[1:] if t.ratio_to_native is not None}
    if not others:
        return "Nothing was measured but torch: mlp_ext changes nothing in this model."
    differences = [d for t in measured for d in (t.output_difference, t.gradient_difference) if d]
    largest = max(differences, default=0.0)
    return f"{fastest(others)}; results differ by at most {largest:.0e}."


def _make(module: str, factory: str, fail: arguments.Fail) -> nn.Module:
    """Imports and calls it; also from the current folder, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
        for name in factory.split("."):
            if not hasattr(found, name):
                fail(f"{module} has no {factory}{meant(name, dir(found))}")
            found = getattr(found, name)
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            fail(f"{module}:{factory} is a {type_name(found)}, not a function or class")
        model = found()
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if f"{module}.".startswith(f"{missing}."):
            fail(f"there is no module {missing} in this folder or in Python's path")
        what = str(error).strip().splitlines() or [""]
        fail(f"{module}:{factory} fails: {type(error).__name__}: {what[0]}")
    if not isinstance(model, nn.Module):
        fail(f"{module}:{factory} returns a {type_name(model)}, not a torch.nn.Module")
    return model
