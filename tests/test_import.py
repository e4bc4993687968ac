"""What `import mlp_ext` says of a build that does not fit, and what build_info tells of it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import in_forks
from test_build import ROOT, SITE_PACKAGES, run

import mlp_ext
from mlp_ext import _C


def installed_copy(folder: Path, *leave_out: str) -> dict[str, str]:
    """For `python -S`, where no editable install is found: mlp_ext is a copy of the present one."""
    ignored = shutil.ignore_patterns(*leave_out, "*.pyc")
    shutil.copytree(Path(mlp_ext.__file__).parent, folder / "mlp_ext", ignore=ignored)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), *SITE_PACKAGES))}


def errors_of_imports(folder: Path, *changes: Callable[[Path], object]) -> list[str]:
    """What `import mlp_ext` raises, of a copy for each of the changes."""
    env, cases = {}, []
    for i, change in enumerate(changes):
        env = installed_copy(folder / str(i))
        change(folder / str(i) / "mlp_ext")
        cases.append({"FOLDER": str(folder / str(i))})
    code = "sys.path.insert(0, os.environ['FOLDER']); import mlp_ext"
    return in_forks(code, cases, "-S", env=env, cwd=folder)


def edited(change: Callable[[str], str]) -> Callable[[Path], object]:
    def edit(package: Path) -> None:
        built = package / "_built.py"
        built.write_text(change(built.read_text()))

    return edit


def test_torch_of_another_minor_version_is_refused(tmp_path: Path) -> None:
    other = edited(lambda text: text.replace(torch.__version__, "2.9.1+cpu"))
    message = errors_of_imports(tmp_path, other)[0].splitlines()[-1]
    assert message.startswith("ImportError: mlp_ext was built against torch 2.9.1+cpu, but torch ")
    assert torch.__version__ in message
    assert "pip install --no-build-isolation" in message


@pytest.mark.slow
def test_torch_without_the_cuda_of_the_build_is_refused(tmp_path: Path) -> None:
    says = {
        ("13.0", None): "is without CUDA",
        ("12.8", "13.0"): "has CUDA 13.0",
        ("13.2", "13.0"): None,
        (None, "13.0"): None,
    }
    changes = [
        f"CUDA_VERSION = {built!r}\nimport torch\ntorch.version.cuda = {running!r}\n"
        for built, running in says
    ]
    found = errors_of_imports(tmp_path, *(edited(lambda text, s=s: text + s) for s in changes))
    for (built, running), error in zip(says, found, strict=True):
        expected = says[built, running]
        if expected is None:
            assert error == ""
            continue
        message = error.splitlines()[-1]
        assert message.startswith(f"ImportError: mlp_ext was built for CUDA {built}, but")
        assert expected in message
        assert "pip install --no-build-isolation" in message


def compiled_part(package: Path) -> Path:
    (module,) = package.glob("_C.*.so")
    return module


@pytest.mark.slow
def test_missing_or_broken_compiled_part_is_told(tmp_path: Path) -> None:
    other = "_C.cpython-399-x86_64-linux-gnu.so"
    without_c, without_built, of_another_python, empty = errors_of_imports(
        tmp_path,
        lambda package: compiled_part(package).unlink(),
        lambda package: (package / "_built.py").unlink(),
        lambda package: compiled_part(package).rename(package / other),
        lambda package: compiled_part(package).write_bytes(b""),
    )
    for i, missing in enumerate((without_c, without_built)):
        told = f"ImportError: mlp_ext is in {tmp_path}/{i}/mlp_ext, but its compiled part is not"
        assert told in missing
    assert f"compiled for another Python ({other})" in of_another_python
    assert "ImportError: mlp_ext's compiled part does not load beside torch" in empty
    assert len(re.findall("Error: ", empty)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_source_folder_in_the_way_is_told(tmp_path: Path, installed: bool) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    installed_copy(clone, "_C.*.so", "_built.py")
    (clone / "setup.py").touch()
    env = installed_copy(site) if installed else {**os.environ, "PYTHONPATH": ""}
    env["PYTHONPATH"] += os.pathsep.join(("", *SITE_PACKAGES))
    result = run(sys.executable, "-S", "-m", "mlp_ext", "info", env=env, cwd=clone)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: this is mlp_ext's source folder, {clone}/mlp_ext, ")
    assert "`pip install --no-build-isolation -e .`" in message
    assert (f"hides the installed package in {site}: leave the folder" in message) == installed


@pytest.mark.slow
def test_no_numpy_no_noise(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['numpy'] = None")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    result = run(sys.executable, "-m", "mlp_ext", "info", env=env, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""


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
    update = "mlp_ext::mlp_train_update_"  # on a GPU a composite of PyTorch's operations
    renamed = "mlp_ext::mlp_sgd_step_"  # raises its new name
    for name in operators - loops - {update, renamed}:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert has == (mlp_ext.build_info()["cuda"] is not None)


def test_build_info_tells_versions_and_instruction_sets() -> None:
    info = mlp_ext.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["mlp_ext"] == mlp_ext.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["threads"] == torch.get_num_threads()
