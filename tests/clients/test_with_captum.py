"""captum and shap: attributions replace or hook activations, also of a fused model."""

from collections.abc import Callable

import captum.attr
import numpy as np
import pytest
import shap
import torch
from clients import close, levels, net, rows
from torch import Tensor, nn

METHODS: dict[str, Callable[[nn.Module], Tensor]] = {
    "DeepLift": lambda m: captum.attr.DeepLift(m).attribute(rows(), target=1),
    "DeepLiftShap": lambda m: captum.attr.DeepLiftShap(m).attribute(rows(), rows(seed=2), target=1),
    "GuidedBackprop": lambda m: captum.attr.GuidedBackprop(m).attribute(rows(), target=1),
    "Deconvolution": lambda m: captum.attr.Deconvolution(m).attribute(rows(), target=1),
    "LRP": lambda m: captum.attr.LRP(m).attribute(rows(), target=1),
    "IntegratedGradients": lambda m: captum.attr.IntegratedGradients(m).attribute(rows(), target=1),
    "Saliency": lambda m: captum.attr.Saliency(m).attribute(rows(), target=1),
    "LayerActivation": lambda m: captum.attr.LayerActivation(m, m[0]).attribute(rows()),
    "LayerActivation_of_relu": lambda m: captum.attr.LayerActivation(m, m[1]).attribute(rows()),
    "LayerConductance": lambda m: captum.attr.LayerConductance(m, m[1]).attribute(rows(), target=1),
    "LayerDeepLift": lambda m: captum.attr.LayerDeepLift(m, m[2]).attribute(rows(), target=1),
    "NeuronGradient": lambda m: captum.attr.NeuronGradient(m, m[2]).attribute(rows(), 3),
}


@levels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Setting (forward|backward)", "ignore:Input Tensor")
def test_attribution(level: str, method: str) -> None:
    expected = METHODS[method](net().eval())
    fused = net(level).eval()
    fused(rows())
    close(METHODS[method](fused), expected)
    close(METHODS[method](fused), expected)  # the hooks of the first are gone
    close(fused(rows()), net()(rows()))


@levels
@pytest.mark.parametrize("explainer", ["DeepExplainer", "GradientExplainer"])
def test_shap(level: str, explainer: str) -> None:
    values = []
    for model in (net(), net(level)):
        model.eval()(rows())
        torch.manual_seed(0)
        np.random.seed(0)
        explained = getattr(shap, explainer)(model, rows(20, seed=2))
        options = {"rseed": 0} if explainer == "GradientExplainer" else {"check_additivity": True}
        values.append(np.asarray(explained.shap_values(rows(3), **options)))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-5)
