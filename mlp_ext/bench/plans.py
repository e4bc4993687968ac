"""Plans of the kernels: which path a case takes. csrc/cpu/plan.h and csrc/cuda/plan.h say why."""

from __future__ import annotations

from typing import Any

import torch

from mlp_ext import _C
from mlp_ext.bench.cases import Case, Layer, Nets, Setting

# KiB of shared memory that a block may have, by architecture; CUDA programming guide, technical
# specifications per compute capability.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}

LAYER_PATHS = {  # of the CPU, in one line
    "small": "one thread, nothing is packed",
    "dots": "vector lanes along K, nothing is packed",
    "narrow": "several rows of y in a vector, nothing is packed but W",
    "tall": "dz, dx, dW and db in one pass over blocks of rows",
    "one_input": "dx, dW and db in one pass, row by row",
    "one_output": "dx, dW and db in one pass, row by row",
    "few_rows": "W is read once, for dx, and dW is written in the same pass",
    "packed": "blocked GEMMs on packed operands, with the activation in the same pass",
    "amx": "GEMMs on the tile unit, packed once, with the activation in the same pass",
    "library": "PyTorch's GEMM, and one pass for the rest",
}
STEP_PATHS = {
    "lanes": "as blocks, with a row in each lane of a vector",
    "blocks": "a block of rows runs through all layers, forward and backward",
    "panels": "layer by layer, on transposed activations and blocks of columns of W",
    "layers": "layer by layer, each by its own path",
}


def plan(
    case: Case,
    setting: Setting,
    arch: int = 0,
    forced: str | None = None,
    machine: str | None = None,
) -> dict[str, Any]:
    """The plan of the kernels for this case, as _C has it. arch: of the GPU, as 90; 0 on CPUs.
    forced: a layer's path, where it takes the case. machine: one of _C.machines(), on CPUs.

    Raises ValueError for sizes that they do not take.
    """
    dtype, tf32 = setting.dtype.replace("tf32", "float32"), setting.dtype == "tf32"
    if setting.device == "cuda":
        shared = 1024 * SHARED.get(arch, 48)
        if isinstance(case, Layer):
            more: dict[str, Any] = {"tf32": tf32, "shared": shared, "path": forced}
            found = _C.cuda_plan(*case, dtype, setting.activation, arch, **more)
        else:
            sizes, many = (list(case.widths), case.batch), isinstance(case, Nets)
            found = _C.cuda_step_plan(*sizes, dtype, arch, shared, many=many)
    else:
        mode = _C.machine(machine)["bfloat16"] if machine and dtype == "bfloat16" else None
        kind = (setting.torch_dtype.itemsize, setting.threads, mode or _C.dot_mode(dtype))
        if isinstance(case, Layer):
            library = setting.torch_dtype.itemsize > 2 or _has_library()
            options: dict[str, Any] = {"machine": machine, "forward": forced, "backward": forced}
            found = _C.plan(*case, *kind, library=library, **options)
        elif isinstance(case, Nets):
            size, _, dots = kind
            path = _C.many_plan(list(case.widths), case.batch, size, dots, machine=machine)
            found = {"path": path}
        else:
            found = _C.step_plan(list(case.widths), case.batch, *kind, machine=machine)
    return dict(found)


def paths(plan: dict[str, Any]) -> dict[str, str]:
    """Of a plan: forward and backward of a layer, step of a network."""
    if "path" in plan:
        return {"step": plan["path"]}
    return {way: plan.get(f"{way}_path") or plan[way] for way in ("forward", "backward")}


def capability() -> int:
    """The architecture of the GPU in use, as 90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _has_library() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
