"""Loads the compiled module, which registers ``torch.ops.mlp_ext``, for the torch it fits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _check_build() -> None:
    """Raises ImportError where the loader would fail on a missing file or symbol."""
    if not (find_spec("mlp_ext._C") and find_spec("mlp_ext._built")):
        raise ImportError(
            f"mlp_ext is here, but its compiled part is not: type `{_BUILD}` in the source tree"
        )
    from mlp_ext._built import TORCH_VERSION

    built, running = (v.split("+")[0].split(".")[:2] for v in (TORCH_VERSION, torch.__version__))
    if built != running:
        raise ImportError(
            f"mlp_ext was built against torch {TORCH_VERSION}, but torch {torch.__version__} is "
            f"running: type `{_BUILD}` in the source tree to rebuild it"
        )


_check_build()

from mlp_ext import _C, _built  # noqa: E402

ACTIVATIONS: tuple[str, ...] = tuple(_C.activations())


def build_info() -> dict[str, Any]:
    """How this package was built and what it uses here.

    Returns:
        A dict: the versions of ``mlp_ext`` and of the ``torch`` it was built against; ``compiler``;
        ``instruction_sets`` in the build and the ``instruction_set`` in use, which the variable
        ``ATEN_CPU_CAPABILITY`` (default, avx2, avx512) forces; ``openmp``, its version date or None
        where it was left out; ``threads``, what torch is set to; ``cuda``, the version that the
        CUDA kernels were built with, ``cuda_archs``, as sm_80, sm_90a, and compute_90 for PTX, and
        ``cutlass``, its version. Where ``cuda`` is None, tensors on a GPU take native operations:
        the same values, not fused. Where ``cutlass`` is None, large layers with an activation that
        cuBLASLt does not know take a product and a pass over it.
    """
    return {
        **_C.build_info(),
        "instruction_set": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "cuda": _built.CUDA_VERSION,
        "cuda_archs": list(_built.CUDA_ARCHS),
        "cutlass": _built.CUTLASS_VERSION,
    }
