"""The data sets: what is in them, how they are scaled, and which rows are held out."""

import sys

import pytest
import torch
from samples import load

from mlp_ext.commands import data as mlp_data
from mlp_ext.commands.data import DATASETS, Dataset

SHAPES = {  # rows to train on, rows held out, features, targets, classes
    "seed": (10, 0, 10, 1, 0),
    "breast_cancer": (455, 114, 30, 1, 2),
    "digits": (1437, 360, 64, 10, 10),
    "mnist5k": (4000, 1000, 784, 10, 10),
}
LABELLED = ["breast_cancer", "digits", "mnist5k"]


def tensors(data: Dataset) -> dict[str, torch.Tensor]:
    return {name: t for name, t in vars(data).items() if isinstance(t, torch.Tensor)}


def labels(y: torch.Tensor) -> torch.Tensor:
    return y.flatten() if y.shape[1] == 1 else y.argmax(1)


def test_every_data_set_is_covered_here() -> None:
    assert SHAPES.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_data_has_its_shapes(name: str) -> None:
    data = load(name)
    n, t, features, targets, classes = SHAPES[name]
    shapes = {
        "x": (n, features),
        "y": (n, targets),
        "x_test": (t, features),
        "y_test": (t, targets),
    }
    assert {key: tuple(value.shape) for key, value in tensors(data).items()} == shapes
    assert (data.name, data.classes) == (name, classes)


def test_seed_is_the_tutorials() -> None:
    data = load("seed", seed=3)
    assert torch.equal(data.x, torch.randn(10, 10, generator=torch.Generator().manual_seed(3)))
    assert data.y.flatten().tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("name", LABELLED)
def test_targets_are_classes(name: str) -> None:
    data = load(name)
    for y in (data.y, data.y_test):
        assert set(y.unique().tolist()) == {0, 1}
        assert set(labels(y).tolist()) == set(range(data.classes))
        if data.classes > 2:
            assert torch.equal(y.sum(1), torch.ones(len(y)))


@pytest.mark.parametrize("name", LABELLED)
def test_held_out_rows_have_the_classes_in_proportion(name: str) -> None:
    data = load(name)
    train, test = (labels(y).long().bincount() for y in (data.y, data.y_test))
    assert (test - (train + test) / 5).abs().max() <= 1


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_pixels_lie_between_0_and_1(name: str) -> None:
    data = load(name)
    for x in (data.x, data.x_test):
        assert (x.min(), x.max()) == (0, 1)


def test_breast_cancer_is_standardised_by_its_training_rows() -> None:
    load_breast_cancer = pytest.importorskip("sklearn.datasets").load_breast_cancer
    data = load("breast_cancer", dtype=torch.float64)
    std, mean = torch.std_mean(data.x, dim=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(std, torch.ones_like(std))

    # All rows together are the first ones, moved and scaled alike, so none is lost, none is twice
    # there, and those held out had no part in the scale.
    def normal(x: torch.Tensor) -> torch.Tensor:
        return ((x - x.mean(0)) / x.std(0)).sort(dim=0).values

    raw = torch.from_numpy(load_breast_cancer().data)
    torch.testing.assert_close(normal(torch.cat([data.x, data.x_test])), normal(raw))


@pytest.mark.parametrize("name", ["seed", "breast_cancer", "digits"])
def test_rows_follow_the_seed(name: str) -> None:
    first, again, other = load(name, seed=1), load(name, seed=1), load(name, seed=2)
    assert all(torch.equal(t, tensors(again)[key]) for key, t in tensors(first).items())
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["seed", "breast_cancer", "digits"])
def test_dtype_changes_no_row(name: str, dtype: torch.dtype) -> None:
    data = load(name, dtype=dtype)
    for key, value in tensors(load(name)).items():
        converted = tensors(data)[key]
        assert converted.dtype == dtype
        torch.testing.assert_close(converted.float(), value, atol=0, rtol=torch.finfo(dtype).eps)


def test_unknown_data_set_is_named() -> None:
    known = "seed, breast_cancer, digits, mnist5k"
    with pytest.raises(ValueError, match=f"load: name must be one of {known}, got 'iris'"):
        load("iris")


def test_seed_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sklearn.datasets", "sklearn.model_selection", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(load("seed").x) == 10
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        mlp_data.load("digits")
