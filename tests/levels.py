"""Instruction sets that a process can be started with."""

import torch

from mlp_ext import _C

# What torch calls each level in its report, what forces it, and what the kernels call it.
LEVELS = {
    "DEFAULT": ("default", "generic"),
    "AVX2": ("avx2", "avx2"),
    "AVX512": ("avx512", "avx512"),
}


def available() -> list[str]:
    """The levels up to the one torch chose, in order; of a build for one, that one alone."""
    names = list(LEVELS)
    chosen = torch.backends.cpu.get_cpu_capability()
    levels = names[: names.index(chosen) + 1] if chosen in names else names[:1]
    return [name for name in levels if LEVELS[name][1] in _C.build_info()["instruction_sets"]]
