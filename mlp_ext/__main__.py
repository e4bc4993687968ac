"""`python -m mlp_ext` is the command `mlp-ext`."""

import sys

from mlp_ext_cli import main

if __name__ == "__main__":
    sys.exit(main())
