"""MLPClassifier and MLPRegressor of scikit-learn, trained by TrainStep.

They are subclasses of scikit-learn's own with another loop over epochs and batches. Parameters,
checks, first weights, stopping, predictions and scores are inherited.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import chain, pairwise
from typing import Any, NamedTuple

try:
    import sklearn
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    what = 'scikit-learn, which is not installed; type: pip install "scikit-learn>=1.7"'
    raise ImportError(f"mlp_ext.sklearn needs {what}") from None

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from mlp_ext.functional import linear_act
from mlp_ext.train_step import TrainStep

# The method that is replaced is not public. It is like this from 1.7 on.
_loop = getattr(neural_network.MLPClassifier, "_fit_stochastic", lambda: None)
_names = [*signature(_loop).parameters]
if _names[1:4] != ["X", "y", "sample_weight"] or _names[-1] != "incremental":
    what = f'1.7 to 1.9, got {sklearn.__version__}; type: pip install "scikit-learn>=1.7,<1.10"'
    raise ImportError(f"mlp_ext.sklearn needs scikit-learn {what}")

__all__ = ["MLPClassifier", "MLPRegressor"]

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {  # module, name in linear_act
    "identity": (nn.Identity, "identity"),
    "logistic": (nn.Sigmoid, "sigmoid"),
    "tanh": (nn.Tanh, "tanh"),
    "relu": (nn.ReLU, "relu"),
}
GATHERED = 1 << 19  # bytes of shuffled rows per call of fit: they should stay in the cache
# Adam's steps per call: at most one for each 16 before, so that eps, which is right for those in
# the middle, is off by less than 2% for the others: see Training._settings.
STEPS_BEFORE = 16


class Loss(NamedTuple):
    """A loss of scikit-learn by one of torch, for N outputs."""

    criterion: Callable[[], nn.Module]
    output: Callable[[Tensor], Tensor]  # the activation of the output
    of_loss: Callable[[int], float]  # scikit-learn's loss is that of criterion times this,
    of_gradient: Callable[[int], float]  # and its gradient the gradient of criterion times this


LOSSES: dict[str, Loss] = {  # by out_activation_
    "softmax": Loss(nn.CrossEntropyLoss, partial(torch.softmax, dim=1), lambda N: 1, lambda N: 1),
    "logistic": Loss(nn.BCEWithLogitsLoss, torch.sigmoid, lambda N: N, lambda N: N),
    # Half of the square: the loss is its mean over outputs, the gradient that of its sum.
    "identity": Loss(nn.MSELoss, nn.Identity(), lambda N: 0.5, lambda N: N / 2),
}


class Training:
    """The network of an estimator and its optimizer, which partial_fit keeps between calls.

    Gradients are torch's, so scikit-learn's divided by a constant c. Settings follow from that:
    the learning rate of SGD is c times scikit-learn's, weight decay and Adam's eps a c-th of it.
    """

    def __init__(self, estimator: Any) -> None:
        e = estimator
        dtype = getattr(torch, np.result_type(np.float32, *e.coefs_, *e.intercepts_).name)
        self.layers = [
            nn.Linear(K, N, device="meta", dtype=dtype).to_empty(device="cpu")
            for K, N in (coef.shape for coef in e.coefs_)
        ]
        self.output, self.outputs = e.out_activation_, e.n_outputs_
        self.c = LOSSES[self.output].of_gradient(self.outputs)
        self.first_rate = self.rate = float(e.learning_rate_init)
        self.schedule = e.learning_rate if e.solver == "sgd" else "constant"
        self.power_t = e.power_t
        self.epsilon, self.beta_2 = float(e.epsilon), float(e.beta_2)
        self.steps = 0
        groups = [{"params": [getattr(layer, name) for layer in self.layers]} for name in _NAMES]
        self.optimizer: torch.optim.Optimizer
        if e.solver == "adam":
            betas = (float(e.beta_1), self.beta_2)
            self.optimizer = torch.optim.Adam(groups, lr=self.rate, betas=betas)
        else:
            self.optimizer = torch.optim.SGD(
                groups,
                lr=self.rate * self.c,
                momentum=float(e.momentum),
                nesterov=bool(e.nesterovs_momentum and e.momentum > 0),
            )

    def begin(self, estimator: Any) -> None:
        """Takes over the estimator's weights, activation and alpha; its weights become views."""
        e = estimator
        self.alpha = float(e.alpha)
        weights, biases = ([getattr(layer, name) for layer in self.layers] for name in _NAMES)
        own = [weight.detach().numpy().T for weight in weights]
        own += [bias.detach().numpy() for bias in biases]
        arrays = [*e.coefs_, *e.intercepts_]
        _check_shapes(e, [array.shape for array in own])
        # Others were set by the user, or come from pickle. All are copied before any is written.
        others = [
            (mine, array.copy())
            for mine, array in zip(own, arrays, strict=True)
            if mine.__array_interface__ != array.__array_interface__
        ]
        for mine, array in others:
            mine[...] = array
        e.coefs_, e.intercepts_ = own[: len(weights)], own[len(weights) :]
        self.weights = [weight.detach().flatten() for weight in weights]
        self.squares = self._squares()  # the sum of those of all weights
        modules = chain(*((layer, ACTIVATIONS[e.activation][0]()) for layer in self.layers))
        model = nn.Sequential(*[*modules][:-1])
        self.step = TrainStep(model, LOSSES[self.output].criterion(), self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        made_by_begin = ("step", "weights")
        return {name: value for name, value in vars(self).items() if name not in made_by_begin}

    def epoch(self, rows: Rows, batch_size: int) -> float:
        """Trains on the rows batch after batch; returns scikit-learn's loss of the epoch."""
        n, total, begin = rows.count, 0.0, 0
        while begin < n:
            batch = min(batch_size, n - begin)
            count = min((n - begin) // batch, rows.most // batch or 1, self._most_steps())
            end = begin + count * batch
            self._settings(batch, count)
            x, y = rows(begin, end)
            total += self.step._epoch(x, y, batch) * (end - begin)
            self.steps += count
            begin = end
        batches = -(-n // batch_size)
        before, self.squares = self.squares, self._squares()
        # Their mean over the beginnings of the batches, as if they changed evenly.
        mean = before + (self.squares - before) * (batches - 1) / (2 * batches)
        penalty = 0.5 * self.alpha * mean * batches
        return (total * LOSSES[self.output].of_loss(self.outputs) + penalty) / n

    def set_rate(self, rate: float) -> None:
        """Sets SGD's rate. scikit-learn's velocity is -rate times torch's momentum_buffer, so that
        this is rescaled.
        """
        for state in self.optimizer.state.values():
            if (buffer := state.get("momentum_buffer")) is not None:
                buffer *= self.rate / rate
        self.rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.c

    def _most_steps(self) -> int:
        is_adam = isinstance(self.optimizer, torch.optim.Adam)
        return max(1, self.steps // STEPS_BEFORE) if is_adam else 1 << 62

    def _settings(self, batch: int, steps: int) -> None:
        """Sets weight decay and eps for the next steps.

        scikit-learn divides alpha by the rows of the batch, and adds epsilon to the root of Adam's
        second moment before its bias correction, torch after.
        """
        weights, biases = self.optimizer.param_groups
        weights["weight_decay"] = self.alpha / (batch * self.c)
        if isinstance(self.optimizer, torch.optim.Adam):
            correction = (1 - self.beta_2 ** (self.steps + (steps + 1) / 2)) ** 0.5
            weights["eps"] = biases["eps"] = self.epsilon / (self.c * correction)

    def _squares(self) -> float:
        # Not by NumPy's BLAS, whose threads would then spin beside those of the steps.
        return sum(w.dot(w).item() for w in self.weights) if self.alpha else 0.0


_NAMES = ("weight", "bias")


def _check_shapes(estimator: Any, expected: list[tuple[int, ...]]) -> None:
    """Raises where coefs_ and intercepts_ have other shapes."""
    shapes = [array.shape for array in (*estimator.coefs_, *estimator.intercepts_)]
    if shapes != expected:
        what = f"this training needs coefs_ and intercepts_ of shapes {expected}, got {shapes}"
        raise ValueError(f"{type(estimator).__name__}: {what}")


def _tensor(array: Any) -> Tensor:
    """In the memory of the array, but for those that torch refuses or warns of."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


class Rows:
    """Inputs and targets: views of them or, after shuffle, gathered into buffers."""

    def __init__(self, X: Any, y: Any, batch_size: int, shuffle: bool) -> None:
        self.count = len(X)
        batches = max(1, GATHERED // max(1, X[:1].nbytes * batch_size))
        self.most = min(self.count, batches * batch_size) if shuffle else self.count
        self.order: Any = np.arange(self.count) if shuffle else None
        self.arrays = [np.require(a, requirements="C") for a in (X, y)]
        gathered = [np.empty((self.most, *a.shape[1:]), a.dtype) for a in self.arrays]
        self.tensors = [_tensor(a) for a in (gathered if shuffle else self.arrays)]
        self.buffers: dict[int, tuple[list[Tensor], list[Any]]] = {}  # by their number of rows

    def shuffle(self, random_state: Any) -> None:
        """As sklearn.utils.shuffle, without its checks."""
        indices = np.arange(self.count)
        random_state.shuffle(indices)
        self.order = self.order[indices]

    def __call__(self, begin: int, end: int) -> list[Tensor]:
        if self.order is None:
            return [tensor[begin:end] for tensor in self.tensors]
        if not (buffers := self.buffers.get(end - begin)):
            tensors = [tensor[: end - begin] for tensor in self.tensors]
            buffers = self.buffers[end - begin] = (tensors, [t.numpy() for t in tensors])
        indices = self.order[begin:end]
        for array, buffer in zip(self.arrays, buffers[1], strict=True):
            array.take(indices, 0, buffer, "clip")  # "raise" would copy
        return buffers[0]


class _TrainedBySteps:
    """What the two estimators replace."""

    # Not named sample_weight: BaggingClassifier and others pass weights where fit has that name.
    def fit(self, X: Any, y: Any, *weights: Any, **unsupported: Any) -> Any:
        """Trains on all rows, for at most `max_iter` epochs.

        Args:
            X (array): inputs, dense. float32 is trained in float32, all else in float64.
            y (array): classes, an indicator matrix of labels, or numbers.
            *weights: none, or the `sample_weight` None.
            **unsupported: what only scikit-learn's own estimator has.

        Shape:
            - X: `(n_samples, n_features)`.
            - y: `(n_samples)` or `(n_samples, n_outputs)`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: a parameter, X or y is not supported.
        """
        _check(self, X, unsupported | dict(zip(["sample_weight"], weights, strict=False)))
        return super().fit(X, y, *weights)  # type: ignore[misc]

    def partial_fit(self, X: Any, y: Any, sample_weight: None = None) -> Any:
        """Trains for one epoch, beginning where the last call ended.

        Args:
            X (array): inputs, dense.
            y (array): targets, as in `fit`.
            sample_weight: not supported.

        Shape:
            - X: `(n_samples, n_features)`.
            - y: `(n_samples)` or `(n_samples, n_outputs)`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: a parameter, X or y is not supported.
        """
        _check(self, X, {"sample_weight": sample_weight})
        return super().partial_fit(X, y)  # type: ignore[misc]

    def _fit_stochastic(self: Any, X: Any, y: Any, sample_weight: Any, *rest: Any) -> None:
        """In place of scikit-learn's loop. X, y: checked; y is one-hot or an indicator matrix for a
        classifier."""
        is_incremental = rest[-1]
        if is_incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        X_val = y_val = None
        if self.early_stopping:
            X, X_val, y, y_val = self._split(X, y)
        n = len(X)
        batch_size = min(200 if self.batch_size == "auto" else self.batch_size, n)
        if self.batch_size not in ("auto", batch_size):
            _warn(f"Got `batch_size` {self.batch_size}, more than the {n} rows. It is clipped.")
        widths = [X.shape[1], *(coef.shape[-1] for coef in self.coefs_[:-1]), y.shape[1]]
        _check_shapes(self, [*pairwise(widths), *((N,) for N in widths[1:])])
        with _usual_state():
            if not (is_incremental and hasattr(self, "_training")):
                self._training = Training(self)
            self._training.begin(self)
            dtype = self.coefs_[0].dtype
            y = y.argmax(1) if self.out_activation_ == "softmax" else y.astype(dtype)
            rows = Rows(X.astype(dtype, copy=False), y, batch_size, self.shuffle)
            try:
                self._train(rows, batch_size, X_val, y_val, is_incremental)
            except KeyboardInterrupt:
                _warn("Training interrupted by user.")
        if self.early_stopping:
            self.coefs_, self.intercepts_ = self._best_coefs, self._best_intercepts

    def _split(self: Any, X: Any, y: Any) -> list[Any]:
        """X, X_val, y, y_val."""
        found: list[Any] = train_test_split(
            X,
            y,
            random_state=self._random_state,
            test_size=self.validation_fraction,
            stratify=y if is_classifier(self) and self.n_outputs_ == 1 else None,
        )
        if len(found[1]) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' "
                "or the size of your dataset."
            )
        if is_classifier(self):
            found[3] = self._label_binarizer.inverse_transform(found[3])
        return found

    def _train(
        self: Any, rows: Rows, batch_size: int, X_val: Any, y_val: Any, is_incremental: bool
    ) -> None:
        training = self._training
        self.n_iter_ = 0
        while self.n_iter_ < self.max_iter:
            if self.shuffle:
                rows.shuffle(self._random_state)
            self.loss_ = training.epoch(rows, batch_size)
            self.n_iter_ += 1
            self.t_ += rows.count
            self.loss_curve_.append(self.loss_)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
            self._update_no_improvement_count(self.early_stopping, X_val, y_val, None)
            if training.schedule == "invscaling":
                training.set_rate(training.first_rate / (self.t_ + 1) ** training.power_t)
            if self._no_improvement_count > self.n_iter_no_change and self._stops(training):
                break
            if is_incremental:
                break
        else:
            _warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the "
                "optimization hasn't converged yet.",
                ConvergenceWarning,
            )

    def _stops(self: Any, training: Training) -> bool:
        """Whether training ends after epochs without improvement; else the rate was lowered."""
        is_adaptive = training.schedule == "adaptive"
        ends, does = True, "Stopping."
        if is_adaptive and training.rate > 1e-6:
            training.set_rate(training.rate / 5)
            self._no_improvement_count = 0
            ends, does = False, f"Setting learning rate to {training.rate:f}"
        elif is_adaptive:
            does = "Learning rate too small. Stopping."
        if self.verbose:
            what = "Validation score" if self.early_stopping else "Training loss"
            epochs = f"{self.n_iter_no_change} consecutive epochs"
            print(f"{what} did not improve more than tol={self.tol:f} for {epochs}. {does}")
        return ends

    def _forward_pass_fast(self: Any, X: Any, check_input: bool = True) -> Any:
        """The outputs for predictions and scores. As above, not by NumPy's BLAS."""
        if check_input:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        dtype = self.coefs_[0].dtype
        if issparse(X) or np.result_type(X, dtype) != dtype:
            return super()._forward_pass_fast(X, check_input=False)  # type: ignore[misc]
        with _usual_state(), torch.no_grad():
            y = _tensor(X.astype(dtype, copy=False))  # the last layer's output
            names = [ACTIVATIONS[self.activation][1]] * (self.n_layers_ - 2) + ["identity"]
            for coef, intercept, name in zip(self.coefs_, self.intercepts_, names, strict=True):
                y = linear_act(y, _tensor(coef.T), _tensor(intercept), name)
            return LOSSES[self.out_activation_].output(y).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.sparse = False
        return tags


def _warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning of the user's line that called the estimator."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


_BETWEEN = ("mlp_ext", "sklearn", "joblib")  # packages between the user's line and the loop


def _check(estimator: Any, X: Any, unsupported: Mapping[str, Any]) -> None:
    """Raises where scikit-learn's own estimator must be used."""
    name = type(estimator).__name__
    instead = f"use sklearn.neural_network.{name}"
    for parameter, value in (("solver", "lbfgs"), ("loss", "poisson")):
        if getattr(estimator, parameter, None) == value:
            raise ValueError(f"{name}: {parameter}={value!r} is not supported; {instead}")
    for argument in (name for name, value in unsupported.items() if value is not None):
        raise TypeError(f"{name}: {argument} is not supported; {instead}")
    if issparse(X):
        raise TypeError(f"{name}: X is sparse; pass X.toarray(), or {instead}")


@contextmanager
def _usual_state() -> Iterator[None]:
    """That of torch: steps refuse no_grad, inference_mode, autocast and anomaly detection."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autograd.set_detect_anomaly(False),
    ):
        yield


class MLPClassifier(_TrainedBySteps, neural_network.MLPClassifier):  # type: ignore[misc]
    """`sklearn.neural_network.MLPClassifier`, trained by `TrainStep`.

    A subclass with the same parameters, attributes and methods. A `random_state` draws the same
    first weights and the same batches, so results are scikit-learn's but for this:

    - `solver="lbfgs"`, sparse inputs and `sample_weight` are not supported.
    - Rounding; and Adam's `epsilon` is off by up to 2%, since a call of many steps has one.
    - In `loss_curve_`, the share of `alpha` is computed from the weights at both ends of an epoch,
      not before each batch.
    - The log loss is not clipped, which matters where the network is very sure and wrong.
    - `coefs_` and `intercepts_` are views of the network that `partial_fit` and `warm_start` train.

    As with scikit-learn, inputs of float32 are trained in float32, all others in float64. Pass
    `X.astype(numpy.float32)` for the shortest time.

    Examples:
        >>> from sklearn.datasets import load_digits
        >>> from mlp_ext.sklearn import MLPClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> classifier = MLPClassifier((64,), random_state=0).fit(X[:1500] / 16, y[:1500])
        >>> classifier.score(X[1500:] / 16, y[1500:]) > 0.9
        True
    """

    def partial_fit(
        self, X: Any, y: Any, sample_weight: None = None, classes: Any = None
    ) -> MLPClassifier:
        """Trains for one epoch, beginning where the last call ended.

        Args:
            X (array): inputs, dense.
            y (array): their classes, or an indicator matrix of labels.
            sample_weight: not supported.
            classes (array, optional): all classes; required in the first call.

        Shape:
            - X: `(n_samples, n_features)`.
            - y: `(n_samples)` or `(n_samples, n_outputs)`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: a parameter, X or y is not supported.
        """
        _check(self, X, {"sample_weight": sample_weight})
        found: MLPClassifier = super(_TrainedBySteps, self).partial_fit(X, y, classes=classes)
        return found


class MLPRegressor(_TrainedBySteps, neural_network.MLPRegressor):  # type: ignore[misc]
    """`sklearn.neural_network.MLPRegressor`, trained by `TrainStep`.

    As [MLPClassifier][mlp_ext.sklearn.MLPClassifier]. `loss="poisson"` is not supported.

    Examples:
        >>> from sklearn.datasets import load_diabetes
        >>> from mlp_ext.sklearn import MLPRegressor
        >>> X, y = load_diabetes(return_X_y=True)
        >>> regressor = MLPRegressor(hidden_layer_sizes=(32,), random_state=0, max_iter=500)
        >>> regressor.fit(X * 20, y / 100).score(X * 20, y / 100) > 0.4
        True
    """
