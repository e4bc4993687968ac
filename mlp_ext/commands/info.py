"""What `mlp-ext info` does."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from mlp_ext.bench.training import LOSSES, OPTIMIZERS
from mlp_ext.commands.data import DATASETS
from mlp_ext.commands.summary import WIDTH
from mlp_ext.ops import ACTIVATIONS, build_info


def run(args: argparse.Namespace) -> None:
    build = build_info()
    names: dict[str, Any] = {
        "activations": [*ACTIVATIONS],
        "losses": [*LOSSES],
        "optimizers": [*OPTIMIZERS],
        "data_sets": [*DATASETS],
    }
    if args.json:
        print(json.dumps({**build, **names}, indent=2))
        return
    width = max(map(len, build)) + 2
    _print_table(build, width)
    print("\nnames for the options of mlp-ext train and sweep:")
    _print_table(names, width)


def _print_table(table: Mapping[str, Any], width: int) -> None:
    for name, value in table.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        lines = textwrap.wrap(
            text or "none", WIDTH - width, break_long_words=False, break_on_hyphens=False
        )
        print(name.ljust(width) + f"\n{' ' * width}".join(lines))
