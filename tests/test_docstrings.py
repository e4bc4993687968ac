"""The docstrings of the public names: their examples run, and they have the sections that users
look up."""

import doctest
import inspect
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import nn

import mlp_ext
from mlp_ext.nn import LinearAct

LAYERS = {layer.__name__ for layer in LinearAct.by_module.values()}
CALLABLES = {
    **{name: value for name, value in vars(mlp_ext).items() if name in mlp_ext.__all__},
    "LinearReLU.from_linear": mlp_ext.LinearReLU.from_linear,
    "Profile.to_dict": mlp_ext.Profile.to_dict,
    "TrainStep.__call__": mlp_ext.TrainStep.__call__,
    "TrainStep.fit": mlp_ext.TrainStep.fit,
    "TrainSteps.__call__": mlp_ext.TrainSteps.__call__,
    "TrainSteps.fit": mlp_ext.TrainSteps.fit,
}
for constant in ("ACTIVATIONS", "Level"):
    del CALLABLES[constant]
OF_TENSORS = {
    *LAYERS,
    *(name for name in CALLABLES if name.startswith("linear_")),
    *("Sequential", "predict", "TrainStep.__call__", "TrainStep.fit"),
    *("TrainSteps.__call__", "TrainSteps.fit"),
}
each = pytest.mark.parametrize("name", CALLABLES)


def sections(function: Callable[..., Any]) -> dict[str, str]:
    """The text under each heading, such as "Args"."""
    parts = re.split(r"^([A-Z]\w+):\n", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_all_lists_the_layers_by_name() -> None:
    assert {name for name in mlp_ext.__all__ if name.startswith("Linear")} == LAYERS
    assert len({*mlp_ext.__all__}) == len(mlp_ext.__all__)
    assert all(hasattr(mlp_ext, name) for name in mlp_ext.__all__)


@pytest.mark.filterwarnings("error")
@each
def test_examples_run(name: str) -> None:
    names = {"F": nn.functional, "mlp_ext": mlp_ext, "nn": nn, "torch": torch}
    text = inspect.getdoc(CALLABLES[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert "Examples" in sections(CALLABLES[name]) and test.examples
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


@each
def test_every_parameter_is_explained(name: str) -> None:
    function, found = CALLABLES[name], sections(CALLABLES[name])
    parameters = {*inspect.signature(function).parameters} - {"self"}
    if name in LAYERS:  # in place of **options, those of the activation
        parameters -= {"options"}
        parameters |= {*inspect.signature(function.torch_module).parameters} & {*function.options}
    if name == "Sequential":  # they are those of nn.Sequential
        parameters.clear()
    is_record = is_dataclass(function) or hasattr(function, "_fields")
    heading = "Attributes" if is_record else "Args"
    explained = re.findall(r"^    \*{0,2}(\w+)(?: \(.*\))?: ", found.get(heading, ""), re.MULTILINE)
    assert parameters <= {*explained}


@each
def test_shapes_and_results_are_explained(name: str) -> None:
    found = sections(CALLABLES[name])
    if not inspect.isclass(CALLABLES[name]):
        assert "Returns" in found
    if name in OF_TENSORS:
        assert re.search(r"^    - Output: `\(.*\)`", found["Shape"], re.MULTILINE)


def test_help_of_a_layer() -> None:
    """Its formula, its options and an example with its name."""
    text = inspect.getdoc(mlp_ext.LinearSoftplus) or ""
    assert text.startswith(
        "y = softplus(x W^T + b) with softplus(z) = log(1 + e^(beta z)) / beta.\n"
    )
    assert "nn.Softplus(beta, threshold)" in text
    assert "    threshold (float): as in `nn.Softplus`. Default: 20.0.\n" in text
    assert ">>> layer = mlp_ext.LinearSoftplus(20, 30)\n" in text
    assert "options" not in sections(mlp_ext.LinearReLU)["Args"]
