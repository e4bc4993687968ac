"""Limits of machines: well formed, each path reachable, and right on both sides of each limit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from references import assert_matches_native
from shapes import Shape, grad_output, operands

import mlp_ext
from mlp_ext import _C
from mlp_ext.machine import use_file

MACHINES = _C.machines()
DTYPES = {  # as multiplied, its bytes, and its DotMode
    "fma": (4, "fma"),
    "converted": (2, "fma"),
    "bf16_dot": (2, "bf16_dot"),
    "amx": (2, "amx"),
}
NEVER = 2**62
FLOAT = 4  # bytes


@pytest.fixture
def own_machine() -> Iterator[None]:
    yield
    _C.use_machine(None)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_has_all_limits(machine: str) -> None:
    limits = _C.machine(machine)
    assert limits["name"] == machine
    assert set(limits) == {"name", "bfloat16", *DTYPES}
    for mode in DTYPES:
        assert limits[mode].keys() == limits["fma"].keys()


@pytest.mark.parametrize("machine", MACHINES)
def test_limits_are_within_their_ranges(machine: str, own_machine: None) -> None:
    """use_machine checks each range; also limits that depend on one another."""
    limits = _C.machine(machine)
    _C.use_machine(limits)
    assert _C.machine() == limits
    for mode in DTYPES:
        table = limits[mode]
        assert table["block_bytes"] == 0 or table["block_bytes"] >= 2**18
        assert table["library_multiply_adds"] > table["small_multiply_adds"]


SIZES = (1, 2, 5, 16, 33, 64, 128, 512, 1024, 4096)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_each_path_is_reachable(machine: str, mode: str) -> None:
    item_size, dot_mode = DTYPES[mode]
    found: dict[str, set[str]] = {"forward_path": set(), "backward_path": set()}
    for M, K, N in product((*SIZES, 65536), SIZES, SIZES):
        plan = _C.plan(M, K, N, item_size, 2, mode=dot_mode, machine=machine)
        for which, paths in found.items():
            paths.add(plan[which])
    table = _C.machine(machine)[mode]
    library = {"library"} if table["library_multiply_adds"] < NEVER else set()
    library |= {"amx"} if mode == "amx" else set()
    assert found["forward_path"] == {"small", "dots", "narrow", "one_input", "packed"} | library
    own = {"small", "narrow", "tall", "one_input", "one_output", "few_rows", "packed"}
    assert found["backward_path"] in (own | library, own - {"packed"} | library)


# A shape for each path, and one whose columns need a second block of packed B.
SHAPES = [
    Shape((3,), 40, 33),
    Shape((5,), 100, 3),
    Shape((300,), 64, 31),
    Shape((70,), 1, 17),
    Shape((65,), 33, 1),
    Shape((20,), 24, 1100),
    Shape((8,), 1, 2500),
    Shape((501,), 1, 5),
    Shape((700,), 5, 7),
    Shape((133,), 16, 2),
    Shape((133,), 3, 16),
    Shape((3,), 700, 150),  # two threads split the rows of W
    Shape((4,), 1500, 70),  # or its columns
]
FORWARD = ("small", "dots", "narrow", "one_input", "packed", "library")
BACKWARD = (
    "small",
    "narrow",
    "tall",
    "one_input",
    "one_output",
    "few_rows",
    "packed",
    "library",
)


@pytest.fixture(params=[*((f, None) for f in FORWARD), *((None, b) for b in BACKWARD)], ids=str)
def forced(request: pytest.FixtureRequest) -> Iterator[tuple[str | None, str | None]]:
    _C.force_paths(*request.param)
    yield request.param
    _C.force_paths(None, None)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_path_is_right_wherever_it_is_supported(
    forced: tuple[str | None, str | None], dtype: torch.dtype, own_machine: None
) -> None:
    _C.use_machine({"fma": {"block_bytes": 2**17}, "converted": {"block_bytes": 2**17}})
    ran = 0
    for shape in SHAPES:
        M = torch.Size(shape.leading).numel()
        asked = dict(zip(("forward", "backward"), forced, strict=True))
        mode = "bf16_dot" if dtype == torch.bfloat16 else "fma"
        plan = _C.plan(M, shape.K, shape.N, dtype.itemsize, 1, mode=mode, **asked)
        if forced not in ((plan["forward_path"], None), (None, plan["backward_path"])):
            continue
        ran += 1
        for activation in ("relu", "silu"):
            assert_matches_native(operands(shape, dtype), activation, grad_output(shape, dtype))
    assert ran


def test_paths_are_forced_in_one_thread_alone() -> None:
    """Random operands: the two paths add up in another order."""
    x, w = torch.randn(300, 600), torch.randn(31, 600)
    expected = mlp_ext.linear_relu(x, w)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_C.force_paths, "dots", None).result()
        assert torch.equal(mlp_ext.linear_relu(x, w), expected)
        assert not torch.equal(pool.submit(mlp_ext.linear_relu, x, w).result(), expected)


WRONG = {
    '{"fma": {"dot_rows": 16}': "not JSON",
    '["fma"]': "must hold an object",
    "[" * 100_000: "not JSON",
    '{"fmaa": {}}': "expected name, bfloat16, fma, converted, bf16_dot or amx, got 'fmaa'",
    '{"fma": {"dots": 1}}': "fma has no limit 'dots'",
    '{"fma": {"dot_rows": -1}}': r"fma.dot_rows must be a whole number from 0 to \d+, got -1",
    '{"fma": {"dot_rows": "many"}}': "fma.dot_rows must be a whole number",
    '{"fma": {"dot_rows": 1.5}}': "fma.dot_rows must be a whole number",
    '{"fma": {"dot_rows": true}}': "fma.dot_rows must be a whole number",
    f'{{"fma": {{"dot_rows": {2**64}}}}}': f"fma.dot_rows must be a whole number .*, got {2**64}",
    '{"fma": 3}': "fma must be an object",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_a_broken_file_is_one_line_and_changes_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    before = _C.machine()
    with pytest.warns(UserWarning, match=WRONG[text]) as warned:
        use_file(str(path))
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert _C.machine() == before


def test_a_missing_file_is_one_line() -> None:
    with pytest.warns(UserWarning, match="MLP_EXT_MACHINE: cannot read 'nowhere.json'"):
        use_file("nowhere.json")


def test_a_file_changes_what_it_names(tmp_path: Path, own_machine: None) -> None:
    before = _C.machine()
    path = tmp_path / "machine.json"
    path.write_text('{"name": "laptop", "fma": {"dot_rows": 40}}')
    use_file(str(path))
    after = _C.machine()
    assert after["name"] == "laptop" == mlp_ext.build_info()["machine"]
    assert after["fma"] == before["fma"] | {"dot_rows": 40}
    assert after["bf16_dot"] == before["bf16_dot"]
    assert _C.plan(40, 50, 60, 4, 1)["forward_path"] == "dots"
    assert _C.plan(41, 50, 60, 4, 1)["forward_path"] == "packed"


def test_limits_that_are_not_named_are_those_of_this_processor(own_machine: None) -> None:
    detected = _C.machine()["fma"]
    _C.use_machine({"fma": {"dot_rows": 40}})
    _C.use_machine({"fma": {"tiny_depth": 3}})
    assert _C.machine()["fma"] == detected | {"tiny_depth": 3}


def test_the_largest_limits_are_never_reached(own_machine: None) -> None:
    """Products of a limit and the number of threads do not overflow."""

    def largest(limit: str) -> int:
        with pytest.raises(ValueError, match="must be a whole number") as error:
            _C.use_machine({"fma": {limit: -1}})
        return int(str(error.value).split(" to ")[1].split(",")[0])

    def use(*limits: str, **more: int) -> None:
        _C.use_machine({"fma": {limit: largest(limit) for limit in limits} | more})

    threads = 2**16
    use("step_rows")
    assert _C.step_plan([128, 128, 128], 2**20, FLOAT, threads)["path"] == "layers"
    use("multiply_adds_per_thread")
    assert _C.step_plan([128, 128, 128], 2**15, FLOAT, threads) == {"path": "blocks", "pieces": 1}
    use("panel_columns", step_width=0)
    assert _C.step_plan([4096, 4096], 512, FLOAT, 2)["path"] == "layers"
    use("small_dot_depth", small_multiply_adds=2**16)
    assert _C.plan(4, 4096, 4, FLOAT, 1)["forward_path"] == "small"
