"""What is in a pickle: loading it calls constructors alone."""

import io
import pickle

import pytest
import torch
from torch import nn

import mlp_ext


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(input)))


def make_step() -> mlp_ext.TrainStep:
    model = mlp_ext.fuse(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))
    return mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))


def make_steps() -> mlp_ext.TrainSteps:
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in "ab"]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    return mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)


FUSED = "mlp_ext.fuse._new"
OBJECTS = {  # how it is made and used, and what of mlp_ext its pickle names
    "layer": (lambda: mlp_ext.LinearReLU(3, 4), 1, {"mlp_ext.nn.LinearReLU"}),
    "sequential": (
        lambda: mlp_ext.Sequential(nn.Linear(3, 4)),
        1,
        {"mlp_ext.sequential.Sequential"},
    ),
    "fused": (lambda: mlp_ext.fuse(nn.Sequential(nn.Linear(3, 4), nn.ReLU())), 1, {FUSED}),
    "fused-code": (lambda: mlp_ext.fuse(Net()), 1, {FUSED}),
    "step": (make_step, 2, {FUSED, "mlp_ext.train_step.TrainStep"}),
    "steps": (make_steps, 2, {"mlp_ext.train_steps.TrainSteps"}),
}


class Recorder(pickle.Unpickler):
    """Loads, and keeps the names of the functions and classes that the pickle calls."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.named: set[str] = set()

    def find_class(self, module: str, name: str) -> object:
        self.named.add(f"{module}.{name}")
        return super().find_class(module, name)


@pytest.mark.parametrize("name", OBJECTS)
def test_pickle_names_classes_and_nothing_compiled(name: str) -> None:
    make, arguments, expected = OBJECTS[name]
    used = make()
    given = [torch.randn(5, 3), torch.randn(5, 1)][:arguments]
    used(*given)  # plans and compiled parts are there now
    recorder = Recorder(pickle.dumps(used))
    torch.testing.assert_close(recorder.load()(*given), used(*given))
    assert {found for found in recorder.named if found.startswith("mlp_ext")} == expected
    others = {found.partition(".")[0] for found in recorder.named} - {"mlp_ext", __name__}
    assert others <= {"torch", "collections", "builtins"}


def test_state_of_a_fused_model_is_plain_data(tmp_path) -> None:
    step = make_step()
    step(torch.randn(5, 3), torch.randn(5, 1))
    model, _, optimizer = step._parts
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
