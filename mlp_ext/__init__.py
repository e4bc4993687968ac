"""Fused linear layers for PyTorch: LinearReLU(K, N) equals Sequential(Linear(K, N), ReLU())."""

from mlp_ext.functional import linear_act, linear_relu, linear_sigmoid
from mlp_ext.fuse import fuse, fusion_report, unfuse
from mlp_ext.nn import LinearReLU, LinearSigmoid, LinearTanh
from mlp_ext.ops import ACTIVATIONS, build_info

__version__: str = build_info()["mlp_ext"]

__all__ = [
    "ACTIVATIONS",
    "LinearReLU",
    "LinearSigmoid",
    "LinearTanh",
    "build_info",
    "fuse",
    "fusion_report",
    "linear_act",
    "linear_relu",
    "linear_sigmoid",
    "unfuse",
]
