"""Fixtures that every test file may use."""

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from once import Once, once_in
from steps import Training, training
from torch.utils import deterministic

from mlp_ext import _C, TrainStep
from mlp_ext_cli import main

# They need packages of their own: `make clients`.
collect_ignore = [] if find_spec("stable_baselines3") else ["clients"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run under each instruction set the processor has")
    # For child processes. Without it, waiting threads spin on the cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(config, "workerinput"):  # pytest-xdist's workers have one thread each
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for their child processes
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Once:
    folder = tmp_path_factory.getbasetemp()
    is_worker = hasattr(pytestconfig, "workerinput")
    return once_in(tmp_path_factory, folder.parent if is_worker else folder)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one while a test runs; in it are a folder and a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("before")
    return tmp_path


@pytest.fixture
def assert_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str, str], None]:
    """That mlp-ext prints one line, an error that begins with the message, and writes nothing."""

    def run(command: str, args: str, message: str) -> None:
        if "--plot" in args:
            pytest.importorskip("matplotlib")
        assert main([command, *args.split()]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"mlp-ext {command}: error: {message}")
        assert (out, err.count("\n")) == ("", 1)
        assert {path.name for path in folder.iterdir()} == {"folder", "file"}
        assert (folder / "file").read_text() == "before"

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors in the hundreds: threads would only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3], ids=["1thread", "3threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, and a number of them that cuts most shapes unevenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def zen4() -> Iterator[None]:
    """The limits of one machine, so that the same shapes take the same paths on all."""
    modes = ("fma", "converted", "bf16_dot", "amx")
    _C.use_machine({mode: _C.machine("zen4")[mode] for mode in modes})
    yield
    _C.use_machine(None)


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """gc.collect() passes over what is there already, which takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def on_cuda() -> Iterator[None]:
    """Tensors are made on the GPU where nothing else is said."""
    with torch.device("cuda"):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh buffers hold NaN, so that an element nobody writes cannot pass for a result."""
    before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


@pytest.fixture
def part() -> Iterator[Training]:
    """A training whose state the test must leave as it was."""
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    TrainStep(*part[:3])(*part[3:])
    before = part.state()
    yield part
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)
