"""Programs and pickles of version 0.1 that name what has moved get one line that says where to."""

import importlib
import pickle

import pytest
import torch

import mlp_ext
from mlp_ext import _C

MODULES = {
    **{name: f"mlp_ext.commands.{name}" for name in ("arguments", "data", "loop", "plots")},
    "bench.command": "mlp_ext.commands.bench",
    "cli": "mlp_ext_cli",
}
CLASSES = {"Run": "MlpCall", "Watch": "Guards", "Stepper": "Trainer"}


@pytest.mark.parametrize("name", MODULES)
def test_import_of_a_module_that_moved(name: str) -> None:
    message = f"^mlp_ext.{name} has moved: use {MODULES[name]}$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"mlp_ext.{name}")
    assert importlib.import_module(MODULES[name])


def test_name_of_a_module_that_moved() -> None:
    with pytest.raises(ImportError, match=r"^mlp_ext.loop has moved: use mlp_ext.commands.loop$"):
        from mlp_ext.loop import make_mlp  # noqa: F401
    with pytest.raises(ImportError, match=r"^mlp_ext.data has moved: use mlp_ext.commands.data$"):
        from mlp_ext import data  # noqa: F401


def test_pickle_that_names_a_module_that_moved() -> None:
    with pytest.raises(ImportError, match=r"^mlp_ext.data has moved: use mlp_ext.commands.data$"):
        pickle.loads(b"cmlp_ext.data\nDataset\n.")


def test_modules_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mlp_ext.nonsense'"):
        importlib.import_module("mlp_ext.nonsense")


@pytest.mark.parametrize("name", CLASSES)
def test_class_of_the_compiled_module_that_was_renamed(name: str) -> None:
    with pytest.raises(ImportError, match=f"_C.{name} is now mlp_ext._C.{CLASSES[name]}$"):
        getattr(_C, name)
    assert hasattr(_C, CLASSES[name]) and not hasattr(_C, "nonsense")


@pytest.mark.parametrize("name", ["nn.FusedActivation", "sequential.FusedSequential"])
def test_pickle_that_names_a_class_that_is_gone(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ImportError, match=f"mlp_ext.{name} is gone: unfuse the model where"):
        pickle.loads(f"cmlp_ext.{module}\n{attribute}\n.".encode())


@pytest.mark.parametrize("name", ["LinearReLU", "LinearSigmoid", "LinearTanh"])
def test_pickled_layer_of_version_0_1_loads_and_runs(name: str) -> None:
    layer = getattr(mlp_ext, name)(7, 5)
    old = {"activation", "activation_parameters", "replaced"}
    assert old.isdisjoint(vars(layer))  # so the state is that of version 0.1: nn.Linear's
    assert vars(layer).keys() == vars(torch.nn.Linear(7, 5)).keys()
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(4, 7)
    assert torch.equal(twin(x), layer(x)) and twin.activation == name.removeprefix("Linear").lower()
