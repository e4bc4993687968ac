"""Whatever the shape, layout and dtype: output and gradients equal native torch's."""

import pytest
import torch
from hypotheses import given, settings, st
from references import assert_matches_native
from shapes import DTYPES, LAYOUTS, Shape, grad_output, operands

import mlp_ext

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    K=st.integers(0, 40),
    N=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(mlp_ext.ACTIVATIONS),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), max_size=4),
    bias=st.booleans(),
)
def test_any_shape_layout_and_dtype_matches_native(
    leading: list[int],
    K: int,
    N: int,
    dtype: torch.dtype,
    activation: str,
    layouts: list[str],
    bias: bool,
) -> None:
    torch.manual_seed(0)
    shape = Shape(tuple(leading), K, N)
    tensors = operands(shape, dtype, bias) | {"grad_output": grad_output(shape, dtype)}
    for name, layout in zip(tensors, layouts, strict=False):
        if tensors[name].numel():
            tensors[name] = LAYOUTS[layout](tensors[name])
    dy = tensors.pop("grad_output")
    assert_matches_native(tensors, activation, dy)
