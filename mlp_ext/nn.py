"""Linear layers that compute their activation too: drop-in modules over functional.linear_act."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from mlp_ext.errors import CAUGHT, check_input, rename
from mlp_ext.functional import _linear_act
from mlp_ext.ops import ACTIVATIONS

Layer = TypeVar("Layer", bound="LinearAct")


class LinearAct(nn.Linear):
    """y = act(x W^T + b), an nn.Linear and the activation after it in one operator.

    Everything but forward is nn.Linear's: arguments, initialisation, state_dict, repr. A class
    statement with the activation's name and the torch.nn module of the same meaning makes a layer:

        class LinearReLU(LinearAct, activation="relu", module=nn.ReLU):

    Shape: input [*, in_features], output [*, out_features], * any dimensions, also none;
    weight [out_features, in_features], bias [out_features] or None.
    Dtypes: float32, float64, bfloat16, float16; input, weight and bias alike, under autocast as
    nn.Linear. An input of another shape, dtype or device raises before anything is computed.
    """

    activation: ClassVar[str]  # one of ACTIVATIONS
    by_module: ClassVar[dict[type, type[LinearAct]]] = {}  # nn.ReLU: LinearReLU, ...

    def __init_subclass__(
        cls, activation: str | None = None, module: type[nn.Module] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if activation is None:  # a subclass of a layer keeps its activation
            return
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{cls.__name__}: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        cls.activation = activation
        if module is not None:
            LinearAct.by_module[module] = cls

    def forward(self, input: Tensor) -> Tensor:
        try:
            return _linear_act(input, self.weight, self.bias, self.activation)
        except CAUGHT as error:
            check_input(type(self).__name__, input, self.weight)
            rename(error, type(self).__name__)
            raise

    @classmethod
    def from_linear(cls: type[Layer], linear: nn.Linear) -> Layer:
        """The layer over the Parameters of `linear`: the same objects, no copy, same training flag.

        Raises TypeError unless `linear` is exactly an nn.Linear, since a subclass may compute
        something else; ValueError where it carries what would be lost, such as hooks.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be exactly a torch.nn.Linear, "
                f"got {type_name(linear)}"
            )
        if addition := find_addition(linear, "in_features", "out_features"):
            raise ValueError(f"{cls.__name__}.from_linear: linear {addition}, which would be lost")
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta")
        layer._parameters.update(linear._parameters)
        layer.training = linear.training
        return layer


class LinearReLU(LinearAct, activation="relu", module=nn.ReLU):
    """y = relu(x W^T + b), relu(z) = max(z, 0) and relu'(0) = 0 (Nair and Hinton, ICML 2010).

    Arguments and state_dict of torch.nn.Linear; shapes, dtypes and errors of
    :func:`mlp_ext.linear_act`.
    """


class LinearSigmoid(LinearAct, activation="sigmoid", module=nn.Sigmoid):
    """y = sigmoid(x W^T + b), sigmoid(z) = 1 / (1 + e^-z) (Rumelhart et al., Nature 1986).

    Arguments and state_dict of torch.nn.Linear; shapes, dtypes and errors of
    :func:`mlp_ext.linear_act`.
    """


class LinearTanh(LinearAct, activation="tanh", module=nn.Tanh):
    """y = tanh(x W^T + b) (LeCun et al., Efficient BackProp, 1998).

    Arguments and state_dict of torch.nn.Linear; shapes, dtypes and errors of
    :func:`mlp_ext.linear_act`.
    """


__all__ = [
    "LinearReLU",
    "LinearSigmoid",
    "LinearTanh",
]  # public: the layers, listed for type checkers


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


MODULE_CODE = (
    "forward",
    "_call_impl",
    "_compiled_call_impl",
)  # where set, runs in place of the class's
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
_DYNAMO_LISTS_ATTRIBUTES = torch.__version__ >= (2, 12)  # type: ignore[operator]


def _own_attributes(module: nn.Module) -> list[str]:
    """The names set on the instance; for Dynamo before torch 2.12, which cannot list them, the
    known ones that change what it computes."""
    if torch.compiler.is_compiling() and not _DYNAMO_LISTS_ATTRIBUTES:
        return [name for name in MODULE_CODE if name in vars(module)]
    return [name for name in vars(module) if name not in _MODULE_ATTRIBUTES]


def find_addition(module: nn.Module, *own: str) -> str:
    """What was added to `module` since it was made, as "has forward hooks"; "" if nothing was.

    `own` names the plain attributes that its class gives it. Found are hooks of every kind, hence
    also pruning and the older weight_norm and spectral_norm; whatever was set on the instance, as a
    forward of its own, the call of Module.compile or a qconfig; parameters, buffers and children.
    """
    for name in _HOOKS:
        if vars(module)[name]:
            return f"has {name.strip('_').replace('_', ' ')}"
    attributes = [name for name in _own_attributes(module) if name not in own]
    parameters = [name for name in module._parameters if name not in ("weight", "bias")]
    for name in (*attributes, *parameters, *module._buffers, *module._modules):
        return f"has an attribute of its own, {name!r}"
    return ""


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A Parameter; what torch.func.functional_call puts in its place; what stands for it in tracing.
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def find_special(layer: nn.Module) -> str:
    """Which parameter the operators do not take, as "its weight is torch.int8"; "" if all do."""
    for name, parameter in layer._parameters.items():
        # A subclass is a quantized, sharded or otherwise special tensor.
        if parameter is not None and type(parameter) not in _PLAIN:
            return f"its {name} is a {type_name(parameter)}"
        if parameter is not None and parameter.layout is not torch.strided:
            return f"its {name} has layout {parameter.layout}"
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}"
    return ""


class FusedActivation(nn.Identity):
    """Holds the place of an activation that the fused layer before it computes."""

    def __init__(self, layer: LinearAct, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that none is a child: no state_dict keys, no visits by apply() or train().
        self.pair = (layer, linear, activation)

    def extra_repr(self) -> str:
        return repr(self.pair[2])
