"""docs/adding-things.md: its edits, made to a copy of the sources, compile and compute what PyTorch
does."""

import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from once import Once
from torch import Tensor, nn
from torch.nn import functional as F

from mlp_ext.nn import LinearAct

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-things.md").read_text()
LISTS = {  # section: header, list of functors
    "An activation": ("activations.h", "Activations"),
    "A loss": ("losses.h", "Losses"),
    "An optimizer": ("optimizers.h", "Optimizers"),
}
COMPILER = os.environ.get("CXX", "g++")

# Prints for x = -2, -1.75, ... 2 a line: the activation's y and slope; the loss and its slope for
# the targets -1 and 1; and the parameter 1 after three steps with the gradients x, x / 2 and x / 3.
PROGRAM = """
#include <cstdio>
#include "math/activations.h"
#include "math/losses.h"
#include "math/optimizers.h"
using namespace mlp_ext;

int main() {
  const Activation activation(index_of("@activation", Activations{}), @Activation{});
  const LossFunction loss(index_of("@loss", Losses{}), @Loss{});
  const double numbers[] = {0.5, 0.8, 1e-3, 0.01, 0};
  const Optimizer optimizer = choose(Optimizers{}, index_of("@optimizer", Optimizers{}), numbers);
  for (double x = -2; x <= 2; x += 0.25) {
    const double y = visit(activation, [&](auto act) { return act.forward(x); });
    const double slope = visit(activation, [&](auto act) { return act.backward(1.0, y); });
    std::printf("%.17g %.17g", y, slope);
    for (const double t : {-1.0, 1.0}) {
      visit(loss, [&](auto l) {
        if constexpr (!is_of_rows<decltype(l)>)
          std::printf(" %.17g %.17g", l.forward(x, t, 1.0), l.backward(x, t, 1.0, 1.0));
      });
    }
    double parameter = 1, state[kMaxStates] = {};
    for (int t = 1; t <= 3; ++t)
      visit(at_step(optimizer, t), [&](auto o) { o.update(parameter, state, x / t); });
    std::printf(" %.17g\\n", parameter);
  }
}
"""


def snippets(section: str, language: str) -> list[str]:
    """The code of a section, without the list's indentation."""
    text = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert text
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text[1], flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for code in found]


def functor(section: str) -> tuple[str, str, str]:
    """The C++ of a section, the type and the name that it defines."""
    (code,) = snippets(section, "cpp")
    kind = re.search(r"^struct (\w+)", code, flags=re.MULTILINE)
    name = re.search(r'name = "(\w+)"', code)
    assert kind and name
    return code, kind[1], name[1]


def edit(folder: Path) -> None:
    """The first edit of each section, to a copy of the headers."""
    shutil.copytree(ROOT / "csrc" / "math", folder / "math")
    program = PROGRAM
    for section, (header, functors) in LISTS.items():
        code, kind, name = functor(section)
        path = folder / "math" / header
        text = path.read_text()
        at = text.index(f"using {functors} =")
        assert f"struct {kind} " not in text, "the example is no longer new"
        end = text.index(">;", at)
        entry = kind + ("<>" if "template <class Setting = double>" in code else "")
        path.write_text(f"{text[:at]}{code}\n{text[at:end]}, {entry}{text[end:]}")
        what = section.split()[1]
        program = program.replace(f"@{what}", name).replace(f"@{what.capitalize()}", kind)
    (folder / "main.cpp").write_text(program)
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-I", str(folder)]
    command = [COMPILER, *flags, str(folder / "main.cpp"), "-o", str(folder / "main")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def columns(once: Once) -> Tensor:
    """What the program prints: [arguments, values]."""
    if not shutil.which(COMPILER):
        pytest.skip(f"needs the C++ compiler {COMPILER}")
    out = subprocess.check_output([once("adding-things", edit) / "main"], text=True)
    rows = [[float(value) for value in line.split()] for line in out.splitlines()]
    return torch.tensor(rows, dtype=torch.float64).T


X = torch.arange(-2, 2.25, 0.25, dtype=torch.float64)


def with_slope(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def test_activation_of_the_page_is_torchs(columns: Tensor) -> None:
    torch.testing.assert_close(tuple(columns[:2]), with_slope(F.softsign))


def test_loss_of_the_page_is_torchs(columns: Tensor) -> None:
    loss = nn.SoftMarginLoss(reduction="none")
    for t, found in ((-1.0, columns[2:4]), (1.0, columns[4:6])):
        expected = with_slope(partial(loss, target=torch.full_like(X, t)))
        torch.testing.assert_close(tuple(found), expected)


def test_optimizer_of_the_page_is_torchs(columns: Tensor) -> None:
    p = torch.ones_like(X).requires_grad_()
    optimizer = torch.optim.Adadelta([p], lr=0.5, rho=0.8, eps=1e-3, weight_decay=0.01)
    for t in (1, 2, 3):
        p.grad = X / t
        optimizer.step()
    torch.testing.assert_close(columns[6], p.detach())


def test_python_of_the_page_is_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class statement, as it stands in nn.py, with the compiled list's new name."""
    from mlp_ext import nn as layers

    (code,) = snippets("An activation", "python")
    _, _, name = functor("An activation")
    monkeypatch.setattr(layers, "ACTIVATIONS", (*layers.ACTIVATIONS, name))
    monkeypatch.setitem(layers.PARAMETERS, name, {})
    monkeypatch.setattr(LinearAct, "by_module", dict(LinearAct.by_module))
    monkeypatch.setattr(layers, "MODULES", dict(layers.MODULES))
    scope: dict[str, Any] = {**vars(layers)}
    exec(code, scope)
    layer = scope["LinearSoftsign"](7, 5)
    assert layer.activation == name
    assert layers.activation_of(nn.Softsign()) == (name, ())
    assert LinearAct.by_module[nn.Softsign] is type(layer)


@pytest.mark.parametrize(
    ("section", "table"), [("A loss", "LOSSES"), ("An optimizer", "OPTIMIZERS")]
)
def test_python_of_the_page_is_a_row(section: str, table: str) -> None:
    from mlp_ext import reading

    (code,) = snippets(section, "python")
    rows = dict(getattr(reading, table))
    known = dict(rows)
    exec(code, {**vars(reading), table: rows})
    ((kind, row),) = (item for item in rows.items() if item[0] not in known)
    assert isinstance(kind, type) and row[0] == functor(section)[2]
    assert {len(other) for other in known.values()} == {len(row)}
