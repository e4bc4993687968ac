"""Training steps of one network and of many, by calls and by fit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from eager_steps import Eager
from hypotheses import st
from references import Results
from torch import Tensor, nn

from fuzz import data
from fuzz.networks import Layers, children, fitting, layers, parameters
from fuzz.plans import Plan, planned, plans
from fuzz.rule import Tensors
from mlp_ext import TrainStep, TrainSteps, predict

OF_CLASSES = ("CrossEntropyLoss", "NLLLoss")


class Loss(NamedTuple):
    name: str  # its class in torch.nn
    options: dict[str, Any]
    is_weighted: bool = False  # by class, or as pos_weight
    probabilities: bool = False  # instead of classes

    def has_classes(self) -> bool:
        return self.name in OF_CLASSES and not self.probabilities

    def tensors(self, M: int, N: int, layout: str, values: str, dtype: str) -> Tensors:
        kind = getattr(torch, dtype)
        if self.has_classes():
            target = torch.randint(max(N, 1), (M,))
            target[torch.rand(M) < 0.2] = self.options.get("ignore_index", -100)
            target = target if layout == "contiguous" else target.repeat_interleave(2)[::2]
        elif self.name == "BCELoss" or self.probabilities:
            target = torch.rand(M, N).to(kind)
        else:
            target = data.VALUES[values](M, N, dtype=kind)
        if target.numel() and target.is_floating_point():
            target = data.ARRANGE[layout](target)
        found = {"target": target}
        if self.is_weighted:
            found["loss weight"] = torch.rand(N).to(kind)
        return found

    def criterion(self, tensors: Tensors) -> nn.Module:
        name = "pos_weight" if self.name == "BCEWithLogitsLoss" else "weight"
        weight = {name: tensors["loss weight"]} if self.is_weighted else {}
        module: nn.Module = getattr(nn, self.name)(**self.options, **weight)
        return module


class Optimizer(NamedTuple):
    name: str  # its class in torch.optim
    options: dict[str, Any]
    how: str | None  # "tensor lr", "foreach" or "fused"
    split: int  # parameters from here on have twice the lr

    def _may_be_fused(self, dtype: torch.dtype) -> bool:
        """torch's own leaves many 16-bit parameters as they are, and loses NaN of amsgrad."""
        kept = dtype.itemsize > 2 and not self.options.get("amsgrad")
        return self.how == "fused" and self.name != "RMSprop" and kept

    def make(self, model: nn.Module, share: float = 1.0) -> torch.optim.Optimizer:
        options = self.options | {"lr": self.options["lr"] * share}
        found = [*model.parameters()]
        if self.how == "tensor lr":  # in float32 eager Adam would round what it computes from it
            options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
        elif self.how == "foreach":
            options["foreach"] = True
        elif self._may_be_fused(found[0].dtype):
            options["fused"] = True
        groups = [
            {"params": found[: self.split]},
            {"params": found[self.split :], "lr": options["lr"] * 2},
        ]
        kind = getattr(torch.optim, self.name)
        made: torch.optim.Optimizer = kind([g for g in groups if g["params"]], **options)
        return made


class Fit(NamedTuple):
    epochs: int
    batch_size: int | None
    shuffle: bool


@dataclass(frozen=True)
class Training:
    luck: ClassVar[int] = 6
    leading: tuple[int]  # the rows
    K: int
    layers: Layers
    dtype: str
    loss: Loss
    optimizer: Optimizer
    max_norm: float | None
    accumulate: int
    fit: Fit | None  # None: three calls
    values: tuple[str, str]  # of input and target
    layouts: tuple[str, str]
    plan: Plan
    seed: int

    def is_exact(self) -> bool:
        return False

    def tensors(self) -> Tensors:
        data.seed(self.seed)
        (M,), N = self.leading, self.layers[-1].N
        input = data.tensor(self.values[0], self.layouts[0], M, self.K, dtype=self.dtype)
        target = self.loss.tensors(M, N, self.layouts[1], self.values[1], self.dtype)
        return parameters(self.K, self.layers, self.dtype) | {"input": input} | target

    def ours(self, tensors: Tensors) -> Results:
        with planned(self.plan):
            return self._results(tensors, data.module_of, TrainStep)

    def native(self, tensors: Tensors) -> Results:
        return self._results(tensors, data.native_of, Eager)

    def _results(
        self,
        tensors: Tensors,
        activation: Callable[[data.Activation], nn.Module],
        make: Any,
    ) -> Results:
        model = nn.Sequential(*children(self.layers, tensors, activation))
        optimizer, criterion = self.optimizer.make(model), self.loss.criterion(tensors)
        step = make(model, criterion, optimizer, self.max_norm, self.accumulate)
        x, y = tensors["input"], tensors["target"]
        if self.fit:
            data.seed(self.seed)
            losses = step.fit(x, y, *self.fit)
        else:
            losses = torch.stack([step(x[i:], y[i:]) for i in range(3)])
        return {"losses": losses} | trained(model, optimizer)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str = "") -> Results:
    """Parameters and states, by their number: the ways name modules differently."""
    found: Results = {}
    for i, p in enumerate(model.parameters()):
        found[f"{prefix}parameter {i}"] = p.detach()
        for name, state in optimizer.state.get(p, {}).items():
            if state is not None:
                found[f"{prefix}{name} {i}"] = state
    return found


# --- Many ---


@dataclass(frozen=True)
class Many:
    luck: ClassVar[int] = 6
    leading: tuple[int]
    K: int
    layers: Layers
    dtype: str
    loss: Loss
    optimizer: Optimizer
    networks: int
    own_data: bool
    own_rows: bool  # in fit: each trains on rows of its own
    fit: Fit | None
    values: tuple[str, str]
    layouts: tuple[str, str]
    plan: Plan
    seed: int

    def is_exact(self) -> bool:
        return False

    def tensors(self) -> Tensors:
        data.seed(self.seed)
        (M,), N, E = self.leading, self.layers[-1].N, self.networks
        found: Tensors = {}
        for e in range(E):
            found |= parameters(self.K, self.layers, self.dtype, f"{e}: ")
        copies = [
            self.loss.tensors(M, N, "contiguous", self.values[1], self.dtype) for _ in range(E)
        ]
        if self.own_data:
            input = data.tensor(self.values[0], self.layouts[0], E, M, self.K, dtype=self.dtype)
            target = torch.stack([copy["target"] for copy in copies])
        else:
            input = data.tensor(self.values[0], self.layouts[0], M, self.K, dtype=self.dtype)
            target = copies[0]["target"]
        return found | copies[0] | {"input": input, "target": target}

    def _rows(self) -> list[Tensor]:
        (M,) = self.leading
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randperm(M, generator=generator)[: max(1, M - 3 * e)]
            for e in range(self.networks)
        ]

    def _parts(
        self, tensors: Tensors, activation: Any
    ) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
        models: list[nn.Module] = [
            nn.Sequential(*children(self.layers, tensors, activation, f"{e}: "))
            for e in range(self.networks)
        ]
        shares = [1 - 0.5 * e / self.networks for e in range(self.networks)]
        return models, [*map(self.optimizer.make, models, shares)]

    def ours(self, tensors: Tensors) -> Results:
        with planned(self.plan):
            models, optimizers = self._parts(tensors, data.module_of)
            steps = TrainSteps(models, self.loss.criterion(tensors), optimizers)
            x, y = tensors["input"], tensors["target"]
            outputs = predict(models, x)
            if self.fit:
                generators = [torch.Generator().manual_seed(e) for e in range(self.networks)]
                rows = self._rows() if self.own_rows else None
                losses = steps.fit(x, y, *self.fit, generators=generators, rows=rows)
            else:
                losses = torch.stack([steps(x, y) for _ in range(2)])
            # The outputs of the trained weights, whatever was kept of the first ones.
            trained_outputs = predict(models, x), predict(deepcopy(models), x)
            torch.testing.assert_close(*trained_outputs, rtol=0, atol=0, equal_nan=True)
            return self._results(losses, models, optimizers, outputs)

    def native(self, tensors: Tensors) -> Results:
        models, optimizers = self._parts(tensors, data.native_of)
        losses, outputs = [], []
        for e, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            step = Eager(model, self.loss.criterion(tensors), optimizer)
            x, y = (tensors[k][e] if self.own_data else tensors[k] for k in ("input", "target"))
            with torch.no_grad():
                outputs.append(model(x))
            if self.fit:
                rows = self._rows()[e] if self.own_rows else torch.arange(len(x))
                generator = torch.Generator().manual_seed(e)
                losses.append(step.fit(x[rows], y[rows], *self.fit, generator))
            else:
                losses.append(torch.stack([step(x, y) for _ in range(2)]))
        return self._results(torch.stack(losses, 1), models, optimizers, torch.stack(outputs))

    def _results(self, losses: Tensor, models: Any, optimizers: Any, outputs: Tensor) -> Results:
        found = {"losses": losses, "outputs": outputs}
        for e, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            found |= trained(model, optimizer, f"{e}: ")
        return found


# --- Strategies ---


NEVER = st.just(False)


def _loss(*names: str, weighted: Any = NEVER, probabilities: Any = NEVER, **options: Any) -> Any:
    reduction = st.sampled_from(("mean", "mean", "sum"))
    drawn = st.fixed_dictionaries({"reduction": reduction}, optional=options)
    return st.builds(Loss, st.sampled_from(names), drawn, weighted, probabilities)


ignored = st.sampled_from((-100, 0, 1))
losses = st.one_of(
    _loss("MSELoss", "L1Loss", "BCELoss"),
    _loss("SmoothL1Loss", beta=st.sampled_from((0.0, 0.3, 2.0))),
    _loss("HuberLoss", delta=st.sampled_from((0.2, 3.0))),
    _loss("BCEWithLogitsLoss", weighted=st.booleans()),
    _loss("NLLLoss", weighted=st.booleans(), ignore_index=ignored),
    _loss(
        "CrossEntropyLoss",
        weighted=st.booleans(),
        probabilities=st.booleans(),
        ignore_index=ignored,
        label_smoothing=st.sampled_from((0.1, 1.0)),
    ),
)

decay, flag, lr = st.sampled_from((0.01, 0.3)), st.booleans(), st.sampled_from((1e-3, 0.1))
fractions = st.sampled_from((0.1, 0.5, 0.9))


def _optimizer(name: str, **options: Any) -> Any:
    common = {"weight_decay": decay, "maximize": flag}
    drawn = st.fixed_dictionaries({"lr": lr}, optional=common | options)
    how = st.sampled_from((None, "tensor lr", "foreach", "fused"))
    return st.builds(Optimizer, st.just(name), drawn, how, st.integers(0, 8))


betas, eps = st.tuples(fractions, st.sampled_from((0.5, 0.999))), st.sampled_from((1e-8, 1e-3))
adam = {"betas": betas, "eps": eps, "amsgrad": flag}
optimizers = st.one_of(
    _optimizer("SGD", momentum=fractions, dampening=fractions),
    _optimizer("SGD", momentum=fractions).map(
        lambda o: o._replace(options={"momentum": 0.9} | o.options | {"nesterov": True})
    ),
    _optimizer("Adam", decoupled_weight_decay=flag, **adam),
    _optimizer("AdamW", **adam),
    _optimizer("RMSprop", alpha=fractions, eps=eps, momentum=fractions, centered=flag),
    _optimizer("Adagrad", lr_decay=decay, initial_accumulator_value=decay, eps=eps),
)
fits = st.builds(Fit, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 40)), st.booleans())
of_a_training = {
    "leading": st.tuples(data.sizes),
    "K": data.sizes,
    "layers": layers,
    "dtype": data.dtypes,
    "loss": losses,
    "optimizer": optimizers,
    "fit": st.one_of(st.none(), fits),
    "values": st.tuples(data.values, data.values),
    "layouts": st.tuples(data.layouts, data.layouts),
    "plan": plans,
    "seed": data.seeds,
}


def _fitting(case: Any) -> Any:
    """With a sigmoid at the end for a loss that needs it, and few batches."""
    *first, last = case.layers
    if case.loss.name == "BCELoss":
        case = replace(case, layers=(*first, last._replace(activation=("Sigmoid", {}))))
    options = case.optimizer.options
    if options.get("centered") and "huge" in [*case.values, *(each.values for each in case.layers)]:
        # g^2 - mean^2 is inf or NaN, as torch's compiler used FMA or not
        case = replace(
            case, optimizer=case.optimizer._replace(options=options | {"centered": False})
        )
    case = fitting(case)
    if case.leading == (0,):  # no batches; a step of no rows is a case
        case = replace(case, fit=None)
    if case.fit and case.fit.batch_size:
        size = max(case.fit.batch_size, case.leading[0] // 6)
        case = replace(case, fit=case.fit._replace(batch_size=size))
    return case


trainings = st.builds(
    Training,
    max_norm=st.sampled_from((None, None, 0.1, 10.0)),
    accumulate=st.sampled_from((1, 1, 1, 2)),
    **of_a_training,
).map(_fitting)
manys = st.builds(
    Many,
    networks=st.sampled_from((1, 2, 3, 8, 15, 16, 17)),
    own_data=st.booleans(),
    own_rows=st.booleans(),
    **of_a_training | {"layers": layers.map(lambda found: found[:2])},
).map(_fitting)
