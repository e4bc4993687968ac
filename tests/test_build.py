"""Building and installing: what sdist and wheel hold, and what a broken build says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import mlp_ext
from mlp_ext import _C

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = [p for p in sys.path if p.endswith("-packages")]


def run(*command: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]


def checked(*command: str | Path, **kwargs: object) -> str:
    result = run(*command, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_tree(folder: Path) -> Path:
    """The source tree with what an editable build left in it, which the sdist must not take."""
    for name in ("csrc", "mlp_ext", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (p for p in ROOT.iterdir() if p.is_file()):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = copy_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("sdist")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    checked(sys.executable, "-c", build, cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone; the one compilation of this file."""
    out = tmp_path_factory.mktemp("wheel")
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out]
    checked(sys.executable, "-m", "pip", "wheel", *flags, sdist)
    (archive,) = out.glob("*.whl")
    return archive


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which finds torch in the present one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(checked(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # --python, so that the script mlp-ext starts this environment's interpreter.
    flags = ["install", "--no-deps", "--no-index"]
    checked(sys.executable, "-m", "pip", "--python", python, *flags, wheel)
    # A .pth file that is read, but whose own .pth files, such as an editable mlp_ext's, are not.
    (site / "torch_of_the_present_environment.pth").write_text("\n".join(SITE_PACKAGES))
    return python


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert csrc
    assert csrc <= names
    assert {"setup.py", "VERSION", "LICENSE", "README.md", "mlp_ext/py.typed"} <= names
    assert not {name for name in names if name.endswith(".so")} | ({"mlp_ext/_built.py"} & names)


def test_sdist_holds_its_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {p for p in ROOT.glob("tests/**/*") if p.is_file() and "__pycache__" not in p.parts}
    used = {"Makefile", "CONTRIBUTING.md", "pyproject.toml", "benchmarks/conftest.py"}
    assert Path(__file__) in files
    assert {str(p.relative_to(ROOT)) for p in files} | used <= names


@pytest.mark.slow
@pytest.mark.release
def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mlp_ext/py.typed", "mlp_ext/_C.pyi", "mlp_ext/_built.py"} <= {*names}
    assert [n for n in names if n.startswith("mlp_ext/_C.") and n.endswith(".so")]
    assert not [n for n in names if not n.startswith(("mlp_ext/", "mlp_ext-"))]


@pytest.mark.slow
@pytest.mark.release
def test_install_from_sdist_computes_in_a_fresh_environment(python: Path, tmp_path: Path) -> None:
    code = """
import torch, mlp_ext
x, layer = torch.randn(64, 10), mlp_ext.LinearReLU(10, 5)
z = torch.nn.functional.linear(x, layer.weight, layer.bias)
torch.testing.assert_close(layer(x), torch.relu(z))
print(mlp_ext.__file__, mlp_ext.__version__)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    file, version = checked(python, "-c", code, cwd=tmp_path, env=env).split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == mlp_ext.__version__ == (ROOT / "VERSION").read_text().strip()
    script = python.parent / "mlp-ext"
    assert script.read_text().startswith(f"#!{python}")
    for command in ([script], [python, "-m", "mlp_ext"]):
        info = json.loads(checked(*command, "info", "--json", cwd=tmp_path, env=env))
        assert (info["mlp_ext"], info["instruction_set"]) == (version, _C.instruction_set())
    train = ["train", "--layers", "fused", "--data", "seed", "--epochs", "2"]
    assert "epoch: 1 loss: 0." in checked(script, *train, cwd=tmp_path, env=env)


@pytest.mark.parametrize(
    ("wish", "message"),
    [("1", "MLP_EXT_CUDA=1 needs"), ("maybe", "MLP_EXT_CUDA must be auto, 0 or 1, got 'maybe'")],
)
def test_wish_for_cuda_that_cannot_be_met_is_an_error(wish: str, message: str) -> None:
    env = {**os.environ, "MLP_EXT_CUDA": wish, "CUDA_HOME": "/nonexistent"}
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, env=env)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


TORCH_WITH_CUDA = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
"""


def with_toolkit(folder: Path, version: str, **variables: str) -> dict[str, str]:
    """Pretends: torch has CUDA 13.0, and in `folder` is a toolkit, which nvcc on PATH calls."""
    major, minor = version.split(".")
    told = f"#$ _HERE_={folder}/toolkit/bin\n#$ cicc -D__CUDACC_VER_MAJOR__={major} "
    told += f"-D__CUDACC_VER_MINOR__={minor}"
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\ncat >&2 <<.\n{told}\n.\n")
    nvcc.chmod(0o755)
    (folder / "sitecustomize.py").write_text(TORCH_WITH_CUDA)
    gone = {"CUDA_HOME", "CUDA_PATH", "CUTLASS_HOME", "TORCH_CUDA_ARCH_LIST"}
    env = {name: value for name, value in os.environ.items() if name not in gone}
    env["PATH"] = f"{nvcc.parent}{os.pathsep}{env['PATH']}"
    return {**env, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", **variables}


def extension(env: dict[str, str]) -> dict[str, Any]:
    """What setup.py would compile."""
    code = """
import json
from distutils.core import run_setup
from torch.utils import cpp_extension
(e,) = run_setup("setup.py", stop_after="init").ext_modules
macros = dict(e.define_macros)
nvcc, link = e.extra_compile_args["nvcc"], e.extra_link_args
print(json.dumps([e.sources, nvcc, link, macros, cpp_extension.CUDA_HOME]))
"""
    told = checked(sys.executable, "-c", code, cwd=ROOT, env=env).strip().splitlines()
    keys = ("sources", "nvcc", "link", "macros", "CUDA_HOME")
    return {"told": told[:-1], **dict(zip(keys, json.loads(told[-1]), strict=True))}


def test_toolkit_of_another_major_version_is_refused(tmp_path: Path) -> None:
    env = with_toolkit(tmp_path, "12.8")
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, env=env)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert "built with CUDA 13.0" in message
    assert f"toolkit in {tmp_path}/toolkit is 12.8" in message
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("8.0 9.0", ["sm_80", "sm_90a"]),
        ("8.6", ["sm_86"]),
        ("Hopper", ["sm_90a", "compute_90"]),
    ],
)
def test_cuda_is_compiled_for_the_architectures_asked_for(
    tmp_path: Path, archs: str, codes: list[str]
) -> None:
    found = extension(with_toolkit(tmp_path, "13.1", TORCH_CUDA_ARCH_LIST=archs))
    flags = {flag.rpartition("=")[2] for flag in found["nvcc"] if "gencode" in flag}
    assert flags == {*codes}
    assert found["CUDA_HOME"] == f"{tmp_path}/toolkit"
    assert "csrc/cuda/linear_act.cpp" in found["sources"]


def test_cutlass_is_found_by_its_variable_and_missed_aloud(tmp_path: Path) -> None:
    header = tmp_path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    env = with_toolkit(tmp_path, "13.0", CUTLASS_HOME=str(tmp_path))
    found = extension(env)
    assert found["macros"]["MLP_EXT_CUTLASS"] == "1"
    assert str(tmp_path / "include") in found["nvcc"]
    assert "csrc/cuda/sm90.cu" in found["sources"]

    wrong = run(
        sys.executable, "setup.py", "--version", cwd=ROOT, env={**env, "CUTLASS_HOME": "/nowhere"}
    )
    assert wrong.returncode != 0
    assert "set CUTLASS_HOME" in wrong.stderr
    assert "Traceback" not in wrong.stderr

    with (tmp_path / "sitecustomize.py").open("a") as site:
        site.write("import sys; sys.modules['cutlass_library'] = None\n")
    none = extension({**env, "CUTLASS_HOME": ""})
    assert none["macros"]["MLP_EXT_CUTLASS"] == "0"
    assert "csrc/cuda/sm90.cu" not in none["sources"]
    assert any("no CUTLASS" in line for line in none["told"])


def test_messages_are_whole_where_libstdcxx_is_linked_statically(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    if not Path(checked(*compiler, "-print-file-name=libstdc++.a").strip()).is_absolute():
        pytest.skip("this compiler brings no libstdc++.a")
    source, library = tmp_path / "message.cpp", tmp_path / "message.so"
    source.write_text("""#include <sstream>
extern "C" size_t length() {
  std::ostringstream out;
  out << "got " << 1234;
  return out.str().size();
}
""")
    flags = ["-shared", "-fPIC", "-static-libstdc++", *extension({**os.environ})["link"]]
    checked(*compiler, source, "-o", library, *flags)
    code = f"import torch, ctypes; print(ctypes.CDLL({str(library)!r}).length())"
    assert int(checked(sys.executable, "-c", code)) == len("got 1234")


@pytest.mark.parametrize("wish", ["0", "auto"])
def test_no_toolkit_is_no_obstacle(wish: str) -> None:
    env = {**os.environ, "MLP_EXT_CUDA": wish, "CUDA_HOME": "/nonexistent"}
    assert checked(sys.executable, "setup.py", "--version", cwd=ROOT, env=env).strip()


def test_without_ninja_nothing_compiled_for_another_torch_is_kept() -> None:
    code = """
from setuptools import setup
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="init").get_command_obj("build_ext")
command.ensure_finalized()
print(command.use_ninja, command.force)
"""
    env = {**os.environ, "PATH": "/nonexistent"}
    assert checked(sys.executable, "-c", code, cwd=ROOT, env=env).split() == ["False", "True"]


def test_build_without_torch_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, env=env)
    assert result.returncode != 0
    assert "pip install torch" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def installed_copy(folder: Path, *leave_out: str) -> dict[str, str]:
    """For `python -S`, where no editable install is found: mlp_ext is a copy of the present one."""
    ignored = shutil.ignore_patterns(*leave_out, "*.pyc")
    shutil.copytree(Path(mlp_ext.__file__).parent, folder / "mlp_ext", ignore=ignored)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), *SITE_PACKAGES))}


def test_torch_of_another_minor_version_is_refused(tmp_path: Path) -> None:
    env = installed_copy(tmp_path)
    built = tmp_path / "mlp_ext" / "_built.py"
    built.write_text(built.read_text().replace(torch.__version__, "2.9.1+cpu"))
    result = run(sys.executable, "-S", "-c", "import mlp_ext", env=env, cwd=tmp_path)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: mlp_ext was built against torch 2.9.1+cpu, but torch ")
    assert torch.__version__ in message
    assert "pip install --no-build-isolation" in message


@pytest.mark.parametrize("missing", ["_C.*.so", "_built.py"])
def test_missing_compiled_part_is_told(tmp_path: Path, missing: str) -> None:
    env = installed_copy(tmp_path, missing)
    result = run(sys.executable, "-S", "-c", "import mlp_ext", env=env, cwd=tmp_path)
    assert "ImportError: mlp_ext is here, but its compiled part is not" in result.stderr


def test_parallel_for_is_parallel() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _C.parallel_for_threads() == 2
        torch.set_num_threads(1)
        assert _C.parallel_for_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_every_operator_has_a_cuda_kernel_where_cuda_is_built_in() -> None:
    names = torch._C._dispatch_get_all_op_names()
    operators = {name for name in names if name.startswith("mlp_ext::")}
    loops = {"mlp_ext::mlp", "mlp_ext::_mlp_forward", "mlp_ext::_mlp_backward"}  # of the others
    assert {"mlp_ext::linear_act", "mlp_ext::_linear_act_backward"} | loops <= operators
    for name in operators - loops:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert has == (mlp_ext.build_info()["cuda"] is not None)


def test_build_info_tells_versions_and_instruction_sets() -> None:
    info = mlp_ext.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["mlp_ext"] == mlp_ext.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["threads"] == torch.get_num_threads()
