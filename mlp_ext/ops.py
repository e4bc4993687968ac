"""Loads the compiled module, which registers ``torch.ops.mlp_ext.*``, and refuses a torch it was not built against."""

from __future__ import annotations

from typing import Any

import torch

def _check_torch() -> None:
    """Compare versions before the loader can fail on a missing symbol."""
    try:
        from mlp_ext._built import TORCH_VERSION
    except ImportError:
        raise ImportError(
            "mlp_ext is here, but its compiled part is not: build it with "
            "`pip install --no-build-isolation .` in the source tree (`-e .` to work on it)"
        ) from None
    built, running = (v.split("+")[0].split(".")[:2] for v in (TORCH_VERSION, torch.__version__))
    if built != running:
        raise ImportError(
            f"mlp_ext was built against torch {TORCH_VERSION}, but torch {torch.__version__} is running: "
            "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"
        )


_check_torch()

from mlp_ext import _C  # noqa: E402

ACTIVATIONS: tuple[str, ...] = tuple(_C.activations())


def build_info() -> dict[str, Any]:
    """How this package was built and what it uses here.

    Returns:
        A dict with the versions of ``mlp_ext`` and of the ``torch`` it was built against, the ``compiler``, the
        ``instruction_sets`` in the build and the ``instruction_set`` in use (``ATEN_CPU_CAPABILITY`` forces one),
        ``openmp`` (version date, or None where it was left out), ``threads``, and ``cuda``: the CUDA version and
        ``cuda_archs`` of the build, or None and none. Without CUDA kernels, CUDA tensors take native operations.
    """
    from mlp_ext import _built

    return {
        **_C.build_info(),
        "instruction_set": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "cuda": _built.CUDA_VERSION,
        "cuda_archs": list(_built.CUDA_ARCHS),
    }
