"""Builds mlp_ext._C: CPU kernels and, where torch has CUDA and a toolkit is found, CUDA kernels.

MLP_EXT_CUDA = auto (default), 1 (CUDA or an error), 0 (never look). MAX_JOBS bounds the compilers
that run at once.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import setuptools

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    sys.exit(
        "mlp_ext is compiled against the torch that is installed, and there is none here: type "
        "`pip install torch` and then `pip install --no-build-isolation .`"
    )

if int(setuptools.__version__.partition(".")[0]) < 77:  # without isolation pip does not look
    sys.exit(
        f"mlp_ext needs setuptools 77 or newer, and {setuptools.__version__} is installed: type "
        "`pip install --upgrade setuptools`"
    )

ROOT = Path(__file__).parent
VERSION = (ROOT / "VERSION").read_text().strip()


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def use_cuda() -> bool:
    wish = os.environ.get("MLP_EXT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"MLP_EXT_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return False
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA (torch {torch.__version__} has none)")
    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin/nvcc").exists():
        missing.append("a CUDA toolkit with nvcc (set CUDA_HOME)")
    if not sources("cuda/*.cu"):
        missing.append("CUDA kernels, which this version does not have yet")
    if missing and wish == "1":
        sys.exit(f"MLP_EXT_CUDA=1 needs {' and '.join(missing)}")
    return not missing


class Build(cpp_extension.BuildExtension):
    """Also records, beside _C, what it was built against, for a check before _C is loaded."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # never keep a _C of another torch; what is stale, ninja knows better

    def run(self) -> None:
        super().run()
        package = ROOT / "mlp_ext" if self.inplace else Path(self.build_lib) / "mlp_ext"
        compiler = os.environ.get("CXX", "c++")
        banner = subprocess.run(
            [*shlex.split(compiler), "--version"], capture_output=True, text=True
        ).stdout
        (package / "_built.py").write_text(
            "# Written by setup.py.\n"
            f"TORCH_VERSION = {torch.__version__!r}\n"
            f"CXX = {banner.partition(chr(10))[0]!r}\n"
            f"CUDA_VERSION = {torch.version.cuda if CUDA else None!r}\n"
            f"CUDA_ARCHS = {cuda_archs()!r}\n"
        )


def cuda_archs() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() if CUDA else []


CUDA = use_cuda()
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"),
]
Extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
extension = Extension(
    "mlp_ext._C",
    sources("*.cpp") + sources("cpu/*.cpp") + (sources("cuda/*.cu") if CUDA else []),
    include_dirs=[str(ROOT / "csrc")],
    define_macros=[
        ("MLP_EXT_VERSION", f'"{VERSION}"'),
        ("MLP_EXT_TORCH", torch.__version__),  # a changed command line, so that ninja rebuilds
    ],
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20"]} if CUDA else CXX_FLAGS,
    extra_link_args=["-fopenmp"],  # at::parallel_for is inlined here, and serial without
)
setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": Build})
