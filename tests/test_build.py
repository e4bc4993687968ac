"""Building and installing: what sdist and wheel hold, and what a build that fails says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_forks
from packaging.requirements import Requirement

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
    folders = (".ci", "benchmarks", "csrc", "docs", "examples", "mlp_ext", "mlp_ext_cli", "tests")
    for name in folders:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"):
        shutil.copy(path, folder)
    return folder


def make_sdist(tree: Path) -> Path:
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    checked(sys.executable, "-c", build, cwd=tree, env=env)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    return archive


def unpack(sdist: Path, folder: Path) -> Path:
    checked("tar", "-xzf", sdist, "-C", folder)  # Python's own warns, or knows no filter
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(copy_tree(tmp_path_factory.mktemp("tree")))


def make_wheel(tree: Path) -> Path:
    checked("make", "wheel", "--old-file=.venv/tools", cwd=tree)
    (archive,) = (tree / "dist").glob("*.whl")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the sdist alone, with the tools here; the one compilation of this file."""
    tree = unpack(sdist, tmp_path_factory.mktemp("wheel"))
    (tree / ".venv").symlink_to(sys.prefix)
    return make_wheel(tree)


def link_torch(folder: Path) -> None:
    """torch and what it requires, and nothing else that is installed here."""
    names, found = ["torch"], set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        required = map(Requirement, metadata.requires(name) or [])
        names += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    for distribution in map(metadata.distribution, found):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, torch and what torch requires."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(checked(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # --python, so that the script mlp-ext starts this environment's interpreter.
    flags = ["install", "--no-deps", "--no-index"]
    checked(sys.executable, "-m", "pip", "--python", python, *flags, wheel)
    link_torch(site)
    return python


def test_every_folder_is_a_package() -> None:
    """Others are left out where mlp_ext is installed rather than linked."""
    folders = {path.parent for path in (ROOT / "mlp_ext").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.slow
def test_sdist_holds_the_repository_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "LICENSE", "Makefile", "csrc/python/module.cpp"} <= names
    assert not {name for name in names if name.endswith(".so")} | ({"mlp_ext/_built.py"} & names)
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("this is no clone")
    assert {*listed.stdout.splitlines()} - names == set()


@pytest.mark.slow
def test_sdist_of_a_sdist_is_the_same(sdist: Path, tmp_path: Path) -> None:
    """In another folder and at another time."""
    assert make_sdist(unpack(sdist, tmp_path)).read_bytes() == sdist.read_bytes()


@pytest.mark.release
def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mlp_ext/py.typed", "mlp_ext/_C.pyi", "mlp_ext/_built.py"} <= {*names}
    assert "mlp_ext_cli/__init__.py" in names
    assert [n for n in names if n.startswith("mlp_ext/_C.") and n.endswith(".so")]
    assert not [n for n in names if not n.startswith(("mlp_ext/", "mlp_ext_cli/", "mlp_ext-"))]


@pytest.mark.release
def test_wheel_does_not_depend_on_time_and_folder(wheel: Path) -> None:
    first = wheel.read_bytes()
    assert make_wheel(wheel.parents[1]).read_bytes() == first
    if {*_C.build_info()["instruction_sets"]} < {"generic", "avx2", "avx512"}:
        pytest.skip("the module here is for fewer instruction sets")
    name = Path(_C.__file__).name
    assert zipfile.ZipFile(wheel).read(f"mlp_ext/{name}") == Path(_C.__file__).read_bytes()


@pytest.mark.release
def test_wheel_computes_in_a_fresh_environment(python: Path, tmp_path: Path) -> None:
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
    assert version == mlp_ext.__version__
    script = python.parent / "mlp-ext"
    assert script.read_text().startswith(f"#!{python}")
    for command in ([script], [python, "-m", "mlp_ext"]):
        info = json.loads(checked(*command, "info", "--json", cwd=tmp_path, env=env))
        assert (info["mlp_ext"], info["instruction_set"]) == (version, _C.instruction_set())
    train = ["train", "--layers", "fused", "--data", "tutorial", "--epochs", "2"]
    assert "epoch: 1 loss: 0." in checked(script, *train, cwd=tmp_path, env=env)


BUILD = (sys.executable, "setup.py", "build_ext", "--help")  # all but the compilation
SETUP = """
import runpy
sys.argv = ["setup.py", "build_ext", "--help"]
names = runpy.run_path("setup.py")
e = names["extension"]
print()
print(json.dumps({
    "sources": e.sources,
    "cxx": e.extra_compile_args["cxx"],
    "nvcc": e.extra_compile_args["nvcc"],
    "link": e.extra_link_args,
    "macros": dict(e.define_macros),
    "CUDA_HOME": names["cpp_extension"].CUDA_HOME,
}))
"""
TORCH_WITH_CUDA = """
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: "GPU" in os.environ
torch.cuda.device_count = lambda: 1
torch.cuda.get_arch_list = lambda: ["sm_90"]
torch.cuda.get_device_capability = lambda *_: (9, 0)
sys.modules["cutlass_library"] = None
"""


def with_toolkit(folder: Path, version: str) -> dict[str, str]:
    """In `folder` is a toolkit, which nvcc on PATH calls."""
    major, minor = version.split(".")
    told = f"#$ _HERE_={folder}/toolkit/bin\n#$ cicc -D__CUDACC_VER_MAJOR__={major} "
    told += f"-D__CUDACC_VER_MINOR__={minor}"
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\ncat >&2 <<.\n{told}\n.\n")
    nvcc.chmod(0o755)
    gone = {"CUDA_HOME", "CUDA_PATH", "CUTLASS_HOME", "TORCH_CUDA_ARCH_LIST", "MLP_EXT_CUDA"}
    env = {name: value for name, value in os.environ.items() if name not in gone}
    env["PATH"] = f"{nvcc.parent}{os.pathsep}{env['PATH']}"
    return {**env, "CUDA_VISIBLE_DEVICES": ""}


def extensions(
    cases: Iterable[dict[str, str]], env: dict[str, str], torch: str = TORCH_WITH_CUDA
) -> list[Any]:
    """What setup.py would compile with each case's variables, or why it exits."""
    env = env | {"PYTHONPATH": os.pathsep.join(SITE_PACKAGES)}
    last = [
        told.splitlines()[-1] for told in in_forks(torch + SETUP, cases, "-S", cwd=ROOT, env=env)
    ]
    return [told if told.startswith("SystemExit: ") else json.loads(told) for told in last]


@pytest.mark.slow
def test_wishes_for_cuda_where_there_is_none() -> None:
    cases = [{"MLP_EXT_CUDA": wish} for wish in ("1", "maybe", "0", "auto")]
    env = {**os.environ, "CUDA_HOME": "/nonexistent"}
    unmet, unknown, *others = extensions(cases, env, torch="")
    assert unmet.startswith("SystemExit: MLP_EXT_CUDA=1 needs")
    assert unknown == "SystemExit: MLP_EXT_CUDA must be auto, 0 or 1, got 'maybe'"
    assert all(other["sources"] for other in others)


@pytest.mark.slow
def test_toolkit_of_another_major_version_is_refused(tmp_path: Path) -> None:
    (message,) = extensions([{"MLP_EXT_CUDA": "1"}], with_toolkit(tmp_path, "12.8"))
    assert message.startswith("SystemExit: torch ")
    assert "built with CUDA 13.0" in message
    assert f"toolkit in {tmp_path}/toolkit is 12.8" in message


@pytest.mark.slow
def test_cuda_is_compiled_for_the_architectures_asked_for(tmp_path: Path) -> None:
    codes = {
        "": ["sm_80", "sm_90a", "compute_90"],
        "8.0 9.0": ["sm_80", "sm_90a"],
        "8.6": ["sm_86"],
        "Hopper": ["sm_90a", "compute_90"],
    }
    cases = [{"TORCH_CUDA_ARCH_LIST": archs, "MLP_EXT_CUDA": "1"} for archs in codes]
    for archs, found in zip(codes, extensions(cases, with_toolkit(tmp_path, "13.1")), strict=True):
        flags = {flag.rpartition("=")[2] for flag in found["nvcc"] if "gencode" in flag}
        assert flags == {*codes[archs]}, archs
        assert found["CUDA_HOME"] == f"{tmp_path}/toolkit"
        assert "csrc/cuda/launch/small.cu" in found["sources"]


@pytest.mark.slow
def test_cutlass_is_found_by_its_variable(tmp_path: Path) -> None:
    header = tmp_path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    cases = [{"CUTLASS_HOME": home} for home in (str(tmp_path), "/nowhere", "")]
    env = with_toolkit(tmp_path, "13.0") | {"MLP_EXT_CUDA": "1"}
    found, wrong, none = extensions(cases, env)
    assert found["macros"]["MLP_EXT_CUTLASS"] == "1"
    assert str(tmp_path / "include") in found["nvcc"]
    assert "csrc/cuda/sm90/sm90.cu" in found["sources"]
    assert wrong.startswith("SystemExit: ")
    assert "set CUTLASS_HOME" in wrong
    assert none["macros"]["MLP_EXT_CUTLASS"] == "0"
    assert "csrc/cuda/sm90/sm90.cu" not in none["sources"]


@pytest.mark.slow
def test_auto_builds_cuda_where_a_gpu_or_architectures_are_named(tmp_path: Path) -> None:
    cases = [{}, {"TORCH_CUDA_ARCH_LIST": "9.0"}, {"GPU": "pretended"}]
    found = extensions(cases, with_toolkit(tmp_path, "13.1"))
    built = ["csrc/cuda/launch/small.cu" in extension["sources"] for extension in found]
    assert built == [False, True, True]  # torch and toolkit alone do not ask for it


ARM = """
import platform
platform.machine = lambda: "aarch64"
torch.backends.cpu.get_cpu_capability = lambda: "SVE256"
"""


@pytest.mark.slow
def test_arm_gets_the_generic_kernels_without_flags_for_x86() -> None:
    cases = [{"MLP_EXT_CUDA": "0", "MLP_EXT_ISA": wish} for wish in ("all", "native")]
    for found in extensions(cases, {**os.environ}, torch=ARM):
        assert found["macros"]["MLP_EXT_TARGETS(DO)"] == "DO(generic)"
        targets = {Path(s).name for s in found["sources"] if s.startswith("csrc/cpu/targets/")}
        assert targets == {p.name for p in (ROOT / "csrc/cpu/targets").glob("generic_*.cpp")}
        assert not [flag for flag in found["cxx"] if flag.startswith("-m")]


@pytest.mark.slow
def test_messages_are_whole_where_libstdcxx_is_linked_statically(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    if not Path(checked(*compiler, "-print-file-name=libstdc++.a").strip()).is_absolute():
        pytest.skip("this compiler brings no libstdc++.a")
    source, library = tmp_path / "message.cpp", tmp_path / "message.so"
    source.write_text("""#include <sstream>
extern "C" size_t PyInit__C() {
  std::ostringstream out;
  out << "got " << 1234;
  return out.str().size();
}
""")
    (ours,) = extensions([{}], {**os.environ}, torch="")
    flags = ["-shared", "-fPIC", "-static-libstdc++", *ours["link"]]
    checked(*compiler, source, "-o", library, *flags)
    code = f"import torch, ctypes; print(ctypes.CDLL({str(library)!r}).PyInit__C())"
    assert int(checked(sys.executable, "-c", code)) == len("got 1234")


@pytest.mark.slow
def test_without_ninja_nothing_compiled_for_another_torch_is_kept() -> None:
    code = """
from setuptools import setup
from distutils.core import run_setup
command = run_setup("setup.py", ["build_ext"], stop_after="init").get_command_obj("build_ext")
command.ensure_finalized()
print(command.use_ninja, command.force)
"""
    env = {**os.environ, "PATH": "/nonexistent", "CXX": shutil.which("c++") or "/bin/true"}
    assert checked(sys.executable, "-c", code, cwd=ROOT, env=env).split() == ["False", "True"]


def build_with(folder: Path, code: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --help` after `code`, in an interpreter of its own."""
    (folder / "sitecustomize.py").write_text(code)
    return run(*BUILD, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder), **variables})


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    return line


NO_TORCH = """
import sys
from importlib import metadata
sys.modules["torch"] = None
found = metadata.version
def version(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
"""


def other_torch(version: str) -> str:
    """Code that makes setup.py find another version of torch, which cannot be imported."""
    code = "from importlib import metadata; import sys; found = metadata.version\n"
    code += f"metadata.version = lambda n: {version!r} if n == 'torch' else found(n)\n"
    return code + "sys.modules['torch'] = None\n"


TAKEN = "torch is installed, but cannot be imported"


def supported() -> list[str]:
    """The minor versions of torch that pyproject.toml names."""
    oldest, end = re.findall(r'"torch>=2\.(\d+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text())[
        0
    ]
    return [f"2.{minor}" for minor in range(int(oldest), int(end))]


def test_build_without_torch_says_what_to_type(tmp_path: Path) -> None:
    line = one_line(build_with(tmp_path, NO_TORCH))
    assert "pip install torch" in line
    assert "pip install --no-build-isolation ." in line


@pytest.mark.slow
def test_sdist_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    tree = copy_tree(tmp_path / "tree")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import setuptools.build_meta as b; b.get_requires_for_build_wheel(); b.build_sdist('.')"
    checked(sys.executable, "-c", code, cwd=tree, env=env)
    (archive,) = tree.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        info = files.extractfile(f"{archive.name[: -len('.tar.gz')]}/PKG-INFO")
        assert info is not None
        text = info.read().decode()
    assert f"Requires-Dist: torch<2.{int(supported()[-1][2:]) + 1},>={supported()[0]}" in text


@pytest.mark.parametrize("version", ["2.10.0", "2.99.0", "3.0.0+cu140"])
def test_torch_out_of_range_is_refused_by_the_build(tmp_path: Path, version: str) -> None:
    line = one_line(build_with(tmp_path, other_torch(version)))
    assert f"is for torch {supported()[0]} to {supported()[-1]}, and {version} is installed" in line
    assert "pip install" in line
    any_torch = build_with(tmp_path, other_torch(version), MLP_EXT_ANY_TORCH="1")
    assert one_line(any_torch).startswith(TAKEN)


def test_range_of_torch_is_the_same_everywhere(tmp_path: Path) -> None:
    for minor in supported():
        found = build_with(tmp_path, other_torch(f"{minor}.0+cpu"))
        assert one_line(found).startswith(TAKEN)
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    told = [found for p in pages for found in re.findall(r"2\.\d+ to 2\.\d+", p.read_text())]
    assert {*told} == {f"{supported()[0]} to {supported()[-1]}"}


@pytest.mark.slow
def test_metadata_names_the_torch_that_it_was_built_against(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    code = "import setuptools.build_meta as b; "
    for kind in ("wheel", "editable"):
        (tree / kind).mkdir()
        code += f"b.prepare_metadata_for_build_{kind}({kind!r}); "
    checked(sys.executable, "-c", code, cwd=tree, env={**os.environ, "MLP_EXT_CUDA": "0"})
    minor = ".".join(torch.__version__.split(".")[:2])
    for kind in ("wheel", "editable"):
        (path,) = tree.glob(f"{kind}/*.dist-info/METADATA")
        lines = path.read_text().splitlines()
        (version,) = (line for line in lines if line.startswith("Version: "))
        assert version.endswith(f"+torch{minor}")
        assert [n for n in lines if n.startswith("Requires-Dist: torch")] == [
            f"Requires-Dist: torch=={minor}.*"
        ]


def test_build_without_a_compiler_says_what_to_type(tmp_path: Path) -> None:
    assert "no-such-c++ is not found: install g++" in one_line(
        build_with(tmp_path, CXX="no-such-c++ -m64")
    )


def test_build_in_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    code = "import os; os.access = lambda *_: False"
    assert "read-only: copy the folder" in one_line(build_with(tmp_path, code))
