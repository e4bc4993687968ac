"""What `mlp-ext info` does."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from mlp_ext.bench.training import LOSSES, OPTIMIZERS
from mlp_ext.commands.data import DATASETS
from mlp_ext.ops import ACTIVATIONS, build_info


def run(args: argparse.Namespace) -> None:
    info: dict[str, Any] = {
        **build_info(),
        "activations": [*ACTIVATIONS],
        "losses": [*LOSSES],
        "optimizers": [*OPTIMIZERS],
        "data_sets": [*DATASETS],
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info)) + 2
    for name, value in info.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        lines = textwrap.wrap(
            text or "none", 79 - width, break_long_words=False, break_on_hyphens=False
        )
        print(name.ljust(width) + f"\n{' ' * width}".join(lines))
