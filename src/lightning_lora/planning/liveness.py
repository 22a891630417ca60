"""How many bytes are alive at each moment of a run: every storage counts from its creation to its end."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora.planning.weightless import READ, WeightlessTensor

_aten = torch.ops.aten
# Under a dispatch mode the engine adds gradients out of place and clones what it would otherwise take over as .grad;
# without one the first operand's memory is used again. So a peak is read only after these have let go of it.
_REUSED_BY_THE_ENGINE = {_aten.add.Tensor, _aten.new_empty_strided.default, _aten.clone.default}
_WRAPPERS = ("_compile.py", "eval_frame.py")  # torch.compile's, around every dispatch mode
_ENGINE = "_engine_run_backward"  # torch.autograd.graph: the frame from which the C++ engine calls operators


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators create inside this context, until nobody holds them.

    Works on real tensors and on those without memory, whose storages have sizes and ends of life all the same. What
    an operator takes and gives back inside itself is not seen.

    Args:
        known: Tensors that exist anyway; their storages never count.

    Attributes:
        part: What new storages are counted as, a name that the caller sets as the run goes on.
        current: Live bytes by part.
        at_peak: Live bytes by part at the moment when their sum was largest.
        unknown_reads: How often code asked for a number that nobody knows.
        leaves_out: Whether what is created now will be there all the time, and is summed up apart.
        left_out: That sum.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "activations"
        self.current: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.unknown_reads = 0
        self.leaves_out = False
        self.left_out = 0
        self._known = {_key(tensor) for tensor in known}
        self._live: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._total = 0
        self._peak = 0

    @property
    def peak(self) -> int:
        """Largest number of bytes alive at once, since the start or the last :meth:`take_peak`."""
        return self._peak

    def take_peak(self) -> dict[str, int]:
        """Live bytes by part at the peak; a new peak is looked for from now on."""
        parts = {part: size for part, size in self.at_peak.items() if size}
        self._peak, self.at_peak = 0, Counter()
        self.note_peak()
        return parts

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return self._total

    def count(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage, or count it as ``part`` from now on if it is counted already."""
        storage, key = _storage(tensor), _key(tensor)
        if key in self._known:
            return
        size = storage.nbytes()
        if self.leaves_out:
            self._known.add(key)
            self.left_out += size
            return
        if key in self._live:
            reference, old, _ = self._live[key]
            self.current[old] -= size
        else:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._total += size
        self.current[part] += size
        self._live[key] = (reference, part, size)
        if self._total == self._peak:  # what made the peak has got another name
            self.at_peak = self.current.copy()

    def note_peak(self) -> None:
        """Compare what is alive now with the peak."""
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, self.current.copy()

    def _forget(self, key: int) -> None:
        _, part, size = self._live.pop(key)
        self._total -= size
        self.current[part] -= size

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper takes longer than the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.unknown_reads += func is READ and isinstance(args[0], WeightlessTensor) and result != result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._live:
                self.count(tensor, self.part)
        if not (func in _REUSED_BY_THE_ENGINE and _called_by_the_engine()):
            self.note_peak()
        return result


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, WeightlessTensor) else tensor).untyped_storage()


def _key(tensor: Tensor) -> int:
    # The address of a storage's C++ object: without memory there are no data pointers that could tell them apart.
    return int(_storage(tensor)._cdata)


def _called_by_the_engine() -> bool:
    """Whether the C++ engine called the operator, not Python code that it runs (a Function, a recomputation)."""
    if torch.is_grad_enabled():
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == _ENGINE
