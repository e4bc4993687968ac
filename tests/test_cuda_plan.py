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
    **more: Any,
) -> dict[str, Any]:
    return _C.cuda_plan(M, K, N, dtype, activation, arch, **more)


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((10, 10, 5), "float32", "small", "small"),
        ((256, 256, 256), "float32", "small", "small"),  # 2^24 multiply-adds
        ((257, 256, 256), "float32", "large", "large"),
        ((32, 512, 1024), "float32", "small", "large"),  # in the depth of dx one block is slower
        ((31, 513, 512), "float32", "large", "small"),  # and in that of y, for few rows
        ((8192, 32, 16), "float32", "small", "tall"),  # 512 tiles of 16 x 16
        ((8193, 32, 16), "float32", "large", "tall"),
        ((1024, 64, 64), "float32", "small", "small"),
        ((1025, 64, 64), "float32", "small", "tall"),  # dW would add up too many rows in one block
        ((12287, 64, 64), "float32", "large", "tall"),  # too few tiles for all processors
        ((12288, 64, 64), "float32", "tall", "tall"),
        ((65536, 65, 64), "float32", "large", "large"),  # 64 x 64 weights fit the registers
        ((65536, 33, 128), "float32", "large", "large"),  # in steps of 8 columns
        ((65536, 32, 128), "float32", "tall", "tall"),
        ((65536, 128, 32), "float32", "large", "tall"),
        ((65536, 129, 16), "float32", "large", "large"),
        ((65536, 64, 64), "float64", "native", "large"),
        ((65536, 32, 64), "float64", "tall", "tall"),
        ((512, 64, 64), "bfloat16", "small", "small"),  # 2^21 multiply-adds
        ((513, 64, 64), "bfloat16", "large", "small"),
        ((16384, 64, 64), "bfloat16", "large", "tall"),
        ((16385, 64, 64), "bfloat16", "large", "large"),  # beyond, the tensor cores win
        ((65535, 16, 16), "bfloat16", "large", "tall"),
        ((65536, 16, 16), "bfloat16", "tall", "tall"),
        ((65536, 17, 16), "bfloat16", "large", "tall"),
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


def test_plan_needs_a_dtype_that_the_kernels_know() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32, .* got 'float8'"):
        plan(10, 10, 5, dtype="float8")


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
        ("relu", "bfloat16", 90, {}, "relu_bias"),
        ("relu", "float32", 90, {}, "pass"),  # cuBLASLt's epilogues there lose NaN
        ("relu", "bfloat16", 80, {}, "pass"),
        ("relu", "bfloat16", 90, {"aligned": False}, "pass"),
        ("sigmoid", "bfloat16", 90, {}, "cutlass"),
        ("tanh", "float16", 90, {}, "cutlass"),
        ("sigmoid", "float32", 90, {}, "pass"),
        ("sigmoid", "bfloat16", 80, {}, "pass"),
        ("sigmoid", "bfloat16", 100, {}, "pass"),  # 9.0a runs on 9.0 alone
        ("sigmoid", "bfloat16", 90, {"aligned": False}, "pass"),
        ("sigmoid", "bfloat16", 90, {"cutlass": False}, "pass"),
        ("silu", "bfloat16", 90, {}, "pass"),  # CUTLASS's kernels are for the tuned activations
        ("leaky_relu", "float16", 90, {}, "pass"),
    ],
)
def test_plan_names_the_epilogue_of_a_large_product(
    activation: str, dtype: str, arch: int, more: dict[str, Any], epilogue: str
) -> None:
    chosen = plan(4096, 4096, 4096, dtype, activation, arch, **more)
    assert (chosen["forward"], chosen["epilogue"]) == ("large", epilogue)


def test_plan_has_no_epilogue_of_cutlass_for_few_multiply_adds() -> None:
    assert plan(1024, 1024, 1024, "bfloat16", "sigmoid")["epilogue"] == "pass"
    assert plan(1025, 1024, 1024, "bfloat16", "sigmoid")["epilogue"] == "cutlass"


def test_plan_gives_a_reason_for_each_path() -> None:
    chosen = plan(65536, 64, 64)
    assert chosen["forward_reason"].startswith("x read once")
    assert chosen["backward_reason"].startswith("dy, saved and x read once")


def test_plan_takes_no_more_shared_memory_than_there_is() -> None:
    ada = 99 * 1024  # bytes of a block
    assert plan(65536, 32, 128)["backward"] == "tall"
    assert plan(65536, 32, 128, shared=ada)["backward"] == "large"
    assert plan(65536, 32, 128, shared=ada, path="tall")["backward"] == "large"
    assert plan(65536, 32, 32, shared=ada)["backward"] == "tall"


def test_plan_takes_the_path_that_is_asked_for_where_it_can() -> None:
    for path in ("small", "tall", "large", "native"):
        chosen = plan(300, 64, 64, path=path)
        assert (chosen["forward"], chosen["backward"]) == (path, path)
    assert plan(300, 129, 16, path="tall") == plan(300, 129, 16)
    assert plan(300, 64, 64, arch=75, path="small")["forward"] == "native"
    with pytest.raises(ValueError, match="path must be small, tall, large or native, got 'tiny'"):
        plan(300, 64, 64, path="tiny")


H100 = 227 * 1024  # bytes of shared memory that a block may have
A100 = 163 * 1024


@pytest.mark.parametrize(
    ("widths", "batch", "dtype", "shared", "path", "reason"),
    [
        ([10, 5, 1], 10, "float32", H100, "one_block", "one launch instead of"),
        ([30, 64, 32, 1], 32, "bfloat16", A100, "one_block", "one launch instead of"),
        ([64, 128], 32, "float32", A100, "one_block", "one launch instead of"),  # 2^18 products
        ([64, 128], 33, "float32", A100, "layers", "one processor takes longer"),
        ([64, 128], 32, "float64", A100, "layers", "does not fit on chip"),
        ([64, 128], 32, "float64", H100, "one_block", "one launch instead of"),
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


@pytest.mark.parametrize(
    ("widths", "batch", "path", "reason"),
    [
        ([10, 5, 1], 10, "one_block", "one launch instead of"),
        ([64, 64, 64, 64, 10], 64, "one_block", "one launch instead of"),
        ([64, 64], 1024, "one_block", "one launch instead of"),  # 2^22 products
        ([64, 64], 1025, "layers", "one processor takes longer"),
        ([784, 100, 10], 10, "layers", "does not fit on chip"),
        ([2] * 10, 4, "layers", "more layers than"),
        ([2, 3], 0, "layers", "nothing to launch for"),
    ],
)
def test_step_plan_of_many_networks_takes_more_products(
    widths: list[int], batch: int, path: str, reason: str
) -> None:
    chosen = _C.cuda_step_plan(widths, batch, "float32", 90, H100, many=True)
    assert chosen["path"] == path
    assert reason in chosen["reason"]
