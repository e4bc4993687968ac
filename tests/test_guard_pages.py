"""Operands beside pages that may not be touched: where a kernel reads or writes there, Python dies.

AddressSanitizer does not see what vector instructions with a mask touch; these pages do.
"""

import ctypes
import mmap

import pytest
import torch
from references import EACH_KIND, assert_matches_native
from shapes import DEEP, DTYPES, ODD, Shape, grad_output, operands
from steps import assert_steps_match_eager, training
from torch import Tensor, nn

from mlp_ext import TrainStep
from mlp_ext.bench.training import Step

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = mmap.PAGESIZE
SIDES = ["before", "after"]
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(t: Tensor, side: str) -> Tensor:
    """A contiguous copy with a page that may not be touched right before or after it."""
    size = t.numel() * t.element_size()
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, PAGE + whole + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + whole):
        assert mprotect(page, PAGE, 0) == 0
    offset = PAGE + (whole - size if side == "after" else 0)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return copy.view(t.shape).copy_(t)


SHAPES = [
    *(Shape((1,), 1, 1), Shape((9,), 4, 1), Shape((6,), 1, 8), Shape((7,), 13, 5), ODD, DEEP),
    *(Shape((301,), 17, 16), Shape((300,), 9, 1), Shape((70,), 130, 600)),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_stay_within_their_operands(shape: Shape, dtype: torch.dtype, side: str) -> None:
    given = {name: guarded(t, side) for name, t in operands(shape, dtype).items()}
    for activation in EACH_KIND:
        assert_matches_native(given, activation, guarded(grad_output(shape, dtype), side))


TRAININGS = {  # nets, loss, options
    torch.float32: (["1-1@1", "10-5-1@10", "3-17-5@100", "70-600-3@50"], "mse", "momentum"),
    torch.float64: (["10-5-1@10", "3-17-5@100", "70-600-3@50"], "classes", "momentum"),
    torch.bfloat16: (["10-5-1@10", "33-64-20-7@1000"], "mse", "adamw"),
    torch.float16: (["10-5-1@10", "33-64-20-7@1000"], "mse", "momentum"),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", TRAININGS, ids=str)
def test_steps_stay_within_their_operands(dtype: torch.dtype, side: str) -> None:
    """Parameters, the optimizer's state, input and target."""

    def make(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        for p in model.parameters():
            p.data = guarded(p.data, side)
        step = TrainStep(model, criterion, optimizer)

        def run(input: Tensor, target: Tensor) -> Tensor:
            loss = step(guarded(input, side), guarded(target, side))
            for state in optimizer.state.values():
                state.update({name: guarded(t, side) for name, t in state.items() if t.dim()})
            return loss

        return run

    nets, *kind = TRAININGS[dtype]
    for net in nets:
        assert_steps_match_eager(training(net, *kind, dtype), 3, make)
