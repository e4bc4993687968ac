"""Loads the compiled module, which registers ``torch.ops.mlp_ext``, after checking its torch."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_IN_PLACE = "pip install --no-build-isolation -e ."


def _why_not_compiled() -> str:
    others = [path.name for path in _HERE.glob("_C.*.so")]
    if others and (_HERE / "_built.py").exists():
        running = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
        return (
            f"mlp_ext was compiled for another Python ({', '.join(sorted(others))}) than the "
            f"{running} that is running: type `{_BUILD}` in the source tree"
        )
    if (_HERE.parent / "setup.py").exists():
        paths = [Path(path).resolve() for path in sys.path]
        installed = [
            p for p in paths if p != _HERE.parent.resolve() and [*p.glob("mlp_ext/_C.*.so")]
        ]
        if installed:
            return (
                f"this is mlp_ext's source folder, {_HERE}, which hides the installed package in "
                f"{installed[0]}: leave the folder (`cd ..`), or type `{_IN_PLACE}` to use the "
                "source folder itself"
            )
        return (
            f"this is mlp_ext's source folder, {_HERE}, and mlp_ext is not installed: type "
            f"`{_IN_PLACE}` in {_HERE.parent}"
        )
    return (
        f"mlp_ext is in {_HERE}, but its compiled part is not: type `{_BUILD}` in the source tree"
    )


def _check_build() -> None:
    """Raises ImportError if loading would fail on a missing file or symbol, or needs the GIL."""
    if "t" in sys.abiflags:
        what = "mlp_ext needs the GIL, and this Python is free-threaded"
        raise ImportError(f"{what}: use the ordinary build, such as python3.13 in place of 3.13t")
    if not (find_spec("mlp_ext._C") and find_spec("mlp_ext._built")):
        raise ImportError(_why_not_compiled())
    from mlp_ext._built import CUDA_VERSION, TORCH_VERSION

    rebuild = f"type `{_BUILD}` in the source tree to rebuild it"
    built, running = (v.split("+")[0].split(".")[:2] for v in (TORCH_VERSION, torch.__version__))
    if built != running and os.environ.get("MLP_EXT_ANY_TORCH") != "1":
        raise ImportError(
            f"mlp_ext was built against torch {TORCH_VERSION}, but torch {torch.__version__} is "
            f"running: {rebuild}"
        )
    # A CPU-only build also works with a CUDA build of torch.
    cuda = torch.version.cuda
    if CUDA_VERSION and (cuda is None or CUDA_VERSION.split(".")[0] != cuda.split(".")[0]):
        has = f"has CUDA {cuda}" if cuda else "is without CUDA"
        raise ImportError(
            f"mlp_ext was built for CUDA {CUDA_VERSION}, but the torch {torch.__version__} that is "
            f"running {has}: {rebuild}"
        )


_check_build()

try:
    from mlp_ext import _C, _built

    _C.instruction_set()  # RuntimeError if this CPU cannot run a build for one instruction set
except (ImportError, RuntimeError) as error:
    raise ImportError(
        f"mlp_ext's compiled part does not load beside torch {torch.__version__}: {error}; type "
        f"`{_BUILD}` in the source tree to rebuild it"
    ) from None

# Parameters of each activation with their defaults, in the operators' order.
PARAMETERS: dict[str, dict[str, float]] = _C.activations()
ACTIVATIONS: tuple[str, ...] = tuple(PARAMETERS)


def empty_cache() -> None:
    """Frees the memory that mlp_ext keeps on the CPU for later calls.

    That is memory of results whose tensors are gone, at most 256 MiB or `MLP_EXT_RESULTS_MIB`, and
    the workspace of each thread, at most 512 MiB in all. It goes back to the system. The next calls
    allocate again, and are slower. No tensor changes, and what another thread uses at the moment
    stays. On CUDA all memory is PyTorch's: `torch.cuda.empty_cache()`.

    Returns:
        None.

    Examples:
        >>> mlp_ext.empty_cache()
    """
    _C.empty_cache()


def build_info() -> dict[str, Any]:
    """Says how mlp_ext was built, and what it uses on this machine.

    Returns:
        dict: a value for each of these names.

            - `mlp_ext`, `torch`: versions of this package and of the torch it was built against.
            - `compiler`: its name and version.
            - `instruction_sets`: those in the build; `instruction_set`: the one in use, which the
              environment variable `ATEN_CPU_CAPABILITY` (default, avx2, avx512) overrides.
            - `machine`: the processor whose limits between paths are used, such as zen4.
            - `l2_per_core`: bytes of L2 cache that a core has to itself.
            - `openmp`: its version date, or None if it was built without.
            - `threads`: `torch.get_num_threads()`.
            - `cuda`: version of the toolkit that compiled the CUDA kernels. If None, GPU tensors
              run PyTorch's own operations: the same values, not fused.
            - `cuda_archs`: such as sm_80, sm_90a, and compute_90 for PTX.
            - `cutlass`: its version. If None, large layers on GPUs with an activation that cuBLASLt
              lacks run a GEMM and an elementwise pass.

    Examples:
        >>> mlp_ext.build_info()["mlp_ext"] == mlp_ext.__version__
        True
    """
    return {
        **_C.build_info(),
        "instruction_set": _C.instruction_set(),
        "machine": _C.machine()["name"],
        "threads": torch.get_num_threads(),
        "cuda": _built.CUDA_VERSION,
        "cuda_archs": list(_built.CUDA_ARCHS),
        "cutlass": _built.CUTLASS_VERSION,
    }
