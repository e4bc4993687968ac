"""linear_act is a good citizen of torch: opcheck, compile, autocast, modes, profiler."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from references import EACH_KIND, Function, assert_as_accurate_as_native, native, twins
from shapes import (
    DTYPES,
    LAYOUTS,
    ODD,
    ONE_ROW,
    SMALL,
    THREE_LEADING,
    Operands,
    Shape,
    grad_output,
    grid,
    leaves,
    operands,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["input", "weight", "bias"]
FORWARD = torch.ops.mlp_ext.linear_act.default
BACKWARD = torch.ops.mlp_ext._linear_act_backward.default
close = torch.testing.assert_close

activations = pytest.mark.parametrize("activation", EACH_KIND)


def gradients(output: Tensor, tensors: Operands) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(tensors.values())))


# ---- opcheck ----


@pytest.mark.parametrize(
    ("activation", "shape", "bias"),
    [
        *((activation, SMALL, True) for activation in EACH_KIND),
        *(("relu", shape, False) for shape in (SMALL, THREE_LEADING)),
        *(("silu", shape, True) for shape in (ONE_ROW, Shape((0,), 4, 3))),
    ],
    ids=str,
)
def test_opcheck_forward(activation: str, shape: Shape, bias: bool) -> None:
    tensors = {name: t.requires_grad_() for name, t in operands(shape, bias=bias).items()}
    arguments = (tensors["input"], tensors["weight"], tensors.get("bias"), activation)
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "live", [(False, False, False), (True, False, False), (False, True, True)], ids=str
)
def test_opcheck_forward_with_frozen_operands(live: tuple[bool, ...], dtype: torch.dtype) -> None:
    tensors = [
        t.requires_grad_(on) for t, on in zip(operands(SMALL, dtype).values(), live, strict=True)
    ]
    torch.library.opcheck(FORWARD, (*tensors, "tanh"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@activations
def test_opcheck_backward(activation: str, mask: tuple[bool, ...]) -> None:
    for shape in (ONE_ROW, SMALL, THREE_LEADING) if all(mask) else [SMALL]:
        x, w, _ = operands(shape).values()
        output = None if activation == "identity" else native(x, w, None, activation)
        arguments = (grad_output(shape), output, x if mask[1] else None, w if mask[0] else None)
        torch.library.opcheck(BACKWARD, (*arguments, activation, [], mask))


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_forward_and_backward_matches_native(backend: str) -> None:
    torch.compiler.reset()
    fused, plain = twins()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x = torch.randn(7, 10)
    compiled(x).sum().backward()
    plain(x).sum().backward()
    close(compiled(x), plain(x))
    found, expected = (
        {name: p.grad for name, p in net.named_parameters()} for net in (fused, plain)
    )
    close(found, expected)


@activations
def test_compile_with_a_dynamic_batch_compiles_once(activation: str) -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlp_ext.linear_act, fullgraph=True, dynamic=True, backend=graphs)
    for rows in (7, 3, 20):
        tensors = leaves(Shape((rows,), 10, 5))
        torch._dynamo.mark_dynamic(tensors["input"], 0)
        found = compiled(**tensors, activation=activation)
        expected = native(**tensors, activation=activation)
        close(found, expected)
        close(gradients(found, tensors), gradients(expected, tensors))
    assert graphs.frame_count == 1


# ---- autocast and modes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@activations
def test_autocast_treats_it_as_a_linear_layer(
    activation: str, given: torch.dtype, dtype: torch.dtype
) -> None:
    x, dy = grid(33, 65, dtype=given), grid(33, 17)
    weight, bias = (
        grid(17, 65, dtype=torch.promote_types(given, torch.float32)),
        grid(17, dtype=given),
    )

    def evaluated(
        function: Function, to: torch.dtype | None, enabled: bool = True
    ) -> tuple[Tensor, ...]:
        tensors = [t.to(to or t.dtype).requires_grad_() for t in (x, weight, bias)]
        with torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
            output = function(*tensors, activation)
        return output, *torch.autograd.grad(output, tensors, dy.to(output.dtype))

    found, expected = evaluated(mlp_ext.linear_act, None), evaluated(native, None)
    for f, e, r in zip(
        found, expected, evaluated(native, torch.float64, enabled=False), strict=True
    ):
        lowest = torch.float64 if given == torch.float64 else dtype
        assert f.dtype == e.dtype
        assert_as_accurate_as_native(f.to(lowest), e.to(lowest), r)


def test_autocast_can_be_turned_off_inside() -> None:
    tensors = operands(SMALL)
    device = tensors["input"].device.type
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(mlp_ext.linear_act(**tensors), native(**tensors))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_give_the_same_values(
    mode: Callable[[], AbstractContextManager[Any]],
) -> None:
    tensors = leaves()
    expected = mlp_ext.linear_act(**tensors)
    assert expected.requires_grad
    with mode():
        found = mlp_ext.linear_act(**tensors)
    assert not found.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(found, expected.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [ONE_ROW, SMALL, THREE_LEADING, Shape((4,), 0, 3)], ids=str)
def test_meta_tensors_carry_shape_and_dtype(shape: Shape, dtype: torch.dtype) -> None:
    tensors = {name: t.to("meta").requires_grad_() for name, t in operands(shape, dtype).items()}
    output = mlp_ext.linear_act(**tensors)
    assert (output.shape, output.dtype, output.device.type) == (
        (*shape.leading, shape.N),
        dtype,
        "meta",
    )
    for gradient, t in zip(gradients(output, tensors), tensors.values(), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device.type) == (t.shape, dtype, "meta")


# ---- profiler ----


@activations
def test_profiler_names_the_operators_and_no_native_layer(activation: str) -> None:
    for layout in LAYOUTS.values():
        tensors = leaves(ODD)
        dy = layout(grad_output(ODD))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            mlp_ext.linear_act(**tensors, activation=activation).backward(dy)
        names = {event.name for event in profiler.events()}
        assert {"mlp_ext::linear_act", "mlp_ext::_linear_act_backward"} <= names
        natives = ["linear", "addmm", "mm", "matmul", "bmm", "sum", "threshold_backward"]
        natives += [activation, f"{activation}_backward"]
        assert not names & {f"aten::{name}" for name in natives}
