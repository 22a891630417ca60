"""200 steps with the fused layer and 200 with torch's own operations: one curve."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRAConfig, inject_adapters
from tests.fused.hardware import has_amx
from tests.integration.language import VOCABULARY, small_llama

STEPS = 200


def curve(*, fused, dtype=torch.float32, autocast=False, kernels="torch"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_llama(hidden=32, key_heads=2).to(dtype)
    inject_adapters(model, LoRAConfig(rank=8, kernels=kernels))
    if not fused:
        for name, child in model.named_modules():
            if name.endswith(".default"):
                child.register_forward_hook(lambda *_: None)  # a hook wants to be called: no fused node
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        # The next token is a function of the last, with noise: there is something to learn, and it takes long.
        start = torch.randint(VOCABULARY, (4, 1), generator=draw)
        tokens = (start * 5 ** torch.arange(4) + torch.arange(4)) % VOCABULARY
        tokens = tokens.repeat_interleave(2, dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        ({}, 1e-5),
        ({"dtype": torch.float64}, 1e-10),
        ({"dtype": torch.bfloat16}, 5e-3),
        ({"autocast": True}, 5e-3),
        pytest.param({"dtype": torch.bfloat16, "kernels": "amx"}, 5e-3, marks=has_amx),
        pytest.param({"autocast": True, "kernels": "amx"}, 5e-3, marks=has_amx),
    ],
    ids=["fp32", "fp64", "bf16", "bf16-mixed", "bf16, amx", "bf16-mixed, amx"],
)
def test_the_curves_of_200_steps_lie_on_each_other(how, tolerance):
    ours, plain = curve(fused=True, **how), curve(fused=False, **how)
    assert ours[-20:].mean() < 0.96 * ours[:20].mean()  # something was learned
    assert ((ours - plain).abs() / plain).max() <= tolerance
