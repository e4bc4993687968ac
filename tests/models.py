"""Models as people write them, for the tests of fuse and of torch.compile(backend="mlp_ext").

Each has a `forward` of its own. `pairs` counts the activations that one forward in training mode
applies to the result of a linear layer. tests/test_forward_code.py checks that number too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Callable[[], tuple[Any, ...]]


class Example(NamedTuple):
    """A model, inputs for it, and the pairs of linear layer and activation that it executes."""

    style: str
    group: str  # "tutorial", "rl" (reinforcement learning) or "library"
    make: Callable[[], nn.Module]
    inputs: Inputs
    pairs: int
    followed: bool  # whether torch.fx can follow its forward; Dynamo can follow each of them

    def model(self) -> nn.Module:
        """The model, with the same weights at each call."""
        torch.manual_seed(0)
        return self.make()

    def batch(self) -> tuple[Any, ...]:
        """The same inputs at each call."""
        torch.manual_seed(1)
        return self.inputs()


EXAMPLES: dict[str, Example] = {}


def rows(*shape: int) -> Inputs:
    return lambda: (torch.randn(4, *(shape or (8,))),)


def example(
    style: str,
    pairs: int,
    inputs: Inputs | None = None,
    group: str = "library",
    followed: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        EXAMPLES[cls.__name__] = Example(style, group, cls, inputs or rows(), pairs, followed)
        return cls

    return add


# Tutorials


@example("F.relu(self.fc(x))", 2, group="tutorial")
class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@example("torch.sigmoid(self.out(x))", 2, group="tutorial")
class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.out(torch.relu(self.hidden(x))))


@example("self.fc(x).relu()", 2, group="tutorial")
class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()).tanh()


@example("self.act(self.fc(x)), one activation for all layers", 2, group="tutorial")
class SharedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


@example("one statement for each module", 1, group="tutorial")
class Statements(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc1(x)
        out = self.relu(out)
        out = self.dropout(out)
        out = self.fc2(out)
        return out


@example("x.view(x.size(0), -1) and log_softmax", 1, rows(1, 4, 6), group="tutorial")
class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


@example("CNN with a classifier", 2, rows(3, 8, 8), group="tutorial")
class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@example("nn.Sequential in a module", 2, rows(2, 4), group="tutorial")
class Quickstart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.stack = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.flatten(x))


@example("for layer in self.layers: x = F.relu(layer(x))", 3, group="tutorial")
class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.output = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.output(x)


@example("zip of layers and activations", 3, group="tutorial")
class Zip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)])
        self.activations = nn.ModuleList([nn.ReLU(), nn.ELU(0.5), nn.Sigmoid()])

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
        return x


@example("enumerate with if i < len(self.layers) - 1", 2, group="tutorial")
class Enumerate(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 12, 3)) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(len(widths) - 1):
            self.layers.append(nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = torch.relu(x)
        return x


@example("a dict of activations", 2, group="tutorial")
class Activations(nn.Module):
    def __init__(self, kind: str = "gelu") -> None:
        super().__init__()
        self.kind = kind
        self.activations = nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU()})
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activations[self.kind](self.fc1(x))
        return self.fc3(self.activations["relu"](self.fc2(x)))


@example("the activation is a function in an attribute", 3, group="tutorial")
class FunctionAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = F.relu, torch.tanh
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc3(self.act(self.fc2(self.act(self.fc1(x))))))


@example("autoencoder with encode and decode", 3, group="tutorial")
class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(8, 6), nn.Linear(6, 2)
        self.dec1, self.dec2 = nn.Linear(2, 6), nn.Linear(6, 8)

    def encode(self, x: Tensor) -> Tensor:
        return self.enc2(F.relu(self.enc1(x)))

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.dec2(F.relu(self.dec1(z))))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@example("VAE with two heads and torch.randn_like", 3, rows(2, 4), group="tutorial")
class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 12)
        self.mean, self.log_variance = nn.Linear(12, 3), nn.Linear(12, 3)
        self.back = nn.Linear(3, 12)
        self.pixels = nn.Linear(12, 8)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.hidden(x))
        return self.mean(h), self.log_variance(h)

    def sample(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        deviation = torch.exp(0.5 * log_variance)
        return mean + torch.randn_like(deviation) * deviation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x.view(-1, 8))
        z = self.sample(mean, log_variance)
        return torch.sigmoid(self.pixels(F.relu(self.back(z)))), mean, log_variance


@example("F.dropout(..., training=self.training) between layers", 2, group="tutorial")
class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        x = F.dropout(F.relu(self.fc2(x)), p=0.3, training=self.training)
        return self.fc3(x)


@example("LSTM with F.relu(fc(out[:, -1]))", 1, rows(5, 8), group="tutorial")
class SequenceClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.fc, self.head = nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(F.relu(self.fc(out[:, -1])))


@example("squeeze at the end", 2, group="tutorial")
class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.fc2(F.silu(self.fc1(x)))).squeeze(-1)


# Reinforcement learning


@example("DQN", 2, group="rl")
class DQN(nn.Module):
    def __init__(self, observations: int = 8, actions: int = 2) -> None:
        super().__init__()
        self.layer1 = nn.Linear(observations, 16)
        self.layer2 = nn.Linear(16, 16)
        self.layer3 = nn.Linear(16, actions)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer1(x))
        x = F.relu(self.layer2(x))
        return self.layer3(x)


@example("two heads on one trunk", 1, group="rl")
class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 16)
        self.actor, self.critic = nn.Linear(16, 2), nn.Linear(16, 1)
        self.saved_actions: list[Any] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.trunk(x))
        return F.softmax(self.actor(x), dim=-1), self.critic(x)


@example("policy with dropout and log_softmax", 0, group="rl")
class DropoutPolicy(nn.Module):
    """Dropout stands between Linear and ReLU, so there is no pair."""

    def __init__(self) -> None:
        super().__init__()
        self.affine1 = nn.Linear(8, 16)
        self.dropout = nn.Dropout(p=0.6)
        self.affine2 = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dropout(self.affine1(x)))
        return F.log_softmax(self.affine2(x), dim=1)


@example("Gaussian policy: tanh(mean(x)), clamped deviation", 3, group="rl")
class GaussianPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.mean, self.log_std = nn.Linear(16, 2), nn.Linear(16, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return torch.tanh(self.mean(x)) * self.scale, self.log_std(x).clamp(-5, 2).exp()


@example("critic of state and action", 2, lambda: (*rows()(), *rows(2)()), group="rl")
class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        q = F.relu(self.l1(torch.cat([state, action], 1)))
        q = F.relu(self.l2(q))
        return self.l3(q)


# Libraries and research code


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


@example("residual blocks", 2)
class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(8), Residual(8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@example("branch on self.flag", 2)
class Flag(nn.Module):
    def __init__(self, activate: bool = True) -> None:
        super().__init__()
        self.activate, self.factor = activate, 0.5
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = F.relu(h) if self.activate else h * self.factor
        return torch.tanh(self.fc2(h)) * self.factor


@example("branch on data", 2, followed=False)
class DataBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        if x.mean() > 0:
            return torch.sigmoid(self.fc2(h))
        return torch.tanh(self.fc2(2 * h))


@example("embeddings, torch.cat and an MLP", 3, lambda: (torch.arange(4), torch.arange(4) % 3))
class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.fc1, self.fc2, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        x = torch.cat([self.users(users), self.items(items)], dim=-1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return torch.sigmoid(self.out(x)).squeeze()


@example("NeRF: if i in self.skips: x = torch.cat(...)", 5)
class NeRF(nn.Module):
    def __init__(self, depth: int = 4, skips: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.skips = skips
        inputs = [8] + [24 if i in skips else 16 for i in range(depth - 1)]
        self.points = nn.ModuleList([nn.Linear(width, 16) for width in inputs])
        self.density, self.color = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, _ in enumerate(self.points):
            h = self.points[i](h)
            h = F.relu(h)
            if i in self.skips:
                h = torch.cat([x, h], -1)
        return torch.cat([torch.sigmoid(self.color(h)), self.density(h)], -1)


@example("PINN: tanh over self.linears[:-1]", 3)
class PINN(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (2, 12, 12, 12, 1)) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.activation = nn.Tanh()
        for linear in self.linears:
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        a = x[:, :2]
        for linear in self.linears[:-1]:
            a = self.activation(linear(a))
        return self.linears[-1](a)


@example("feed-forward block of a transformer", 1, rows(5, 8))
class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.dropout(F.gelu(self.linear1(x)))))


@example("nn.TransformerEncoderLayer", 2, rows(5, 8), followed=False)
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation=name, batch_first=True)
            for name in ("relu", "gelu")
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@example("gated MLP: silu(w1(x)) * w3(x)", 1, rows(5, 8))
class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.w2 = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PlainLinear(nn.Linear):
    """Another initialization and another repr; forward is nn.Linear's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=True)
        self.inputs = inputs

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.out_features}"


@example("a subclass of Linear that computes the same", 3)
class Subclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = PlainLinear(8, 16), PlainLinear(16, 16)
        self.head = nn.Sequential(PlainLinear(16, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Dense(nn.Module):
    """A layer that holds its weight and calls F.linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@example("a layer of one's own that calls F.linear", 2)
class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Dense(8, 16), Dense(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.relu(self.first(x)))))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Intermediate(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        if isinstance(config.hidden_act, str):
            self.intermediate_act_fn = FUNCTIONS[config.hidden_act]
        else:
            self.intermediate_act_fn = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.intermediate_act_fn(hidden_states)
        return hidden_states


class Output(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dropout(self.dense(hidden_states))
        return self.LayerNorm(hidden_states + input_tensor)


@example("a config and a table of activation functions", 2, rows(5, 8))
class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=8, intermediate_size=16, hidden_act="gelu", dropout=0.1
        )
        self.intermediate, self.output = Intermediate(self.config), Output(self.config)
        self.pooler, self.pool = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.intermediate(x), x)
        return self.pool(self.pooler(x[:, 0]))


class Mlp(nn.Module):
    """fc1, activation, dropout, fc2, dropout: the MLP of vision transformers."""

    def __init__(self, width: int, hidden: int, act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act_layer()
        self.drop1, self.norm = nn.Dropout(0.1), nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


@example("MLP-Mixer block", 2, rows(6, 8))
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(8), Mlp(6, 12)
        self.norm2, self.channels = nn.LayerNorm(8), Mlp(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class GraphConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.lin1, self.lin2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        summed = torch.zeros_like(x).index_add(0, edges[1], self.message(x[edges[0]]))
        return self.lin2(F.relu(self.lin1((1 + self.eps) * x + summed)))


@example(
    "message passing with an MLP",
    3,
    lambda: (torch.randn(4, 8), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])),
)
class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GraphConvolution(8, 16), GraphConvolution(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.conv1(x, edges))
        return F.log_softmax(self.conv2(x, edges), dim=-1)


@example("Siamese: one layer called twice", 4, lambda: (*rows()(), *rows()()))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def embed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc2(F.relu(self.fc1(x))))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.pairwise_distance(self.embed(a), self.embed(b))


@example("two layers with one weight, and its transpose", 3)
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc2.weight = self.fc1.weight
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc2(F.relu(self.fc1(x))))
        return torch.sigmoid(F.linear(h, self.fc1.weight.t(), self.bias))


@example("early return", 2)
class EarlyReturn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features_only = False
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        if self.features_only:
            return x
        return self.fc3(F.relu(self.fc2(x)))


@example("an optional mask", 2)
class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = F.relu(self.fc1(x))
        if mask is not None:
            h = h * mask
        return torch.sigmoid(self.fc2(h)) * scale


def block(inputs: int, outputs: int, normalize: bool) -> Iterator[nn.Module]:
    yield nn.Linear(inputs, outputs)
    if normalize:
        yield nn.BatchNorm1d(outputs, 0.8)
    yield nn.LeakyReLU(0.2, inplace=True)


@example("*layers of blocks in a Sequential", 3)
class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [*block(8, 16, False), *block(16, 16, True), *block(16, 12, False)]
        self.model = nn.Sequential(*layers, nn.Linear(12, 8), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z).view(z.size(0), 2, 4)


@example("Sequentials in a ModuleList", 4)
class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Dropout(0.1)) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.blocks:
            x = part(x) + x
        return self.head(x).sigmoid()


@example("getattr(F, name)(self.fc(x))", 2)
class ByName(nn.Module):
    def __init__(self, activation: str = "elu") -> None:
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("fc1", "fc2"):
            x = getattr(F, self.activation)(getattr(self, name)(x))
        return self.fc3(x)


@example("in-place activations", 2)
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x), inplace=True)
        x = torch.relu_(self.fc2(x))
        return self.fc3(x)


@example("deep sets: sum over elements", 3, rows(5, 8))
class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 8), nn.ELU())
        self.rho, self.out = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.elu(self.rho(self.phi(x).sum(1))))


@example("sine layers: no activation that is fused", 0)
class Siren(nn.Module):
    OMEGA: ClassVar[float] = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.sin(self.OMEGA * self.fc1(x)))


@example("results in a dict, arguments by keyword", 2)
class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, *, temperature: float = 1.0) -> dict[str, Tensor]:
        hidden = F.relu(input=self.fc1(input=x))
        return {"hidden": hidden, "gates": torch.sigmoid(self.fc2(hidden)) / temperature}
