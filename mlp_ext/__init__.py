"""Fused linear layers for PyTorch: LinearReLU(K, N) equals Sequential(Linear(K, N), ReLU())."""

import os
import warnings
from importlib.util import find_spec

if find_spec("numpy") is None:  # torch's first import would warn, and nothing here needs NumPy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

import torch

from mlp_ext import interop, machine, moved  # noqa: F401  for what they register and read
from mlp_ext.fitting import FitResult
from mlp_ext.functional import linear_act, linear_relu, linear_sigmoid, linear_tanh
from mlp_ext.fuse import FusionReport, Level, Site, fuse, fusion_report, unfuse
from mlp_ext.nn import (
    LinearELU,
    LinearGELU,
    LinearHardtanh,
    LinearLeakyReLU,
    LinearMish,
    LinearReLU,
    LinearReLU6,
    LinearSELU,
    LinearSigmoid,
    LinearSiLU,
    LinearSoftplus,
    LinearTanh,
)
from mlp_ext.ops import ACTIVATIONS, build_info, empty_cache
from mlp_ext.predict import predict
from mlp_ext.profile import Profile, Timing, profile
from mlp_ext.sequential import Sequential
from mlp_ext.train_step import TrainStep
from mlp_ext.train_steps import TrainSteps

moved.install()
if hasattr(os, "register_at_fork"):
    # PyTorch replaces a pool of threads in a child's first call of this, without a lock. OpenMP's
    # new threads would make that call at the same time, and some would find no pool.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
__version__: str = build_info()["mlp_ext"]

__all__ = [
    "ACTIVATIONS",
    "FitResult",
    "FusionReport",
    "Level",
    "LinearELU",
    "LinearGELU",
    "LinearHardtanh",
    "LinearLeakyReLU",
    "LinearMish",
    "LinearReLU",
    "LinearReLU6",
    "LinearSELU",
    "LinearSiLU",
    "LinearSigmoid",
    "LinearSoftplus",
    "LinearTanh",
    "Profile",
    "Sequential",
    "Site",
    "Timing",
    "TrainStep",
    "TrainSteps",
    "build_info",
    "empty_cache",
    "fuse",
    "fusion_report",
    "linear_act",
    "linear_relu",
    "linear_sigmoid",
    "linear_tanh",
    "predict",
    "profile",
    "unfuse",
]
