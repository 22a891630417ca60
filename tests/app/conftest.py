"""Composing the app's configuration in a test's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """Compose ``train.yaml`` with overrides; its outputs go to ``tmp_path / folder``."""

    def composed(*overrides: str, folder: str = "run") -> DictConfig:
        with hydra.initialize_config_module("lightning_lora.conf", version_base="1.3"):
            config = hydra.compose("train", overrides=["experiment=tiny", *overrides])
        config.output_dir = str(tmp_path / folder)
        return config

    return composed
