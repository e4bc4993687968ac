"""Hostile calls of functions, layers, stacks and fuse."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hostile import Row, Table, b, net, w, x
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mlp_ext

NAN = float("nan")
ROWS: Table = {}


class Subclass(Tensor):
    pass


def negated(t: Tensor) -> Tensor:
    """-t, as a view with the negative bit."""
    return (t * 1j).conj().imag


def nested(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor([t[:2], t[2:]])


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Any, ...]:
    y.sum().backward()
    return y.detach(), *(t.grad for t in leaves)


# --- Functions: input, weight and bias ---

OPERANDS: dict[str, tuple[Any, ...]] = {
    "flipped": (lambda: x().flip(0, 1), lambda: w().flip(0), lambda: b().flip(0)),
    "expanded": (
        lambda: x()[:1].expand(6, 4),
        lambda: w()[:1].expand(3, 4),
        lambda: b()[:1].expand(3),
    ),
    "overlapping": (lambda: x().as_strided((5, 4), (1, 1)), w, b),
    "one dimension": (lambda: x()[0], w, b),
    "no rows": (lambda: x()[:0], w, b),
    "no features": (lambda: x()[:, :0], lambda: w()[:, :0], b),
    "no features, no bias": (lambda: x()[:, :0], lambda: w()[:, :0], lambda: None),
    "no outputs": (x, lambda: w()[:0], lambda: b()[:0]),
    "nothing": (lambda: x()[:0, :0], lambda: w()[:0, :0], lambda: b()[:0]),
    "many rows of nothing": (lambda: torch.zeros(2**31, 2**31, 0, 4), w, b),
    "too many rows": (lambda: torch.zeros(1, 4).expand(2**40, 4), w, b),
    "too many outputs": (x, lambda: torch.zeros(1, 4).expand(2**40, 4), lambda: None),
    "one tensor for all": (lambda: WEIGHT, lambda: WEIGHT, lambda: WEIGHT[:, 0]),
    "meta": (lambda: x().to("meta"), lambda: w().to("meta"), lambda: b().to("meta")),
    "sparse input": (lambda: x().to_sparse(), w, b),
    "sparse CSR input": (lambda: x().to_sparse_csr(), w, b),
    "sparse weight": (x, lambda: w().to_sparse(), b),
    "sparse CSR weight": (x, lambda: w().to_sparse_csr(), b),
    "sparse bias": (x, w, lambda: b().to_sparse()),
    "subclass": (lambda: x().as_subclass(Subclass), w, b),
    "subclass as weight": (x, lambda: w().as_subclass(Subclass), b),
    "negated": (lambda: negated(x()), lambda: negated(w()), lambda: negated(b())),
    "input without values": (nn.UninitializedParameter, w, b),
}
WEIGHT = torch.linspace(-1, 1, 9).view(3, 3)

for name, (input, weight, bias) in OPERANDS.items():

    def call(lib: Any, input=input, weight=weight, bias=bias) -> object:
        found = lib.relu(input(), weight(), bias())
        return list(found.shape) if found.is_meta else found

    ROWS[name] = Row(call)

ROWS |= {
    "nested": Row(lambda lib: lib.relu(nested(x()), w(), b()).unbind()),
    "jagged": Row(
        lambda lib: lib.relu(
            torch.nested.as_nested_tensor([x()], layout=torch.jagged), w()
        ).values()
    ),
    "nested weight": Row(lambda lib: lib.relu(x(), nested(w()))),
    "negated with gradients": Row(
        lambda lib: gradients(lib.relu(v := x().requires_grad_(), negated(w()), b()), v)
    ),
    "inference tensor": Row(lambda lib: lib.relu(torch.inference_mode()(x)(), w(), b())),
    "inference tensor saved": Row(
        lambda lib: lib.relu(torch.inference_mode()(x)(), w().requires_grad_()).sum().backward()
    ),
    "backward twice": Row(lambda lib: twice(lib)),
    "gradient of another shape": Row(
        lambda lib: lib.relu(x().requires_grad_(), w()).backward(torch.ones(3, 6))
    ),
    "list": Row(
        lambda lib: lib.relu(x().tolist(), w()),
        TypeError,
        "linear_relu: input must be a tensor, got list; pass torch.as_tensor(input)",
    ),
    "array as weight": Row(
        lambda lib: lib.relu(x(), w().numpy()),
        TypeError,
        "linear_relu: weight must be a tensor, got numpy.ndarray; pass torch.from_numpy(weight)",
    ),
    "number as bias": Row(
        lambda lib: lib.relu(x(), w(), 1.5),
        TypeError,
        "linear_relu: bias must be a tensor, got 1.5",
    ),
    "complex": Row(
        lambda lib: lib.relu(x().cfloat(), w()),
        RuntimeError,
        "linear_relu: input must be float32, float64, bfloat16 or float16, got complex64; pass ",
    ),
    "float8": Row(
        lambda lib: lib.relu(x().to(torch.float8_e4m3fn), w()),
        RuntimeError,
        "linear_relu: input must be float32, float64, bfloat16 or float16, got float8_e4m3fn; ",
    ),
    "quantized": Row(
        lambda lib: lib.relu(torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8), w()),
        RuntimeError,
        "linear_relu: input must be float32, float64, bfloat16 or float16, got qint8; pass ",
    ),
    "no dimension": Row(
        lambda lib: lib.relu(x()[0, 0], w()),
        RuntimeError,
        "linear_relu: input must be [*, K], got a 0-dimensional tensor",
    ),
}


def twice(lib: Any) -> None:
    y = lib.relu(x().requires_grad_(), w()).sum()
    y.backward()
    y.backward()


# --- Functions: activation and parameters ---


def refused(activation: Any, parameters: Any, error: type[Exception], message: str) -> Row:
    return Row(
        lambda lib: mlp_ext.linear_act(x(), w(), b(), activation, parameters),
        error,
        f"linear_act: {message}",
    )


ONE_OF = f"activation must be one of {', '.join(mlp_ext.ACTIVATIONS)}, got "
ROWS |= {
    "no activation": refused(None, None, TypeError, "activation must be a str, got None"),
    "module": refused(
        nn.ReLU(), None, TypeError, "activation must be a str, got torch.nn.modules."
    ),
    "line break": refused("re\nlu", None, ValueError, ONE_OF + "'re\\nlu'"),
    "half a surrogate pair": refused("\ud800", None, ValueError, ONE_OF + "'\\ud800'"),
    "long name": refused("relu" * 9999, None, ValueError, ONE_OF + "str"),
    "huge parameter": refused(
        "elu", [10**400], TypeError, "parameters must be numbers, got an int of 1329 bits"
    ),
    "complex parameter": refused("elu", [1j], TypeError, "parameters must be numbers, got complex"),
    "tensor of parameters": refused(
        "elu", torch.ones(1), TypeError, "parameters must be a list of numbers, got torch.Tensor"
    ),
    "nested parameters": refused("elu", [[1.0]], TypeError, "parameters must be numbers, got list"),
    "NaN parameter": Row(lambda lib: lib.act(x(), w(), b(), "leaky_relu", [NAN])),
    "infinite parameter": Row(lambda lib: lib.act(x(), w(), b(), "elu", [float("inf")])),
    "bool parameter": Row(lambda lib: lib.act(x(), w(), b(), "leaky_relu", [True])),
    "beta of 0": Row(lambda lib: lib.act(x(), w(), b(), "softplus", [0.0, 20.0])),
    "negative slope with gradients": Row(
        lambda lib: gradients(lib.act(v := x().requires_grad_(), w(), b(), "leaky_relu", [-0.5]), v)
    ),
}

# --- Layers ---


def layer(kind: str, options: dict[str, Any], message: str) -> Row:
    return Row(
        lambda lib: getattr(mlp_ext, kind)(4, 3, **options), ValueError, f"{kind}: {message}"
    )


def from_linear(change: Callable[[Any], object], message: str) -> Row:
    def call(lib: Any) -> object:
        linear = nn.Linear(4, 3)
        change(linear)
        return mlp_ext.LinearReLU.from_linear(linear)

    return Row(call, ValueError, f"LinearReLU.from_linear: linear {message}")


def renamed(lib: Any) -> Tensor:
    linear = nn.Linear(4, 3)
    expected = torch.relu(linear(x())).detach()
    linear.in_features = "four"  # type: ignore[assignment]
    ours = mlp_ext.LinearReLU.from_linear(linear)(x()).detach()
    return ours - expected if lib.relu is mlp_ext.linear_relu else torch.zeros(6, 3)


ROWS |= {
    "layer of no features": Row(lambda lib: lib.LinearReLU(0, 3)(x()[:, :0])),
    "layer of -1 features": Row(lambda lib: lib.LinearReLU(-1, 3)),
    "layer of too many features": Row(lambda lib: lib.LinearReLU(2**31, 2**31)),
    "text as features": Row(lambda lib: lib.LinearReLU("4", 3)),
    "NumPy's integers": Row(lambda lib: lib.LinearReLU(np.int64(4), np.int64(3))(x())),
    "slope of text": layer("LinearLeakyReLU", {"negative_slope": "a"}, "negative_slope='a' is not"),
    "slope of a tensor": layer(
        "LinearLeakyReLU",
        {"negative_slope": torch.tensor(0.8675309)},
        "negative_slope=torch.Tensor is not supported",
    ),
    "huge slope": layer(
        "LinearLeakyReLU", {"negative_slope": 10**400}, "negative_slope=an int of 1329 bits is not"
    ),
    "unknown approximation": layer("LinearGELU", {"approximate": "a\n" * 99}, "approximate=str is"),
    "NaN as bound": layer("LinearHardtanh", {"min_val": NAN}, "min_val=nan, max_val=1.0 is not"),
    "unknown option": Row(
        lambda lib: mlp_ext.LinearReLU(4, 3, slope=1),
        TypeError,
        "LinearReLU: got an unexpected keyword argument 'slope'",
    ),
    "activation set": Row(
        lambda lib: setattr(mlp_ext.LinearReLU(4, 3), "activation", "tanh"),
        AttributeError,
        "the activation of a LinearReLU follows from no options",
    ),
    "linear without weight": from_linear(lambda m: delattr(m, "weight"), "has no weight"),
    "linear with None as weight": from_linear(
        lambda m: setattr(m, "weight", None), "has no weight"
    ),
    "linear without bias": from_linear(lambda m: delattr(m, "bias"), "has no bias"),
    "linear with a hook": from_linear(
        lambda m: m.register_forward_hook(print), "has forward hooks"
    ),
    "linear that tells other features": Row(renamed),
}

# --- Stacks and fused models: changed, then called ---


def changed(
    change: Callable[[Any], object], input: Callable[[], Any] = x
) -> Callable[[Any], object]:
    """Outputs and gradients of a fused model before and after the change."""

    def call(lib: Any) -> object:
        model = lib.fuse(net(), level="stack")
        before = model(x())
        change(model)
        after = model(input())
        (before.sum() + after.sum()).backward()
        return before.detach(), after.detach(), [p.grad for p in model.parameters()]

    return call


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def put(value: Any, index: int = 1) -> Callable[[Any], object]:
    return lambda m: m._modules.__setitem__(str(index), value)


def parameter(value: Any, name: str = "weight") -> Callable[[Any], object]:
    return lambda m: m[0]._parameters.__setitem__(name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weight of None": lambda m: setattr(m[0], "weight", None),
    "bias of None": lambda m: setattr(m[0], "bias", None),
    "weight deleted": lambda m: delattr(m[0], "weight"),
    "bias deleted": lambda m: delattr(m[0], "bias"),
    "features deleted": lambda m: delattr(m[0], "in_features"),
    "modules deleted": lambda m: delattr(m, "_modules"),
    "text as weight": parameter("w"),
    "array as weight in a model": parameter(np.ones((5, 4), np.float32)),
    "tensor as weight": parameter(torch.ones(5, 4)),
    "weight as a buffer": lambda m: (
        delattr(m[0], "weight"),
        m[0].register_buffer("weight", torch.ones(5, 4)),
    ),
    "sparse weight in a model": lambda m: setattr(
        m[0], "weight", nn.Parameter(torch.ones(5, 4).to_sparse())
    ),
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "frozen": lambda m: m[0].requires_grad_(False),
    "hook": lambda m: m[0].register_forward_hook(lambda m, i, y: 2 * y),
    "hook that raises": lambda m: m[1].register_forward_pre_hook(lambda *_: 1 / 0),
    "class changed": lambda m: setattr(m[0], "__class__", Doubled),
    "forward of its own": lambda m: setattr(m[0], "forward", lambda v: v.repeat(1, 2)[:, :5]),
    "number as child": put(3),
    "function as child": put(torch.tanh),
    "child replaced": put(nn.Tanh()),
    "child deleted": lambda m: m.__delitem__(1),
    "child of None": put(None),
    "crossed bounds": lambda m: (put(nn.Hardtanh())(m), setattr(m[1], "min_val", 5.0)),
    "slope of a tensor in a model": put(nn.LeakyReLU(torch.tensor(0.3))),  # type: ignore[arg-type]
    "slope deleted": lambda m: (put(nn.LeakyReLU())(m), delattr(m[1], "negative_slope")),
    "softmax": put(nn.Softmax(1)),
    "inplace": lambda m: setattr(m[1], "inplace", True),
}
ROWS |= {name: Row(changed(change)) for name, change in CHANGES.items()}


def width(model: Any) -> None:
    model.append(nn.Linear(9, 2))


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, input: Tensor, scale: Any = 1.0) -> Any:
        return torch.relu(self.layer(input)) * scale


def deleted(lib: Any) -> None:
    model = lib.fuse(Calls())
    model(x())
    del model.layer
    model(x())


ROWS |= {
    "fused code, nested input": Row(lambda lib: lib.fuse(Calls())(nested(x())).unbind()),
    "fused code, list as scale": Row(lambda lib: lib.fuse(Calls())(x(), [2.0])),
    "fused code, NaN as scale": Row(lambda lib: lib.fuse(Calls())(x(), NAN).detach()),
    "fused code, subclass": Row(lambda lib: lib.fuse(Calls())(x().as_subclass(Subclass)).detach()),
    "fused code, layer deleted": Row(deleted),
    "stack of a nested input": Row(
        lambda lib: lib.fuse(nn.Sequential(*net()[:2], nn.Linear(5, 3)), level="stack")(
            nested(x())
        ).unbind()
    ),
    "input is the weight": Row(lambda lib: [(m := lib.fuse(net()))(m[0].weight.detach()).detach()]),
    "two arguments": Row(lambda lib: lib.fuse(net())(x(), x())),
    "no argument": Row(lambda lib: lib.fuse(net())()),
    "pickle cut short": Row(lambda lib: pickle.loads(pickle.dumps(lib.fuse(net()))[:-9])),
    "another width": Row(
        changed(width),
        RuntimeError,
        "Sequential: weights[2] must be [N, K=3] to match the 3 outputs",
    ),
    "meta input of a stack": Row(
        changed(str, lambda: x().to("meta")),
        RuntimeError,
        "Sequential: input is on meta, the model on cpu; pass input.to('cpu')",
    ),
    "dict": Row(changed(str, dict), TypeError, "Sequential: input must be a tensor, got dict"),
    "None as model": Row(
        lambda lib: mlp_ext.fuse(None),  # type: ignore[type-var]
        TypeError,
        "fuse: model must be a torch.nn.Module, got None",
    ),
    "class as model": Row(
        lambda lib: mlp_ext.unfuse(nn.Linear),  # type: ignore[type-var]
        TypeError,
        "unfuse: model must be a torch.nn.Module, got the class Linear",
    ),
    "list as model": Row(
        lambda lib: mlp_ext.fusion_report([nn.Linear(1, 1)]),  # type: ignore[arg-type]
        TypeError,
        "fusion_report: model must be a torch.nn.Module, got list",
    ),
    "long level": Row(
        lambda lib: mlp_ext.fuse(net(), "stack\n" * 99),  # type: ignore[arg-type]
        ValueError,
        "fuse: level must be one of layers, stack, got str",
    ),
}
