"""What `mlp-ext profile` does."""

from __future__ import annotations

import argparse
import textwrap

import torch
from torch import nn

from mlp_ext.bench.own import first_line, imported
from mlp_ext.bench.rows import write_json
from mlp_ext.commands import arguments
from mlp_ext.commands.summary import WIDTH, fastest
from mlp_ext.nn import type_name
from mlp_ext.profile import Profile, profile


def run(args: argparse.Namespace) -> None:
    arguments.check_device(args.device, args.fail)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source, name = args.model
        model = _make(source, name, args.fail)
        try:
            inputs = [torch.randn(sizes).to(args.device) for sizes in args.input]
            found = profile(model.to(args.device), *inputs, train=args.train, rounds=args.rounds)
        except (TypeError, ValueError, RuntimeError) as error:
            args.fail(str(error).strip().splitlines()[0].removeprefix("profile: "))
    for line in str(found).splitlines():  # only reasons are long
        print(textwrap.fill(line, WIDTH, subsequent_indent="    "))
    print("", textwrap.fill(_sentence(found), WIDTH), sep="\n")
    if args.json:
        try:
            write_json(found.to_dict(), args.json)
        except OSError as error:
            args.fail(str(error))


def _sentence(found: Profile) -> str:
    """What happened."""
    measured = [timing for timing in found.timings if not timing.left_out]
    speeds = {t.name: (t.ratio_to_native, t.ratio_q20, t.ratio_q80) for t in measured[1:]}
    if not speeds:
        return "Only torch was measured: mlp_ext changes nothing in this model."
    differences = [d for t in measured for d in (t.output_difference, t.gradient_difference) if d]
    largest = max(differences, default=0.0)
    if found.noise:  # which str(found) says
        return f"Results differ by at most {largest:.0e}."
    return f"{fastest(speeds)}; results differ by at most {largest:.0e}."


def _make(source: str, name: str, fail: arguments.Fail) -> nn.Module:
    """The model, or what a function or class returns when called without arguments."""
    try:
        found = imported(source, name)
    except ValueError as error:
        fail(str(error))
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        fail(f"{source}:{name} is a {type_name(found)}, not a function or class")
    try:
        model = found()
    except (Exception, SystemExit) as error:
        fail(f"{source}:{name} fails: {first_line(error)}")
    if not isinstance(model, nn.Module):
        fail(f"{source}:{name} returns a {type_name(model)}, not a torch.nn.Module")
    return model
