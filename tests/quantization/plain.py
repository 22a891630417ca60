"""Opens a merged artifact. This file must not import lightning_lora: a test relies on it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.integration.networks import Eager


def open_merged(paths: dict[str, str]) -> dict[str, Any]:
    """What the original class makes of artifacts, in a process without lightning_lora and bitsandbytes."""
    found: dict[str, Any] = {}
    for name, path in paths.items():
        module = Eager.load_from_checkpoint(path, weights_only=True)
        with torch.no_grad():
            outputs = module.eval()(torch.linspace(-1, 1, 48).view(6, 8))
        found[name] = {"outputs": outputs, "state": dict(module.state_dict())}
    imported = [name for name in ("bitsandbytes", "lightning_lora") if sys.modules.get(name) is not None]
    return {**found, "imported": imported}
