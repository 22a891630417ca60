"""Parameters that lie side by side in one tensor, and their gradients in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lora.errors import UnsupportedSetupError


class FlatTensors:
    """Moves parameters of one dtype and device into one, whose gradient is where theirs are accumulated.

    The parameters stay the objects that they are, with their values and gradients.

    Attributes:
        parameters: Those that were moved.
        whole: All of them, one after the other.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        with torch.no_grad():
            self.whole = nn.Parameter(torch.cat([parameter.reshape(-1) for parameter in parameters]))
        self._gradient = torch.zeros_like(self.whole)
        self._gradients = [_with_own_version(part) for part in self.parts(self._gradient)]
        self._versions = [gradient._version for gradient in self._gradients]
        self._values = self.parts(self.whole.detach())
        self._addresses = [part.data_ptr() for part in self._values]
        for parameter, part in zip(parameters, self._values, strict=True):
            parameter.data = part

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor of the size of :attr:`whole` in the shapes of the parameters."""
        pieces = torch.split(whole, [parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def await_gradients(self) -> None:
        """Set all gradients to zero; what the next backward pass adds is accumulated in place.

        A gradient that is None stays so, until :meth:`gather` takes in what a backward pass made in its place: who
        looks whether there is one sees the truth in the first pass.
        """
        self._gradient.zero_()
        self._versions = [gradient._version for gradient in self._gradients]
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not gradient:
                parameter.grad = gradient

    @torch.no_grad()
    def gather(self) -> list[nn.Parameter]:
        """Take in values and gradients that were put elsewhere, and return the parameters that got no gradient.

        Raises:
            UnsupportedSetupError: If a parameter was moved to another device or cast.
        """
        self._gather_values()
        self.whole.grad = self._gradient
        without = []
        for parameter, own, version in zip(self.parameters, self._gradients, self._versions, strict=True):
            found = parameter.grad
            if found is None or (found is own and own._version == version):
                without.append(parameter)
            elif found is not own:
                own.copy_(found)
                parameter.grad = own
        return without

    def skip(self) -> None:
        """Let an optimizer see no gradient at all, until the next :meth:`gather`."""
        self.whole.grad = None

    def note_step(self) -> None:
        """Let autograd know that the values have changed, which it can't see: a graph of old ones is refused."""
        torch.autograd.graph.increment_version(self.parameters)

    def _gather_values(self) -> None:
        for parameter, part, address in zip(self.parameters, self._values, self._addresses, strict=True):
            if parameter.data_ptr() != address:  # weights of an average that were put in, and others back
                if (parameter.dtype, parameter.device) != (part.dtype, part.device):
                    raise UnsupportedSetupError(
                        f"FlatOptimizer: a parameter was moved or cast while it is trained, from {part.dtype} "
                        f"on {part.device} to {parameter.dtype} on {parameter.device}. Leave the callback out."
                    )
                part.copy_(parameter.data)
                parameter.data = part

    def release(self, without: Sequence[nn.Parameter]) -> None:
        """Give every parameter a tensor of its own again, and a gradient, except those in ``without``."""
        none = set(map(id, without))
        for parameter, own in zip(self.parameters, self._gradients, strict=True):
            parameter.data = parameter.data.clone()
            if parameter.grad is own:
                parameter.grad = None if id(parameter) in none else own.clone()


def _with_own_version(part: Tensor) -> Tensor:
    """The same memory as a tensor that counts its changes itself, which views do together."""
    empty = torch.empty(0, dtype=part.dtype, device=part.device)
    return empty.set_(part.untyped_storage(), part.storage_offset(), part.size(), part.stride())
