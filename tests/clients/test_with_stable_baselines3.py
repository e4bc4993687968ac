"""stable-baselines3: MlpPolicy trains as before, with its own networks fused."""

import warnings

import numpy as np
import pytest
import torch
from clients import NATIVE, at, close, levels
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

import mlp_ext

ALGORITHMS = {
    "PPO": lambda: PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0),
    "A2C": lambda: A2C(
        "MlpPolicy", "CartPole-v1", seed=0, policy_kwargs={"activation_fn": nn.ReLU}
    ),
    "DQN": lambda: DQN("MlpPolicy", "CartPole-v1", learning_starts=20, buffer_size=500, seed=0),
    "SAC": lambda: SAC("MlpPolicy", "Pendulum-v1", learning_starts=20, buffer_size=500, seed=0),
}


def learned(level: str, name: str) -> tuple[BaseAlgorithm, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = ALGORITHMS[name]()
    at(level, model.policy)
    model.learn(64 if name in ("DQN", "SAC") else 128)
    return model, model.policy.state_dict()


@levels
@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_the_same(level: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fuse changed nothing")
        (_, native), (model, fused) = learned(NATIVE, name), learned(level, name)
    close(fused, native, rtol=1e-3, atol=1e-5)
    assert any(site.status == "fused" for site in mlp_ext.fusion_report(model.policy, level))


@levels
def test_saved_and_loaded(level: str, tmp_path: object) -> None:
    model, _ = learned(level, "PPO")
    model.save(f"{tmp_path}/model")
    loaded = PPO.load(f"{tmp_path}/model")
    observation = np.zeros((3, 4), dtype=np.float32)
    expected = model.predict(observation, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], expected)
