"""Keep one batch that a module was called with, and compare what the module makes of it before and after a change."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


class SampleCall:
    """The first call of a module during training, with its arguments on the CPU.

    Which module a LightningModule calls is its own affair: hooks wait on the root and on every module around one
    adapted layer, and the outermost one that is called is kept. The hooks are gone after that call.

    A module that is compiled in place (``module.compile()``) runs its hooks inside the compiled code, where nothing
    can be kept: its call is not seen.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, root: nn.Module, layer: str) -> None:
        """Wait for the first call of a module around ``layer``.

        Args:
            root: The root module.
            layer: Dotted name of an adapted layer in it.
        """
        self.stop()
        parts = layer.split(".")
        for name in ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]:
            hook = self._keeper(name)
            self._handles.append(root.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            # A distributed strategy calls the root with the arguments of training_step, by a function put over its
            # forward; for the call within the step it puts the module's own bound method in that place.
            forward = module.__dict__.get("forward")
            redirected = forward is not None and getattr(forward, "__self__", None) is not module
            if self._handles and not redirected:
                self.stop()
                self.name = name
                self._args, self._kwargs = _on_cpu(args), _on_cpu(kwargs)

        return keep

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget(self) -> None:
        """Drop the batch."""
        self.stop()
        self.name, self._args, self._kwargs = None, (), {}

    def outputs(self, root: nn.Module) -> list[Tensor] | None:
        """What the module returns for the kept batch, in eval mode: all floating-point tensors in it, in fp32.

        None if no call was seen, or the call can't be repeated outside the training step.
        """
        if self.name is None:
            return None
        module = root.get_submodule(self.name)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        modes = {child: child.training for child in module.modules()}
        module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                result = module(*_moved(self._args, device), **_moved(self._kwargs, device))
        except Exception as error:  # any module's forward: the proof by outputs is then not available, and says so
            log.info("The outputs of %r can't be compared: %s: %s", self.name, type(error).__name__, error)
            return None
        finally:
            for child, training in modes.items():
                child.training = training
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [leaf.detach().float() for leaf in leaves] or None


def difference(outputs: list[Tensor], others: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of any element, and the Euclidean norm of all differences."""
    largest = max((a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(outputs, others, strict=True))
    norm = math.sqrt(sum((a - b).double().square().sum().item() for a, b in zip(outputs, others, strict=True)))
    return largest, norm


def comparable(outputs: list[Tensor], others: list[Tensor]) -> bool:
    """Whether both have the same tensors, by shape."""
    return [output.shape for output in outputs] == [other.shape for other in others]


def agree(outputs: list[Tensor], wanted: list[Tensor], base: list[Tensor], *, tolerance: float, eps: float) -> bool:
    """Whether outputs are what they should be, to a share of the effect or to the rounding of floating point.

    Args:
        outputs: The outputs to judge.
        wanted: What they should be.
        base: What they were without the effect.
        tolerance: Share of the norm of the effect ``wanted - base`` that the error may have.
        eps: Of the coarsest rounding in the computation. Two orders of one computation differ by a few of it, so a
            tiny effect in a coarse dtype is no reason for a refusal.
    """
    _, error = difference(outputs, wanted)
    _, effect = difference(wanted, base)
    _, size = difference(wanted, [torch.zeros_like(output) for output in wanted])
    return error <= 8 * eps * size or error / tolerance <= effect


def rounding(dtypes: Iterable[torch.dtype]) -> float:
    """The eps of the coarsest of some floating-point dtypes, as matrix products compute in them."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer API of torch: which backend it is for, this one does not know
        exact = False
    coarse = torch.float32 if exact else torch.bfloat16
    return max(torch.finfo(coarse if dtype == torch.float32 else dtype).eps for dtype in dtypes)


def _on_cpu(values: Any) -> Any:
    return tree_map(lambda v: v.detach().cpu().clone() if isinstance(v, Tensor) else v, values)


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v, values)
