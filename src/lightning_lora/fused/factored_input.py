"""An input that is a product, such as that of ``down(silu(gate) * up)``, is not saved but multiplied again.

Autograd keeps both factors for the gradients of each other, so that the product, in a gated feed-forward part the
widest of all inputs, is memory for the gradient of A alone. One multiplication gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_LEAST = 2**16  # values: the memory of fewer is not worth the time of a call of Python


class Factors(NamedTuple):
    """Two tensors, and their versions when they were multiplied."""

    left: Tensor
    right: Tensor
    versions: tuple[int, int]

    def multiply(self) -> Tensor:
        """The product, as it was.

        Raises:
            RuntimeError: If a factor was changed in place since then.
        """
        if (self.left._version, self.right._version) != self.versions:
            raise RuntimeError(
                "A factor of the input of an adapted layer was changed in place, and a gradient needs it."
            )
        return self.left * self.right


def save_as_factors(node: Any, input: Tensor) -> None:
    """Have a node whose first saved tensor is ``input`` hold its factors instead, where autograd keeps these anyway.

    What was saved stays the input for autograd: it has the input's place in the graph, for second derivatives.

    Args:
        node: The ``grad_fn`` of what was computed from the input; None where nothing is recorded.
        input: Changes of it or its factors that autograd is not told of (``.data``) are not seen, as for autograd's
            own gradients of the factors.
    """
    if node is None or input.numel() < _LEAST or type(input.grad_fn).__name__ != "MulBackward0":
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return  # they decide about what is saved
    factors = _factors_of(input)
    if factors is not None:
        node._raw_saved_tensors[0].register_hooks(lambda _: factors, Factors.multiply)


def _factors_of(input: Tensor) -> Factors | None:
    """Both factors, if the multiplication saved them, itself and on this device, and its result is what it was."""
    multiplication: Any = input.grad_fn
    if input._version != 0:
        return None
    try:
        saved = multiplication._raw_saved_self, multiplication._raw_saved_other
        # A checkpoint's hook would compute all that is before the multiplication. Releases of torch without the
        # attribute do not tell.
        if any(getattr(tensor, "unpack_hook", True) is not None for tensor in saved):
            return None
        left, right = multiplication._saved_self, multiplication._saved_other
    except RuntimeError:  # freed by a backward pass, or changed in place
        return None
    if left is None or right is None:  # only one has a gradient
        return None
    if left.is_leaf or right.is_leaf:  # a parameter, which sharding may free until its module's own backward pass
        return None
    # Detached: this is about values, and their places in the graph are the input's.
    return Factors(left.detach(), right.detach(), (left._version, right._version))
