"""The command `mlp-ext plan`: the path that is taken, and limits that hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlp_ext import _C
from mlp_ext_cli import main

RANGE = re.compile(r"    ([\w ()]+?) (?:(\d+) to|<=|>=) (\d+) \((.*)\)")


def limits(line: str) -> tuple[str, list[int], dict[int, str]]:
    """Of a range: what varies, its first and last size, and the paths beyond."""
    found = RANGE.fullmatch(line)
    assert found, line
    name, first, last, beyond = found.groups()
    paths = {int(size): path for size, path in re.findall(r"(\d+): (\w+)", beyond)}
    return name, [int(size) for size in (first, last) if size], paths


def planned(args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The lines of each way: its path, what that does, a heading, and ranges."""
    assert main(["plan", *args.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    blocks = [block.splitlines() for block in out.split("\n\n")[1:]]  # after the processor's name
    assert all(len(line) <= 80 for block in blocks for line in block)
    return {lines[0].partition(":")[0]: lines for lines in blocks}


def path(lines: list[str]) -> str:
    found = re.match(r"\w+: (\w+)", lines[0])
    assert found
    return found[1]


def test_layer_has_paths_pieces_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("64x784x256 --threads 2 --machine zen4", capsys)
    assert found["forward"] == [
        "forward: dots, y in 1 x 2 pieces",
        "  vector lanes along K, nothing is packed",
        "  for these sizes, changed one at a time:",
        "    M <= 64 (65: packed)",
        "    K >= 768 (767: packed)",
    ]
    assert found["backward"][0] == "backward: packed, dx in 1 piece, dW in 1 piece, at once"
    few_rows = planned("4x784x256 --threads 2 --machine zen4", capsys)["backward"][0]
    assert few_rows == "backward: few_rows, 2 pieces of rows"


def slow(value: object) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", slow("float64")])
@pytest.mark.parametrize(
    "case", ["64x784x256", "10x10x5", slow("65536x64x64"), slow("1000x1x1"), slow("1x1x1")]
)
@pytest.mark.parametrize("threads", [slow(1), 8])
def test_limits_of_a_layer_hold(
    case: str, dtype: str, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(zip("MKN", map(int, case.split("x")), strict=True))

    def taken(way: str, **other: int) -> str:
        every = {**sizes, "threads": threads, **other}
        shape = "x".join(str(every[name]) for name in "MKN")
        args = f"{shape} --dtype {dtype} --threads {every['threads']}"
        return path(planned(args, capsys)[way])

    for way, lines in planned(f"{case} --dtype {dtype} --threads {threads}", capsys).items():
        here = path(lines)
        for line in lines[3:]:
            name, ends, beyond = limits(line)
            assert len(ends) == len(beyond)
            assert {taken(way, **{name: size}) for size in ends} == {here}
            for size, other in beyond.items():
                assert taken(way, **{name: size}) == other != here


def test_step_has_its_path_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("784-256-10@64 --threads 2 --machine zen4", capsys)
    assert [*found] == ["step"]
    assert found["step"] == [
        "step: panels, 2 pieces",
        "  layer by layer, on transposed activations and blocks of columns of W",
        "  for these sizes, changed one at a time:",
        "    batch 61 to 64 (60: layers, 65: layers)",
        "    width 1 (784) >= 513 (512: blocks)",
        "    threads <= 24 (25: layers)",
        "    width 2 (256) >= 6 (5: layers)",
    ]
    assert planned("10-5-1@10 --machine zen4", capsys)["step"][0] == "step: blocks, 1 piece"
    layers = planned("1024-1024-1024@256 --threads 2 --dtype bfloat16 --machine zen4", capsys)[
        "step"
    ]
    assert layers[0] == "step: layers; see mlp-ext plan 256x1024x1024"
    assert layers[-1] == "  for all sizes"


def test_gpu_of_an_architecture_need_not_be_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("4096x64x64 --device cuda --arch 90 --activation gelu", capsys)
    expected = _C.cuda_plan(4096, 64, 64, "float32", "gelu", 90)
    for way, lines in found.items():
        assert path(lines) == expected[way]
        assert expected[f"{way}_reason"] in " ".join(" ".join(lines[1:3]).split())
    assert path(planned("10-5-1@10 --device cuda --arch 80", capsys)["step"]) == "one_block"


@pytest.mark.parametrize("machine", _C.machines())
def test_plan_of_another_machine(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    mode = _C.machine(machine)["bfloat16"]
    expected = _C.plan(512, 512, 512, 2, 2, mode=mode, machine=machine)
    command = f"512x512x512 --dtype bfloat16 --threads 2 --machine {machine}"
    for way, lines in planned(command, capsys).items():
        assert path(lines) == expected[f"{way}_path"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "64x784",
            "argument case: must be MxKxN, e.g. 64x784x256, or WIDTHS@BATCH, e.g. 784-256-10@64",
        ),
        ("10@64", "argument case: must be "),
        ("64x784x256 --activation gelux", "argument --activation: must be one of "),
        ("64x784x256 --dtype int8", "argument --dtype: must be one of "),
        ("64x784x256 --dtype tf32", "argument --dtype: tf32 requires --device cuda"),
        ("64x784x256 --arch 90", "argument --arch: requires --device cuda"),
        ("64x784x256 --device cuda --threads 2 --arch 90", "argument --threads: requires --device"),
        ("64x784x256 --device cuda --arch 91", "argument --arch: must be one of 80, 86, "),
        (
            "64x784x256 --device cuda",
            "argument --arch: no CUDA device available; add e.g. --arch 90",
        ),
        ("64x784x256 --threads 70000", "threads must be from 1 to 65536"),
        ("2147483647x2147483647x2147483647", "the product of the sizes must be at most 2^53"),
    ],
)
def test_error_is_one_line(
    args: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_refused: Callable[[str, str, str], None],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused("plan", args, message)
