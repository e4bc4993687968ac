"""The plan of a GPU, which needs none: which path a shape takes, on both sides of each boundary."""

from __future__ import annotations

from typing import Any

import pytest

from mlp_ext import _C


def plan(
    M: int,
    K: int,
    N: int,
    dtype: str = "float32",
    activation: str = "relu",
    arch: int = 90,
    **more: bool,
) -> dict[str, Any]:
    return _C.cuda_plan(M, K, N, dtype, activation, arch, **more)


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((10, 10, 5), "float32", "small", "small"),
        ((256, 256, 256), "float32", "small", "small"),  # 2^24 products
        ((257, 256, 256), "float32", "large", "large"),
        ((512, 64, 64), "float32", "small", "small"),
        ((513, 64, 64), "float32", "small", "tall"),  # dW would add up too many rows in one block
        ((4, 4096, 8), "float32", "small", "small"),
        ((4, 4097, 8), "float32", "large", "small"),
        ((65536, 64, 64), "float32", "tall", "tall"),
        ((65536, 65, 64), "float32", "large", "large"),  # 64 x 64 weights fit the chip
        ((65536, 128, 32), "float32", "tall", "tall"),
        ((65536, 129, 16), "float32", "large", "large"),
        ((65536, 64, 64), "float64", "native", "large"),
        ((65536, 32, 64), "float64", "tall", "tall"),
        ((131072, 16, 16), "bfloat16", "tall", "tall"),  # beyond, the tensor cores win
        ((131072, 17, 16), "bfloat16", "large", "large"),
        ((4096, 4096, 4096), "float64", "native", "large"),
        ((4096, 4096, 4096), "float16", "large", "large"),
        ((2**31, 64, 64), "float32", "tall", "tall"),
    ],
)
def test_plan_takes_the_path_of_the_shape(
    shape: tuple[int, int, int], dtype: str, forward: str, backward: str
) -> None:
    chosen = plan(*shape, dtype=dtype)
    assert (chosen["forward"], chosen["backward"]) == (forward, backward)


def test_plan_leaves_old_architectures_to_native() -> None:
    for shape in ((10, 10, 5), (65536, 64, 64), (1024, 1024, 1024)):
        chosen = plan(*shape, arch=75)
        assert (chosen["forward"], chosen["backward"]) == ("native", "native")
        assert plan(*shape, arch=80)["forward"] != "native"


def test_plan_follows_the_tf32_switch() -> None:
    assert plan(65536, 64, 64)["forward"] == "tall"
    assert plan(65536, 64, 64, tf32=True)["forward"] == "large"
    assert plan(65536, 32, 32, tf32=True)["forward"] == "tall"


@pytest.mark.parametrize(
    ("activation", "dtype", "arch", "more", "epilogue"),
    [
        ("identity", "bfloat16", 90, {}, "bias"),
        ("relu", "float32", 80, {}, "relu_bias"),
        ("sigmoid", "bfloat16", 90, {}, "cutlass"),
        ("tanh", "float16", 90, {}, "cutlass"),
        ("sigmoid", "float32", 90, {}, "pass"),
        ("sigmoid", "bfloat16", 80, {}, "pass"),
        ("sigmoid", "bfloat16", 100, {}, "pass"),  # 9.0a runs on 9.0 alone
        ("sigmoid", "bfloat16", 90, {"aligned": False}, "pass"),
        ("sigmoid", "bfloat16", 90, {"cutlass": False}, "pass"),
    ],
)
def test_plan_names_the_epilogue_of_a_large_product(
    activation: str, dtype: str, arch: int, more: dict[str, bool], epilogue: str
) -> None:
    chosen = plan(4096, 4096, 4096, dtype, activation, arch, **more)
    assert (chosen["forward"], chosen["epilogue"]) == ("large", epilogue)


def test_plan_gives_a_reason_for_each_path() -> None:
    chosen = plan(65536, 64, 64)
    assert chosen["forward_reason"].startswith("by count: ")
    assert chosen["backward_reason"].startswith("by count: ")


H100 = 227 * 1024  # bytes of shared memory that a block may have
A100 = 163 * 1024


@pytest.mark.parametrize(
    ("widths", "batch", "dtype", "shared", "path", "reason"),
    [
        ([10, 5, 1], 10, "float32", H100, "one_block", "one launch instead of"),
        ([30, 64, 32, 1], 32, "bfloat16", A100, "one_block", "one launch instead of"),
        ([64, 128], 64, "float32", A100, "one_block", "one launch instead of"),  # 2^19 products
        ([64, 128], 65, "float32", A100, "layers", "one processor takes longer"),
        ([64, 128], 64, "float64", A100, "layers", "does not fit on chip"),
        ([64, 128], 64, "float64", H100, "one_block", "one launch instead of"),
        ([784, 30, 10], 10, "float32", H100, "layers", "does not fit on chip"),
        ([784, 128, 10], 32, "float32", H100, "layers", "one processor takes longer"),
        ([2] * 9, 4, "float32", H100, "one_block", "one launch instead of"),
        ([2] * 10, 4, "float32", H100, "layers", "more layers than"),
        ([2, 0, 3], 4, "float32", H100, "layers", "nothing to launch for"),
        ([2, 3], 0, "float32", H100, "layers", "nothing to launch for"),
        ([2**31, 2**31], 2**31, "float32", H100, "layers", "one processor takes longer"),
    ],
)
def test_step_plan_takes_the_path_of_the_net(
    widths: list[int], batch: int, dtype: str, shared: int, path: str, reason: str
) -> None:
    chosen = _C.cuda_step_plan(widths, batch, dtype, 90, shared)
    assert chosen["path"] == path
    assert reason in chosen["reason"]
    assert _C.cuda_step_plan(widths, batch, dtype, 75, shared)["path"] == "layers"
