"""skorch: estimators of scikit-learn around a fused module, cloned, searched and pickled."""

import pickle

import numpy as np
import torch
from clients import NATIVE, Body, at, close, levels
from sklearn.datasets import make_classification
from sklearn.model_selection import GridSearchCV, cross_val_predict
from skorch import NeuralNetClassifier
from torch import Tensor, nn


class Classifier(nn.Module):
    def __init__(self, level: str = NATIVE, width: int = 16) -> None:
        super().__init__()
        self.layers = at(
            level,
            nn.Sequential(
                nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 8), nn.Tanh()
            ),
        )
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))


def estimator(level: str) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        Classifier,
        module__level=level,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        max_epochs=2,
        lr=0.01,
        verbose=0,
    )


X, Y = make_classification(120, 8, random_state=0)
X = X.astype(np.float32)


@levels
def test_grid_search(level: str) -> None:
    scores = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        grid = {"lr": [0.01, 0.1], "module__width": [4, 16]}
        search = GridSearchCV(estimator(kind), grid, cv=3, scoring="neg_log_loss")
        search.fit(X, Y)
        scores.append(torch.from_numpy(search.cv_results_["mean_test_score"]))
    close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


@levels
def test_predictions_and_pickle(level: str) -> None:
    outputs = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        outputs.append(cross_val_predict(estimator(kind), X, Y, cv=3, method="predict_proba"))
        fitted = estimator(kind).fit(X, Y)
        outputs.append(fitted.predict_proba(X))
        np.testing.assert_allclose(
            pickle.loads(pickle.dumps(fitted)).predict_proba(X), outputs[-1], rtol=1e-6
        )
    np.testing.assert_allclose(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs[3], outputs[1], rtol=1e-4, atol=1e-5)


@levels
def test_partial_fit_of_a_module(level: str) -> None:
    losses = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        model = NeuralNetClassifier(
            Body(Classifier(kind)), criterion=nn.CrossEntropyLoss, lr=0.1, verbose=0, max_epochs=2
        )
        model.partial_fit(X, Y).partial_fit(X, Y)
        losses.append(torch.tensor(model.history[:, "train_loss"]))
    close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
