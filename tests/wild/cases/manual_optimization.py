"""Manual optimization: RL4CO's `PPO` steps its optimizer itself; attention learns salesman's tours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

rl4co_models = pytest.importorskip("rl4co.models", reason="rl4co is not installed (see requirements-wild.txt)")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from rl4co.envs import TSPEnv  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LORA = LoRAConfig(rank=2, target_modules="all-linear")


def _parts() -> dict[str, Any]:
    environment = TSPEnv(generator_params={"num_loc": 8}, seed=14)
    policy = rl4co_models.AttentionModelPolicy(
        env_name=environment.name, embed_dim=32, num_heads=4, num_encoder_layers=2, feedforward_hidden=64
    )
    return {"env": environment, "policy": policy}


def build() -> L.LightningModule:
    L.seed_everything(14, verbose=False)
    return rl4co_models.PPO(
        **_parts(),
        critic_kwargs={"embed_dim": 32, "hidden_dim": 32},
        batch_size=16,
        train_data_size=64,
        val_data_size=16,
        test_data_size=32,
        ppo_epochs=2,
        mini_batch_size=8,
        optimizer_kwargs={"lr": 1e-3},
    )


def loaders() -> dict[str, Any]:
    """RL4CO's module makes its own data in `setup`."""
    return {}


def outputs(module: L.LightningModule) -> torch.Tensor:
    tours = TSPEnv(generator_params={"num_loc": 8}, seed=15)
    with torch.random.fork_rng():
        torch.manual_seed(15)
        start = tours.reset(batch_size=[8])
    actions = torch.arange(8).expand(8, 8)
    return module.policy(start, tours, phase="test", actions=actions, return_sum_log_likelihood=False)["log_likelihood"]


def reopen(path: Path) -> L.LightningModule:
    return rl4co_models.PPO.load_from_checkpoint(path, **_parts(), map_location="cpu")
