"""Linear layers that compute their activation too: drop-in modules over functional.linear_act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import cleandoc, signature
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mlp_ext.errors import CAUGHT, as_float, check_input, kind, rename
from mlp_ext.functional import EAGER, PLAIN, _linear_act, native, needs_native
from mlp_ext.ops import ACTIVATIONS, PARAMETERS

Layer = TypeVar("Layer", bound="LinearAct")
T = TypeVar("T")


class Activation(NamedTuple):
    """An activation as the operators take it."""

    name: str  # one of ACTIVATIONS
    parameters: tuple[float, ...] = ()


def activation_of(module: object) -> Activation | None:
    """The activation that a module of torch.nn computes, with its current options; None if no layer
    is declared for its type, or an option is not a number.

    activation_of(nn.LeakyReLU(0.3)) is ("leaky_relu", (0.3,)), that of nn.ReLU6() is
    ("hardtanh", (0.0, 6.0)).
    """
    layer = _declared_for(type(module))
    return layer.read_from(module) if layer else None


def _declared_for(kind: type) -> type[LinearAct] | None:
    """The layer for a class of torch.nn, or a subclass that computes the same."""
    base = next((base for base in kind.__mro__ if base in LinearAct.by_module), None)
    return LinearAct.by_module[base] if base and computes_as(kind, base) else None


def computes_as(kind: type, base: type) -> bool:
    """Whether calls of class `kind` run the code of `base`: it is a subclass that overrides none of
    the methods involved. Nor does it define weight or bias, as parametrizations do."""
    return issubclass(kind, base) and all(
        getattr(kind, name, None) is getattr(base, name, None)
        for name in (*_CALL, "weight", "bias")
    )


def option_names(module: type[nn.Module]) -> tuple[str, ...]:
    """The options of a module of torch.nn, also those that change no value, such as inplace."""
    return tuple(getattr(module, "__constants__", ()))


# Constructors of torch.nn modules, one per activation, with default options.
MODULES: dict[str, Callable[[], nn.Module]] = {"identity": nn.Identity}


class _FromActivation(Generic[T]):
    """A layer's attribute that follows from its activation; on the class, from the defaults."""

    def __init__(self, part: Callable[[Activation], T]) -> None:
        self.part = part

    def __get__(self, layer: LinearAct | None, owner: type[LinearAct]) -> T:
        return self.part(layer.read() if layer is not None else owner.default)

    def __set__(self, layer: LinearAct, value: object) -> None:
        options = ", ".join(layer.options) or "no options"
        raise AttributeError(f"the activation of a {type(layer).__name__} follows from {options}")


# What follows the formula in the docstring of each layer.
LAYER_DOC = """
Equals `nn.Sequential(nn.Linear(in_features, out_features), nn.{module}({arguments}))`, as one
operator forward and one backward. Initialization, parameters and `state_dict` are those of
`nn.Linear`.

Args:
    in_features (int): size of each input sample, K.
    out_features (int): size of each output sample, N.
    bias (bool): if False, the layer has no bias b. Default: True.
    device (torch.device or str): device of weight and bias. None uses PyTorch's default device.
    dtype (torch.dtype): float32, float64, bfloat16 or float16, for weight and bias. None uses
        PyTorch's default dtype.
{options}
Shape:
    - Input: `(*, K)`, with any number of leading dimensions and the dtype of the weight. Under
      autocast, any dtype that `nn.Linear` accepts.
    - Output: `(*, N)`.
    - weight: `(N, K)`.
    - bias: `(N)`, or None.

Raises:
    TypeError: the input is not a tensor, or an option does not exist.
    ValueError: the value of an option is not supported.
    RuntimeError: the input's shape, dtype or device does not match the weight. Raised before
        anything is computed.

Examples:
    >>> layer = mlp_ext.{name}(20, 30)
    >>> layer(torch.randn(128, 20)).shape
    torch.Size([128, 30])
"""


def _document(layer: type[LinearAct], module: type[nn.Module]) -> str:
    """The docstring of a layer: its own, and what all layers share."""
    known = signature(module).parameters
    defaults = {name: known[name].default for name in layer.options if name in known}
    options = "".join(
        f"    {name} ({type(value).__name__}): as in `nn.{module.__name__}`. Default: {value!r}.\n"
        for name, value in defaults.items()
    )
    shared = LAYER_DOC.format(
        name=layer.__name__,
        module=module.__name__,
        arguments=", ".join(defaults),
        options=options,
    )
    return f"{cleandoc(layer.__doc__ or '')}\n{shared}"


class LinearAct(nn.Linear):
    """Base class of the layers. A class statement declares one, and its docstring has the formula:

        class LinearReLU(LinearAct, activation="relu", module=nn.ReLU):

    The options of `module` become keyword arguments and attributes of the layer. If an option
    selects another activation, `variants` maps the names of the activations to the options that
    select them. LAYER_DOC adds what all layers share to the docstring.

    With a weight that the operators do not support, such as a quantized one, in torch.export, and
    for a nested input with strides, a layer runs torch.nn.functional.linear and the activation.
    """

    activation = _FromActivation(lambda activation: activation.name)
    activation_parameters = _FromActivation(lambda activation: activation.parameters)

    default: ClassVar[Activation]  # with default options
    torch_module: ClassVar[type[nn.Module] | None]
    variants: ClassVar[Mapping[str, Mapping[str, object]]]
    options: ClassVar[tuple[str, ...]]  # those that change what is computed
    by_module: ClassVar[dict[type, type[LinearAct]]] = {}  # nn.ReLU: LinearReLU, ...

    def __init_subclass__(
        cls,
        activation: str | None = None,
        module: type[nn.Module] | None = None,
        variants: Mapping[str, Mapping[str, object]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if activation is None:  # a subclass of a layer keeps its activation
            return
        cls.torch_module, cls.variants = module, variants or {activation: {}}
        for name in (activation, *cls.variants):
            if name not in ACTIVATIONS:
                raise ValueError(
                    f"{cls.__name__}: activation must be one of {', '.join(ACTIVATIONS)}, "
                    f"got {name!r}"
                )
        if module is None:
            cls.default = Activation(activation, tuple(PARAMETERS[activation].values()))
            cls.options = ()
            return
        selecting = (option for options in cls.variants.values() for option in options)
        cls.options = tuple(dict.fromkeys((*PARAMETERS[activation], *selecting)))
        cls.__constants__ = [*cls.__constants__, *option_names(module)]
        default = cls.read_from(module())
        assert default is not None
        cls.default = default
        cls.__doc__ = _document(cls, module)
        LinearAct.by_module[module] = cls
        for name, options in cls.variants.items():
            MODULES.setdefault(name, partial(module, **options))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if not (options or self.options):
            return
        try:
            activation = (self.torch_module or nn.Module)(**options)
        except TypeError as error:
            what = str(error).rpartition("__init__() ")[2]
            raise TypeError(f"{type(self).__name__}: {what}") from None
        if self.options:
            for option in option_names(type(activation)):
                setattr(self, option, getattr(activation, option))
            self.read()

    def read(self) -> Activation:
        """The activation with the current options."""
        if not self.options:
            return self.default
        if found := self.read_from(self):
            return found
        values = ", ".join(f"{name}={kind(getattr(self, name, None))}" for name in self.options)
        raise ValueError(f"{type(self).__name__}: {values} is not supported")

    @classmethod
    def read_from(cls, source: object) -> Activation | None:
        """The activation with the options of `source`; None if they are not supported."""
        for name, selecting in cls.variants.items():
            if all(getattr(source, option, None) == value for option, value in selecting.items()):
                values = [getattr(source, parameter, None) for parameter in PARAMETERS[name]]
                # No walrus here: torch.compile cannot trace one in a comprehension.
                numbers = [number for number in map(as_float, values) if number is not None]
                if len(numbers) < len(values) or (
                    name == "hardtanh" and not numbers[0] <= numbers[1]
                ):
                    return None
                return Activation(name, tuple(numbers))
        return None

    def forward(self, input: Tensor) -> Tensor:
        name, parameters = self.read() if self.options else self.default
        weight, bias = self.weight, self.bias
        if type(weight) not in EAGER and needs_native(weight):
            return native(input, weight, bias, name, parameters)
        try:
            return _linear_act(input, weight, bias, name, parameters or None)
        except CAUGHT as error:
            if find_special(self) or getattr(input, "is_nested", False):
                return native(input, weight, bias, name, parameters)
            check_input(type(self).__name__, input, weight)
            rename(error, type(self).__name__)
            raise

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.options and self.torch_module:
            parts.append(self.torch_module.extra_repr(self))
        return ", ".join(filter(None, parts))

    @classmethod
    def from_linear(cls: type[Layer], linear: nn.Linear, **options: Any) -> Layer:
        """Makes a layer that shares the Parameters of an existing `nn.Linear`, without a copy.

        Args:
            linear (nn.Linear): the existing layer.
            **options: options of the activation, as in the constructor.

        Returns:
            The new layer, in the same mode (train or eval).

        Raises:
            TypeError: `linear` is not exactly an `nn.Linear`: a subclass may compute something
                else.
            ValueError: `linear` has something that would be lost, such as hooks.

        Examples:
            >>> linear = nn.Linear(20, 30)
            >>> layer = mlp_ext.LinearReLU.from_linear(linear)
            >>> layer.weight is linear.weight
            True
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be exactly a torch.nn.Linear, "
                f"got {type_name(linear)}"
            )
        if addition := find_addition(linear):
            raise ValueError(f"{cls.__name__}.from_linear: linear {addition}, which would be lost")
        own = linear._parameters
        if own.get("weight") is None or "bias" not in own:
            missing = "bias" if own.get("weight") is not None else "weight"
            raise ValueError(f"{cls.__name__}.from_linear: linear has no {missing}")
        layer = cls(1, 1, own["bias"] is not None, device="meta", **options)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._parameters.update(linear._parameters)
        layer.training = linear.training
        return layer


class LinearReLU(LinearAct, activation="relu", module=nn.ReLU):
    """y = relu(x W^T + b) with relu(z) = max(z, 0).

    As in PyTorch, relu(NaN) is NaN, and the derivative at 0 is 0.
    """


class LinearSigmoid(LinearAct, activation="sigmoid", module=nn.Sigmoid):
    """y = sigmoid(x W^T + b) with sigmoid(z) = 1 / (1 + e^-z).

    As in PyTorch, it saturates to exactly 0 and 1.
    """


class LinearTanh(LinearAct, activation="tanh", module=nn.Tanh):
    """y = tanh(x W^T + b).

    As in PyTorch, it saturates to exactly -1 and 1.
    """


class LinearLeakyReLU(LinearAct, activation="leaky_relu", module=nn.LeakyReLU):
    """y = leaky_relu(x W^T + b) with leaky_relu(z) = z if z > 0, else negative_slope z."""


class LinearELU(LinearAct, activation="elu", module=nn.ELU):
    """y = elu(x W^T + b) with elu(z) = z if z > 0, else alpha (e^z - 1)."""


class LinearSELU(LinearAct, activation="selu", module=nn.SELU):
    """y = selu(x W^T + b) with selu(z) = 1.0507 elu(z), alpha = 1.6733.

    Source: Klambauer et al., NeurIPS 2017.
    """


class LinearSiLU(LinearAct, activation="silu", module=nn.SiLU):
    """y = silu(x W^T + b) with silu(z) = z sigmoid(z)."""


class LinearGELU(
    LinearAct,
    activation="gelu",
    module=nn.GELU,
    variants={"gelu": {"approximate": "none"}, "gelu_tanh": {"approximate": "tanh"}},
):
    """y = gelu(x W^T + b) with gelu(z) = z (1 + erf(z / sqrt(2))) / 2.

    With approximate="tanh", gelu(z) = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2. Source:
    Hendrycks and Gimpel, 2016.
    """


class LinearSoftplus(LinearAct, activation="softplus", module=nn.Softplus):
    """y = softplus(x W^T + b) with softplus(z) = log(1 + e^(beta z)) / beta.

    Where beta z > threshold, softplus(z) = z.
    """


class LinearHardtanh(LinearAct, activation="hardtanh", module=nn.Hardtanh):
    """y = hardtanh(x W^T + b) with hardtanh(z) = min(max(z, min_val), max_val)."""


class LinearReLU6(LinearAct, activation="hardtanh", module=nn.ReLU6):
    """y = relu6(x W^T + b) with relu6(z) = min(max(z, 0), 6)."""


class LinearMish(LinearAct, activation="mish", module=nn.Mish):
    """y = mish(x W^T + b) with mish(z) = z tanh(log(1 + e^z)).

    Source: Misra, BMVC 2020.
    """


def option_items(module: nn.Module) -> Iterator[tuple[str, object]]:
    """For guards: the attributes with a layer's or an activation's options."""
    kind = type(module) if isinstance(module, LinearAct) else _declared_for(type(module))
    for name in kind.options if kind else ():
        if name in vars(module):
            yield name, vars(module)[name]


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# The methods that run when a module is called.
_CALL = ("__call__", "_call_impl", "forward", "__getattr__", "__getattribute__")
# If set on a module, these run instead of the class's code.
MODULE_CODE = ("forward", "_call_impl", "_compiled_call_impl")
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
_DYNAMO_LISTS_ATTRIBUTES = torch.__version__ >= (2, 12)  # type: ignore[operator]


def _own_attributes(module: nn.Module) -> list[str]:
    """The names set on the instance. Dynamo before torch 2.12 cannot list them, so there only those
    that change what it computes."""
    if torch.compiler.is_compiling() and not _DYNAMO_LISTS_ATTRIBUTES:
        return [name for name in MODULE_CODE if name in vars(module)]
    return [name for name in vars(module) if name not in _MODULE_ATTRIBUTES]


def find_addition(module: nn.Module) -> str:
    """What was added to `module` after its construction, as "has forward hooks"; "" if nothing.

    Finds hooks of all kinds (also of pruning and the older weight_norm and spectral_norm);
    instance attributes that are not in the class's __constants__, such as a forward, the call of
    Module.compile or a qconfig; parameters, buffers and children.
    """
    for name in _HOOKS:
        if vars(module)[name]:
            return f"has {name.strip('_').replace('_', ' ')}"
    made_with = option_names(type(module))
    attributes = [name for name in _own_attributes(module) if name not in made_with]
    parameters = [name for name in module._parameters if name not in ("weight", "bias")]
    for name in (*attributes, *parameters, *module._buffers, *module._modules):
        return f"has an attribute of its own, {name!r}"
    return ""


def find_override(module: nn.Module, of_hooks: bool = True) -> str:
    """What makes a call of `module` compute something else than its class does on its own, as "has
    forward hooks"; "" if nothing does."""
    own = vars(module)
    for name in _HOOKS if of_hooks else ():
        if own[name] and "state_dict" not in name:
            return f"has {name.strip('_').replace('_', ' ')}"
    for name in (*MODULE_CODE, "weight", "bias"):
        if own.get(name) is not None:
            return f"has an attribute of its own, {name!r}"
    return ""


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def find_special(layer: nn.Module) -> str:
    """Which parameter the operators do not support, as "its weight is torch.int8"; "" if none."""
    for name in ("weight", "bias") if isinstance(layer, nn.Linear) else ():
        if name not in layer._parameters:
            return f"its {name} is not a parameter"
    if layer._parameters.get("weight", layer) is None:
        return "its weight is None"
    for name, parameter in layer._parameters.items():
        # A subclass is a quantized, sharded or otherwise special tensor.
        if parameter is not None and type(parameter) not in PLAIN:
            return f"its {name} is a {type_name(parameter)}"
        if parameter is not None and parameter.layout is not torch.strided:
            return f"its {name} has layout {parameter.layout}"
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}"
    return ""
