"""mlp_ext.sklearn: the same as scikit-learn's own estimators, and fit for scikit-learn's tools."""

import doctest
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

import numpy as np
from scipy.sparse import csr_matrix
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_multilabel_classification,
    make_regression,
)
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import check_estimator

import mlp_ext.sklearn
from mlp_ext.sklearn import MLPClassifier, MLPRegressor

NAMES = ("MLPClassifier", "MLPRegressor")
each = pytest.mark.parametrize("estimator", [MLPClassifier, MLPRegressor])
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

Data = tuple[Any, Any]


def digits(rows: int = 600) -> Data:
    X, y = load_digits(return_X_y=True)
    return X[:rows] / 16, y[:rows]


def cancer() -> Data:
    X, y = load_breast_cancer(return_X_y=True)
    return scale(X), y


def labels() -> Data:
    return make_multilabel_classification(300, random_state=0)


def numbers(outputs: int = 1) -> Data:
    X, y = make_regression(300, 10, n_targets=outputs, random_state=0)
    return X, y / 100


CASES: dict[str, tuple[str, Data]] = {
    "binary": ("MLPClassifier", cancer()),
    "classes": ("MLPClassifier", digits()),
    "labels": ("MLPClassifier", labels()),
    "number": ("MLPRegressor", numbers()),
    "numbers": ("MLPRegressor", numbers(3)),
}
SOLVERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.01},
    "plain": {"solver": "sgd", "momentum": 0.0},
    "heavy-ball": {"solver": "sgd", "nesterovs_momentum": False},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1},
}


def both(name: str, data: Data, **options: Any) -> tuple[Any, Any]:
    """scikit-learn's own and ours, fitted."""
    options = {"hidden_layer_sizes": (16, 8), "random_state": 0} | options
    kinds = (getattr(neural_network, name), globals()[name])
    theirs, ours = (kind(**options).fit(*data) for kind in kinds)
    return theirs, ours


def assert_same(theirs: Any, ours: Any, losses: float = 1e-12) -> None:
    """But for rounding: weights, losses and the like of float64."""
    for name in ("coefs_", "intercepts_"):
        for expected, actual in zip(getattr(theirs, name), getattr(ours, name), strict=True):
            assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=losses)
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@each
def test_check_estimator(estimator: Any) -> None:
    check_estimator(estimator())


@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_same_weights_as_scikit_learn(case: str, solver: str, shuffle: bool) -> None:
    """Also with a smaller last batch. Adam's epsilon is exact in the first 32 steps: so many."""
    name, data = CASES[case]
    epochs, rows = (4, -(-len(data[0]) // 8)) if solver == "adam" else (6, 64)
    options = {"max_iter": epochs, "batch_size": rows, "shuffle": shuffle, "alpha": 0.0}
    theirs, ours = both(name, data, **options, **SOLVERS[solver])
    assert_same(theirs, ours)
    np.testing.assert_allclose(ours.predict(data[0]), theirs.predict(data[0]), rtol=1e-9)


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_same_with_each_activation(activation: str) -> None:
    theirs, ours = both(
        "MLPClassifier", digits(), activation=activation, solver="sgd", alpha=0.0, max_iter=5
    )
    assert_same(theirs, ours)
    for method in ("predict_proba", "predict_log_proba"):
        actual, expected = (getattr(e, method)(digits()[0]) for e in (ours, theirs))
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_alpha_is_divided_by_the_rows_of_each_batch(case: str) -> None:
    """The penalty in the loss is exact in epochs of one batch, else nearly so."""
    name, data = CASES[case]
    options = {"solver": "sgd", "alpha": 10.0, "max_iter": 5}
    assert_same(*both(name, data, batch_size=len(data[0]), **options))
    assert_same(*both(name, data, batch_size=70, **options), losses=1e-2)


def test_without_hidden_layers() -> None:
    assert_same(*both("MLPClassifier", cancer(), hidden_layer_sizes=(), solver="sgd", alpha=0.0))


@pytest.mark.parametrize("case", CASES)
def test_float32_is_trained_in_float32(case: str) -> None:
    name, (X, y) = CASES[case]
    theirs, ours = both(name, (X.astype(np.float32), y), max_iter=10)
    assert {coef.dtype for coef in ours.coefs_ + ours.intercepts_} == {np.dtype(np.float32)}
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-3)
    assert ours.predict(X).dtype == theirs.predict(X).dtype
    assert ours.predict(X.astype(np.float32)).dtype == theirs.predict(X.astype(np.float32)).dtype


@pytest.mark.parametrize("case", ["binary", "classes", "numbers"])
def test_epsilon_of_adam_is_nearly_exact(case: str) -> None:
    """It is off by 2% at most, in calls of many steps: less than another by 10%. It is large here,
    and so decides."""
    name, data = CASES[case]
    options = {"alpha": 0.0, "batch_size": 20, "max_iter": 20}
    theirs, ours = both(name, data, epsilon=0.01, **options)
    other, _ = both(name, data, epsilon=0.011, **options)
    for expected, actual, off in zip(theirs.coefs_, ours.coefs_, other.coefs_, strict=True):
        assert np.abs(actual - expected).max() < 0.25 * np.abs(off - expected).max()


@pytest.mark.slow
def test_adam_until_convergence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        theirs, ours = both("MLPClassifier", cancer(), batch_size=32, max_iter=1000)
    assert ours.n_iter_ == theirs.n_iter_ < 1000
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-3, atol=1e-6)
    assert (ours.best_loss_, ours.loss_) == (min(ours.loss_curve_), ours.loss_curve_[-1])
    assert ours.score(*cancer()) == theirs.score(*cancer())


@pytest.mark.parametrize("case", ["binary", "classes", "number"])
def test_scores_within_the_noise_of_seeds(case: str) -> None:
    name, (X, y) = CASES[case]
    half = len(X) // 2
    scores: list[list[float]] = [[], []]
    for seed in range(5):
        fitted = both(name, (X[:half], y[:half]), random_state=seed, learning_rate_init=0.01)
        for found, estimator in zip(scores, fitted, strict=True):
            found.append(estimator.score(X[half:], y[half:]))
    theirs, ours = scores
    assert abs(np.mean(ours) - np.mean(theirs)) <= np.std(theirs) + 0.005


@pytest.mark.parametrize("case", ["binary", "classes", "labels", "numbers"])
def test_early_stopping(case: str) -> None:
    name, data = CASES[case]
    options = {"early_stopping": True, "n_iter_no_change": 3, "max_iter": 60, "solver": "sgd"}
    theirs, ours = both(name, data, learning_rate_init=0.05, **options)
    assert_same(theirs, ours, losses=1e-3)  # weights are the best, put back
    assert ours.validation_scores_ == pytest.approx(theirs.validation_scores_)
    assert ours.best_validation_score_ == max(ours.validation_scores_)
    assert ours.best_loss_ is None
    assert len(ours.validation_scores_) == ours.n_iter_


def test_stops_as_scikit_learn_says(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.05, "n_iter_no_change": 1}
    lines = []
    for kind in (neural_network.MLPClassifier, MLPClassifier):
        kind((8,), random_state=0, alpha=0.0, verbose=True, **options).fit(*cancer())
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0] == lines[1]
    assert any(line.endswith("Setting learning rate to 0.000200") for line in lines[1])
    assert lines[1][-1].endswith("Learning rate too small. Stopping.")


@each
def test_warns_where_it_has_not_converged(estimator: Any) -> None:
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\) reached"):
        estimator(max_iter=2).fit(*cancer())
    with pytest.warns(UserWarning, match="batch_size"):
        estimator(max_iter=2, batch_size=1000).fit(*cancer())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("copy", ["", "pickle", "clone of weights"])
def test_partial_fit(case: str, copy: str) -> None:
    """Epochs go on from the weights and the optimizer of the last call, or of a fit."""
    name, (X, y) = CASES[case]
    options = {"random_state": 0, "batch_size": 50, "alpha": 0.0, "solver": "sgd"}
    kinds = (getattr(neural_network, name), globals()[name])
    theirs, ours = (kind(hidden_layer_sizes=(8,), **options) for kind in kinds)
    classes = np.arange(y.shape[1]) if case == "labels" else np.unique(y)
    keywords = {"classes": classes} if name == "MLPClassifier" else {}
    for rows in pairwise(range(0, 301, 100)):
        for estimator in (theirs, ours):
            estimator.partial_fit(X[slice(*rows)], y[slice(*rows)], **keywords)
        if copy == "pickle":
            ours = pickle.loads(pickle.dumps(ours))
        if copy == "clone of weights":
            for estimator in (theirs, ours):
                estimator.coefs_ = [0.5 * coef for coef in estimator.coefs_]
    assert_same(theirs, ours)


def test_partial_fit_after_fit_and_with_another_activation() -> None:
    fitted = both("MLPClassifier", digits(), solver="sgd", max_iter=3, alpha=0.0)
    for estimator in fitted:
        estimator.set_params(activation="tanh").partial_fit(*digits())
    assert_same(*fitted)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"learning_rate": "invscaling"}),
        ({"learning_rate": "invscaling"}, {"learning_rate": "constant"}),
        ({"learning_rate": "invscaling"}, {"learning_rate_init": 0.01, "power_t": 0.1}),
        ({"learning_rate": "adaptive"}, {"learning_rate": "constant"}),
        ({"solver": "adam"}, {"solver": "sgd", "learning_rate": "invscaling"}),
    ],
    ids=["invscaling", "constant", "rate", "not-adaptive", "sgd"],
)
def test_an_optimizer_keeps_its_settings(before: Any, after: Any) -> None:
    """A fit makes another, partial_fit does not."""
    options = {"solver": "sgd", "learning_rate_init": 0.1, "alpha": 0.0, "max_iter": 3} | before
    fitted = both("MLPClassifier", digits(200), tol=1.0, n_iter_no_change=1, **options)
    for estimator in fitted:
        estimator.set_params(**after)
        for _ in range(4):
            estimator.partial_fit(*digits(200))
    assert_same(*fitted)


def reverse(e: Any) -> None:
    e.coefs_[0] = e.coefs_[0][:, ::-1]


def swap(e: Any) -> None:
    e.coefs_[1], e.coefs_[2] = e.coefs_[2], e.coefs_[1]


def prune(e: Any) -> None:
    e.coefs_[0], e.coefs_[1] = e.coefs_[0][:, :4], e.coefs_[1][:4]
    e.intercepts_[0] = e.intercepts_[0][:4]


def float32(e: Any) -> None:
    e.coefs_[0] = e.coefs_[0].astype(np.float32)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("change", [reverse, swap, prune, float32])
def test_coefs_that_are_assigned(change: Any, method: str) -> None:
    """Also views of the old ones. partial_fit keeps an optimizer, which has shapes."""
    options = {"hidden_layer_sizes": (8, 8, 8), "solver": "sgd", "alpha": 0.0, "max_iter": 3}
    fitted = both("MLPRegressor", numbers(2), warm_start=True, **options)
    for estimator in fitted:
        change(estimator)
        if (change, method) == (prune, "partial_fit"):
            with pytest.raises(ValueError, match="shapes"):
                estimator.partial_fit(*numbers(2))
        else:
            getattr(estimator, method)(*numbers(2))
    theirs, ours = fitted
    if change is float32:  # scikit-learn rounds updates to float32
        np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], rtol=1e-3, atol=1e-5)
    elif (change, method) != (prune, "partial_fit"):
        assert_same(theirs, ours)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_another_number_of_outputs(method: str, outputs: int) -> None:
    regressor = MLPRegressor(hidden_layer_sizes=(8,), warm_start=True).fit(*numbers(2))
    message = rf"^MLPRegressor: this training needs .*\(8, {outputs}\).*, got .*\(8, 2\)"
    with pytest.raises(ValueError, match=message):
        getattr(regressor, method)(*numbers(outputs))


def test_warm_start() -> None:
    options = {"solver": "sgd", "max_iter": 3, "warm_start": True, "alpha": 0.0}
    fitted = both("MLPClassifier", digits(), **options)
    for estimator in fitted:
        estimator.fit(*digits())
    assert_same(*fitted)
    with pytest.raises(ValueError, match="same classes"):
        fitted[1].fit(*digits(5))


def test_seeds() -> None:
    X, y = digits()
    fits = [MLPClassifier((8,), random_state=s, max_iter=2).fit(X, y) for s in (0, 0, 1)]
    assert np.array_equal(fits[0].coefs_[0], fits[1].coefs_[0])
    assert not np.array_equal(fits[0].coefs_[0], fits[2].coefs_[0])
    before = torch.get_rng_state()
    MLPClassifier((8,), max_iter=2).fit(X, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_pipeline_and_search() -> None:
    X, y = digits(300)
    model = make_pipeline(
        StandardScaler(), MLPClassifier((16,), learning_rate_init=0.01, random_state=0)
    )
    assert cross_val_score(model, X, y, cv=3).mean() > 0.8
    search = GridSearchCV(model, {"mlpclassifier__alpha": [1e-4, 1e-2]}, cv=2).fit(X, y)
    assert search.best_estimator_.predict(X).shape == y.shape
    assert clone(search.best_estimator_[-1]).get_params() == search.best_estimator_[-1].get_params()


@pytest.mark.slow
def test_search_in_two_processes() -> None:
    X, y = digits(300)
    model = MLPClassifier((16,), max_iter=5, random_state=0)
    options: dict[str, Any] = {"param_grid": {"alpha": [1e-4, 1.0]}, "cv": 2}
    one, two = (GridSearchCV(model, **options, n_jobs=n).fit(X, y) for n in (1, 2))
    for key in ("mean_test_score", "std_test_score"):
        np.testing.assert_allclose(two.cv_results_[key], one.cv_results_[key])


@pytest.mark.filterwarnings("error")
def test_examples_run() -> None:
    assert doctest.testmod(mlp_ext.sklearn) == (0, 10)


def test_parameters_are_scikit_learns() -> None:
    for name in NAMES:
        ours, theirs = globals()[name](), getattr(neural_network, name)()
        assert ours.get_params() == theirs.get_params()
        assert isinstance(ours, type(theirs))


@pytest.mark.parametrize(
    ("options", "fit", "error", "message"),
    [
        ({"solver": "lbfgs"}, {}, ValueError, "solver='lbfgs' is not supported; use sklearn."),
        ({}, {"sample_weight": np.ones(569)}, TypeError, "sample_weight is not supported; use skl"),
        ({}, {"X": csr_matrix(cancer()[0])}, TypeError, r"X is sparse; pass X.toarray\(\), or use"),
    ],
    ids=["lbfgs", "sample_weight", "sparse"],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@each
def test_errors(
    estimator: Any, method: str, options: Any, fit: Any, error: Any, message: str
) -> None:
    X, y = cancer()
    classes = {"classes": [0, 1]} if (estimator, method) == (MLPClassifier, "partial_fit") else {}
    with pytest.raises(error, match=message) as raised:
        getattr(estimator(**options), method)(**({"X": X, "y": y} | classes | fit))
    assert str(raised.value).endswith(f"sklearn.neural_network.{estimator.__name__}")


def test_arguments_are_in_the_order_of_scikit_learn() -> None:
    (X, y), weights = cancer(), np.ones(569)
    for name in NAMES:
        ours, theirs = globals()[name](), getattr(neural_network, name)
        assert signature(ours.partial_fit).parameters.keys() == (
            signature(theirs().partial_fit).parameters.keys()
        )
        for method in (ours.fit, ours.partial_fit):
            with pytest.raises(TypeError, match="sample_weight is not supported; use sklearn"):
                method(X, y, weights)
    assert [*MLPClassifier().partial_fit(X, y, None, [0, 1, 2]).classes_] == [0, 1, 2]
    MLPClassifier(max_iter=1).fit(X, y, None)


def test_ensembles_that_weigh_rows_draw_them() -> None:
    """They pass weights to a fit with an argument sample_weight."""
    model = BaggingClassifier(MLPClassifier((8,), max_iter=5), 2, random_state=0)
    assert model.fit(*cancer()).score(*cancer()) > 0.5


def test_other_errors() -> None:
    X, y = cancer()
    with pytest.raises(ValueError, match="The 'solver' parameter of MLPClassifier must be"):
        MLPClassifier(solver="lbgfs").fit(X, y)
    with pytest.raises(ValueError, match="loss='poisson' is not supported; use sklearn"):
        MLPRegressor(loss="poisson").fit(X, y)
    with pytest.raises(ValueError, match="does not support early_stopping"):
        MLPClassifier(early_stopping=True).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="validation set is too small"):
        MLPRegressor(early_stopping=True).fit(X[:5], y[:5])
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        MLPRegressor(solver="sgd", learning_rate_init=1e30).fit(X * 1e20, y)


@pytest.fixture(params=["no_grad", "inference_mode", "autocast", "anomaly"])
def state(request: pytest.FixtureRequest) -> Iterator[None]:
    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": partial(torch.autocast, "cpu"),
        "anomaly": torch.autograd.detect_anomaly,
    }
    with contexts[request.param]():
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_states_of_torch_do_not_matter(state: None) -> None:
    assert_same(*both("MLPClassifier", digits(), solver="sgd", max_iter=2, alpha=0.0))


@pytest.mark.filterwarnings("error::UserWarning")
def test_arrays_of_any_layout() -> None:
    X, y = digits(100)

    def fitted(X: Any, shuffle: bool) -> MLPClassifier:
        return MLPClassifier((8,), max_iter=2, random_state=0, shuffle=shuffle).fit(X, y)

    expected = {shuffle: fitted(X, shuffle) for shuffle in (True, False)}
    read_only = X.copy()
    read_only.flags.writeable = False
    for other in (np.asfortranarray(X), X[::-1].copy()[::-1], read_only, X.astype(">f8")):
        for shuffle, native in expected.items():
            np.testing.assert_array_equal(fitted(other, shuffle).coefs_[0], native.coefs_[0])
            np.testing.assert_array_equal(native.predict_proba(other), native.predict_proba(X))


def test_diabetes_with_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = load_diabetes(return_X_y=True)
    frame = pandas.DataFrame(X * 20, columns=[f"f{i}" for i in range(10)])
    model = MLPRegressor(hidden_layer_sizes=(8,), max_iter=5, random_state=0).fit(frame, y / 100)
    assert [*model.feature_names_in_] == [*frame.columns]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[frame.columns[::-1]])


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_scikit_learn_is_optional() -> None:
    code = """
import sys
import mlp_ext
assert not any(name.partition(".")[0] == "sklearn" for name in sys.modules)
sys.modules["sklearn"] = None
try:
    import mlp_ext.sklearn
except ImportError as error:
    print(error)
"""
    message = 'scikit-learn, which is not installed; type: pip install "scikit-learn>=1.7"'
    assert python(code) == f"mlp_ext.sklearn needs {message}"


@pytest.mark.slow
def test_a_scikit_learn_with_another_loop_is_refused() -> None:
    code = """
from sklearn.neural_network import MLPClassifier
del MLPClassifier.__mro__[2]._fit_stochastic
try:
    import mlp_ext.sklearn
except ImportError as error:
    print(error)
"""
    assert "mlp_ext.sklearn needs scikit-learn 1.7 to 1.9, got" in python(code)
