"""The command `mlp-ext info`: how the package was built and what it uses here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mlp_ext.ops import build_info


def add_info(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = commands.add_parser("info", help="how this package was built and what it uses here")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=_info)


def _info(args: argparse.Namespace) -> None:
    info = build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info))
    for name, value in info.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        print(f"{name:<{width}}  {text or 'none'}")
