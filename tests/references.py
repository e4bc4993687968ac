"""What results are compared with: native torch in float64, and native's own error as yardstick."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from shapes import Operands
from torch import Tensor, nn

import mlp_ext

Function = Callable[..., Tensor]  # called as linear_act
# One or two of each kind: applied in registers or to tiles, saving nothing, y or z. The values and
# derivatives of every activation are in test_activations.py.
EACH_KIND = ("identity", "relu", "sigmoid", "tanh", "silu")
Results = dict[str, Tensor]


def activated(z: Tensor, activation: str, parameters: Sequence[float] = ()) -> Tensor:
    """PyTorch's own activation of that name."""
    if activation == "identity":
        return z
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    function = getattr(torch, activation, None) or getattr(F, activation)
    found: Tensor = function(z, *parameters)
    return found


def native(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    parameters: Sequence[float] = (),
) -> Tensor:
    return activated(F.linear(input, weight, bias), activation, parameters)


def alone(t: Tensor) -> Tensor:
    """A contiguous copy with nothing beside its rows, for native.

    On processors with AMX torch's own product of bfloat16 reads past the end of rows of odd width
    that lie apart, so that a NaN between the rows enters native's result.
    """
    return t.detach().clone(memory_format=torch.contiguous_format)


def results(
    function: Function, operands: Operands, activation: str, grad_output: Tensor | None = None
) -> Results:
    """The output, and with a grad_output the gradient of every operand, by name."""
    learns = grad_output is not None
    leaves = {name: t.detach().requires_grad_(learns) for name, t in operands.items()}
    output = function(**leaves, activation=activation)
    if not learns:
        return {"output": output}
    output.backward(grad_output)
    return {"output": output.detach(), **{name: t.grad for name, t in leaves.items()}}


def assert_matches_native(
    operands: Operands,
    activation: str,
    grad_output: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda output: output,
    parameters: Sequence[float] = (),
) -> None:
    """linear_act is as accurate as native: its output, and with a grad_output every gradient.

    reduce: what follows, as in a loss; then grad_output is the gradient of its result.
    parameters: of the activation; none: the defaults.
    """

    def evaluated(function: Function, activation: str, cast: Callable[[Tensor], Tensor]) -> Results:
        casts = {name: cast(t) for name, t in operands.items()}
        dy = grad_output if grad_output is None else cast(grad_output)
        return results(lambda **kwargs: reduce(function(**kwargs)), casts, activation, dy)

    ours, natives = (partial(f, parameters=parameters) for f in (mlp_ext.linear_act, native))
    found = evaluated(ours, activation, lambda t: t)
    expected = evaluated(natives, activation, alone)
    reference = evaluated(natives, activation, lambda t: t.double())
    terms = evaluated(native, "identity", lambda t: t.double().abs())
    assert found.keys() == expected.keys()
    for name in expected:
        if activation == "gelu":  # PyTorch's of inf is NaN in float32 and inf in float64
            wrong = expected[name].isnan() & ~reference[name].isnan()
            expected[name] = found[name].where(wrong, expected[name])
        assert_as_accurate_as_native(
            found[name], expected[name], reference[name], terms[name], name
        )


def assert_as_accurate_as_native(
    actual: Tensor,
    native: Tensor,
    reference: Tensor,
    terms: Tensor | None = None,
    name: str = "output",
    slack: Tensor | None = None,
) -> None:
    """max |actual - reference| <= 2 max |native - reference| + epsilon; NaN and inf as in native.

    reference: in float64, from the same inputs.
    terms: the sum of the absolute values that were added up.
    slack: what each element may be off by besides.
    epsilon, for where native is exact by luck: one rounding of the result, and a few of the terms
    in the dtype of accumulation, which is float32 or better.
    """
    assert (actual.dtype, actual.shape) == (native.dtype, native.shape), name
    finite = native.isfinite()
    special = ~finite
    torch.testing.assert_close(
        actual[special],
        native[special],
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite where native is"
    finite &= reference.isfinite()
    if not finite.any():
        return
    exact = reference[finite]
    terms = exact if terms is None else terms[finite].nan_to_num(0, 0, 0)
    accumulator = torch.promote_types(actual.dtype, torch.float32)
    epsilon = torch.finfo(actual.dtype).eps * exact.abs().max()
    epsilon += 8 * torch.finfo(accumulator).eps * terms.abs().max()
    error = (actual[finite].double() - exact).abs()
    error = (error if slack is None else error - slack[finite]).max()
    native_error = (native[finite].double() - exact).abs().max()
    assert error <= 2 * native_error + epsilon, (
        f"{name}: error {error:.3g}, native {native_error:.3g}"
    )


class Net(nn.Module):
    """Two layers through the function given."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(10, 5), nn.Linear(5, 1), function

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.function(input, self.first.weight, self.first.bias, "relu")
        return self.function(hidden, self.second.weight, self.second.bias, "sigmoid")


def twins() -> tuple[Net, Net]:
    fused, plain = Net(mlp_ext.linear_act), Net(native)
    plain.load_state_dict(fused.state_dict())
    return fused, plain
