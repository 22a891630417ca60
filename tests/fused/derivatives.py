"""Values and gradients of one layer."""

from __future__ import annotations

import torch


def gradients(function, x, lora_A, lora_B):
    """The output for ``x``, and the gradients of ``x``, A and B, with a fixed draw of dropout."""
    x = x.detach().requires_grad_()
    lora_A.grad = lora_B.grad = None
    torch.manual_seed(7)
    output = function(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output)
    (output * weights).sum().backward()
    return output.detach(), x.grad, lora_A.grad, lora_B.grad
